"""What every scene is painted on and with: a field of colour, noise, and sharp shapes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Field = NDArray[np.floating[Any]]
Point = tuple[float, float]


def color(text: str) -> Field:
    """`#rrggbb` as three numbers from 0 to 1."""
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], np.float32) / np.float32(255)


def blend(first: Field, second: Field, share: Field | float) -> Field:
    return np.asarray(first + (second - first) * share, np.float32)


def smooth(low: float, high: float, x: Field) -> Field:
    """0 below `low`, 1 above `high`, a soft step between (`high` < `low` turns it round)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


class Canvas:
    """`pixels` is height x width x 3, 0 to 1; `u` and `v` are the places of its pixels, 0 to 1 across and down."""

    def __init__(self, width: int, height: int, texture: np.random.Generator) -> None:
        self.width, self.height, self.side = width, height, min(width, height)
        self.texture = texture
        self.u: Field = (np.arange(width, dtype=np.float32) / width)[None, :]
        self.v: Field = (np.arange(height, dtype=np.float32) / height)[:, None]
        self.pixels: Field = np.zeros((height, width, 3), np.float32)

    def offset(self, u: float, v: float) -> tuple[Field, Field]:
        """How far each pixel is right of and below (u, v), in short sides of the canvas: circles stay round."""
        return (self.u - u) * (self.width / self.side), (self.v - v) * (self.height / self.side)

    def noise(self, cells: int, octaves: int = 5, stretch: float = 1.0) -> Field:
        """Cloudy noise around 0.5 with `cells` lumps across, each drawn out sideways `stretch` times."""
        total = np.zeros((self.height, self.width), np.float32)
        weights = 0.0
        for octave in range(octaves):
            across = cells << octave
            if octave and across > self.width // 2:
                break
            down = max(1, round(across * stretch * self.height / self.width))
            lattice = self.texture.random((down + 3, across + 3), dtype=np.float32)
            layer = Image.fromarray(lattice).resize((self.width, self.height), Image.Resampling.BICUBIC)
            total += np.asarray(layer) * np.float32(0.5**octave)
            weights += 0.5**octave
        return total / np.float32(weights)

    def lay(self, paint: Field, cover: Field) -> None:
        """Paint over what is there; `cover` says where and how thickly (0 to 1)."""
        self.pixels += (paint - self.pixels) * cover[..., None]

    def shine(self, light: Field, amount: Field) -> None:
        """Add light to what is there, the less the brighter it is already: nothing turns to plain white."""
        self.pixels += light * amount[..., None] * np.clip(1 - self.pixels, 0, 1)

    def image(self) -> Image.Image:
        return Image.fromarray((np.clip(self.pixels, 0, 1) * 255 + 0.5).astype(np.uint8))

    def bloom(self) -> None:
        """Let what is bright glow into its surroundings; done at a quarter of the size, for speed."""
        small = np.asarray(self.image().reduce(4), np.float32)
        bright = np.clip(small - 150, 0, 255).astype(np.uint8)
        glow = Image.fromarray(bright).filter(ImageFilter.GaussianBlur(self.side / 100))
        spread = np.asarray(glow.resize((self.width, self.height), Image.Resampling.BILINEAR), np.float32) / 255
        self.pixels += spread * np.clip(1 - self.pixels, 0, 1)

    def draw(self, pen: "Pen", light: Field | float = 1.0) -> None:
        """Lay down what the pen has drawn; `light` falls on it."""
        layer = np.asarray(pen.sheet.reduce(pen.SCALE), np.float32) / 255
        self.lay(layer[..., :3] * light, layer[..., 3])


class Pen:
    """Draws sharp shapes on a clear sheet; places are in pixels of the canvas."""

    #: Drawn larger and made smaller, so that edges are smooth.
    SCALE = 3

    def __init__(self, width: int, height: int) -> None:
        self.sheet = Image.new("RGBA", (width * self.SCALE, height * self.SCALE), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.sheet)

    def polygon(self, points: Sequence[Point], paint: Field) -> None:
        self._draw.polygon([(x * self.SCALE, y * self.SCALE) for x, y in points], fill=_ink(paint))

    def box(self, left: float, top: float, right: float, bottom: float, paint: Field) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], paint)

    def line(self, points: Sequence[Point], paint: Field, thickness: float) -> None:
        places = [(x * self.SCALE, y * self.SCALE) for x, y in points]
        self._draw.line(places, fill=_ink(paint), width=max(1, round(thickness * self.SCALE)), joint="curve")


def _ink(paint: Field) -> tuple[int, int, int, int]:
    red, green, blue = (int(255 * min(max(part, 0.0), 1.0)) for part in paint.tolist())
    return red, green, blue, 255
