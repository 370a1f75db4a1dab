"""The painter: from a prompt and a seed to a picture, by rules. No AI model is involved, and every picture says so.

Words of the prompt choose the scene and its hour, words of the negative prompt take things away, the seed sets the
layout, guidance the contrast, and few steps leave it unfinished (grainy). The same wish gives the same bytes.
"""

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sandbox.canvas import Canvas
from sandbox.cosmos import paint_space
from sandbox.scenery import paint_land

#: Pictures above this many pixels are painted smaller and enlarged: 2048x2048 takes under a second, not six.
MOST_PIXELS = 1024 * 1024

#: What a word of the prompt puts into the picture.
THINGS = {
    "space": "space planet planets galaxy spacecraft spaceship starship astronaut nebula cosmic cosmos orbit asteroid",
    "planet": "space planet planets saturn spacecraft spaceship starship astronaut orbit",
    "spacecraft": "spacecraft spaceship starship rocket shuttle ufo",
    "sunset": "sunset sunrise dusk dawn golden evening",
    "night": "night moon midnight stars starry dark moonlight moonlit",
    "neon": "neon cyberpunk synthwave vaporwave",
    "desert": "desert dune dunes sand sahara egypt",
    "snow": "snow winter ice frozen arctic snowy glacier",
    "autumn": "autumn fall october",
    "mountains": "mountain mountains hill hills peak peaks alps valley canyon snow snowy glacier",
    "trees": "forest jungle tree trees wood woods pine cabin fox deer bear autumn",
    "cabin": "cabin house cottage hut",
    "city": "city skyline street building buildings town tokyo york skyscraper skyscrapers cyberpunk metropolis",
    "water": "sea ocean beach lake water river island boat ship sail harbour harbor lighthouse coast reflection",
    "lighthouse": "lighthouse",
    "boat": "boat sail sailing sailboat yacht harbour harbor",
    "birds": "bird birds seagull seagulls gull gulls flock beach sea coast",
    "clouds": "cloud clouds cloudy storm sky day landscape morning summer",
}
GROUND = {"desert", "mountains", "trees", "cabin", "city", "water", "lighthouse", "boat"}


@dataclass(frozen=True)
class Wish:
    """All that makes a picture what it is; `kind` is `PNG` or `JPEG`."""

    model: str
    prompt: str
    seed: int
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    num_steps: int = 20
    guidance: float = 7.5
    kind: str = "PNG"


def paint(wish: Wish) -> bytes:
    """The picture as a file. About 0.2 s for 512x512 on one core; the parameters are in its `parameters` text."""
    canvas = _canvas(wish)
    layout = _generator(wish, "layout")
    things = things_of(wish.prompt, wish.negative_prompt, layout)
    if "space" in things:
        paint_space(canvas, things, layout)
    else:
        paint_land(canvas, things, layout)
    _finish(canvas, wish)
    image = canvas.image()
    if image.size != (wish.width, wish.height):
        image = image.resize((wish.width, wish.height), Image.Resampling.BICUBIC)
    without = f" · without “{wish.negative_prompt}”" if wish.negative_prompt else ""
    label(image, f"seed {wish.seed} · “{wish.prompt}”{without}")
    return encode(image, wish.kind, json.dumps({"made_by": "sandbox"} | asdict(wish)))


def things_of(prompt: str, negative_prompt: str, layout: np.random.Generator) -> frozenset[str]:
    """What the picture shows; a prompt that names nothing we know becomes a landscape chosen by the seed."""
    wanted, unwanted = (set(re.findall(r"[a-z]+", text.lower())) for text in (prompt, negative_prompt))
    things = {thing for thing, words in THINGS.items() if wanted & set(words.split())}
    if things & GROUND:
        things -= {"space", "planet"}
    elif "space" not in things:
        things |= {"mountains", str(layout.choice(["trees", "water", "clouds"]))}
    return frozenset(thing for thing in things if not unwanted & set(THINGS[thing].split()))


def _generator(wish: Wish, purpose: str) -> np.random.Generator:
    """Chance that depends on model, prompt and seed alone: another size or contrast keeps the composition."""
    key = json.dumps([purpose, wish.model, wish.prompt.strip().lower(), wish.seed])
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")))


def _canvas(wish: Wish) -> Canvas:
    shrink = min(1.0, (MOST_PIXELS / (wish.width * wish.height)) ** 0.5)
    return Canvas(round(wish.width * shrink), round(wish.height * shrink), _generator(wish, "texture"))


def _finish(canvas: Canvas, wish: Wish) -> None:
    """Glow, darker corners, contrast by guidance, and grain: much of it after few steps."""
    canvas.bloom()
    right, down = canvas.offset(0.5, 0.5)
    canvas.pixels *= (1 - 0.22 * np.clip(np.hypot(right, down) - 0.3, 0, 1))[..., None]
    contrast = 0.8 + 0.2 * min(max(wish.guidance, 0.0), 30.0) / 7.5
    middle = canvas.pixels.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    canvas.pixels += (canvas.pixels - middle) * np.float32((contrast - 1) * 0.6)
    gray = canvas.pixels.mean(axis=2, keepdims=True)
    canvas.pixels += (canvas.pixels - gray) * np.float32(contrast - 1)
    grain = 0.008 + 0.25 / wish.num_steps**1.5
    chance = canvas.texture.random((canvas.height, canvas.width, 1), dtype=np.float32)
    canvas.pixels += (chance - 0.5) * np.float32(grain)


def label(image: Image.Image, text: str) -> None:
    """The strip that is never left out: no picture of ours may be taken for a model's."""
    size = max(11, min(image.size) // 40)
    font = ImageFont.load_default(size)
    line, margin = round(size * 1.25), round(size * 0.8)
    top = image.height - 2 * line - margin // 2
    strip = image.crop((0, top, image.width, image.height))
    image.paste(Image.blend(strip, Image.new("RGB", strip.size), 0.68), (0, top))
    draw = ImageDraw.Draw(image)
    text = " ".join(text.split())
    while draw.textlength(text, font) > image.width - 2 * margin:
        text = text[: int(len(text) * 0.95) - 2].rstrip() + "…"
    draw.text((margin, top + margin // 3), "SANDBOX · drawn by rules, no AI model", (255, 214, 120), font)
    draw.text((margin, top + margin // 3 + line), text, (235, 235, 235), font)


def encode(image: Image.Image, kind: str, parameters: str) -> bytes:
    file = io.BytesIO()
    if kind == "JPEG":
        image.save(file, "JPEG", quality=90, comment=parameters.encode())
    else:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("parameters", parameters)
        image.save(file, "PNG", pnginfo=notes, compress_level=4)
    return file.getvalue()
