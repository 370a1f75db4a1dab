"""The wire format of the box: a machine that runs a server with the Automatic1111 web UI's API.

Sources: github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/api/api.py` and `modules/api/models.py`, as of
version 1.10 (2024): names, defaults and types of the requests, `images` and `info` of the answers, and the four fields
of an error. Fields that it does not know it ignores, and so it does with a checkpoint that it does not have.
"""

import base64
import binascii
import io
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sandbox.painter import Wish
from sandbox.wire import Answer, json_answer

#: What it could load, with the short hashes; the first one is what it has loaded.
CHECKPOINTS = {"sd_xl_base_1.0": "31e35c80fc", "sd_xl_turbo_1.0": "e869ac7d69"}
SAMPLERS = frozenset({"Euler", "Euler a", "DPM++ 2M"})
#: Lowest and highest of the numbers, both included. The server itself knows no limits: ours keep it sane.
SIDE = (64, 2048)
STEPS = (1, 150)


class BoxError(Exception):
    """The call is refused with this answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass(frozen=True)
class Order:
    """One picture to draw. `wish.model` is the checkpoint; `image` is what it starts from, `mask` what may change."""

    wish: Wish
    strength: float = 1.0
    image: Image.Image | None = None
    mask: Image.Image | None = None

    @property
    def steps(self) -> int:
        """With an image it starts in the middle."""
        return self.wish.num_steps if self.image is None else max(1, round(self.wish.num_steps * self.strength))


def error(status: int, kind: str, detail: str = "", words: str = "", headers: tuple[Any, ...] = ()) -> Answer:
    """The server's own form (`handle_exception`)."""
    return json_answer(status, {"error": kind, "detail": detail, "body": "", "errors": words}, headers)


def invalid(name: str, message: str) -> BoxError:
    """FastAPI's form of what does not fit a type."""
    return BoxError(json_answer(422, {"detail": [{"loc": ["body", name], "msg": message, "type": "value_error"}]}))


def read_order(body: bytes, starts_from_image: bool) -> Order:
    """What is asked for. Raises BoxError."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict):
        raise invalid("body", "Input should be a valid dictionary")
    sampler = _text(call, "sampler_name", "Euler")
    if sampler not in SAMPLERS:
        raise BoxError(error(404, "HTTPException", "Sampler not found"))
    seed = _whole(call, "seed", -1, (-1, 2**63 - 1))
    wish = Wish(
        model=_checkpoint(call),
        prompt=_text(call, "prompt", ""),
        negative_prompt=_text(call, "negative_prompt", ""),
        seed=secrets.randbelow(2**32) if seed == -1 else seed,
        width=_side(call, "width"),
        height=_side(call, "height"),
        num_steps=_whole(call, "steps", 50, STEPS),
        guidance=_number(call, "cfg_scale", 7.0, (-1000, 1000)),
    )
    if not starts_from_image:
        return Order(wish)
    images = call.get("init_images")
    if not isinstance(images, list) or not images:
        raise BoxError(error(404, "HTTPException", "Init image not found"))
    size = (wish.width, wish.height)
    mask = call.get("mask")
    return Order(
        wish,
        _number(call, "denoising_strength", 0.75, (0, 1)),
        _picture(images[0]).convert("RGB").resize(size),
        None if mask is None else _picture(mask).convert("L").resize(size),
    )


def picture_answer(
    order: Order, picture: bytes, *, seed: int | None = None, data_url: bool = False, broken: bool = False
) -> Answer:
    """The picture in JSON, with what was asked for, and `info`, which is JSON in a string."""
    wish = order.wish
    image = base64.b64encode(picture).decode()
    if broken:
        image = image[: len(image) // 2] + "…" + image[len(image) // 2 :]
    asked = {"prompt": wish.prompt, "negative_prompt": wish.negative_prompt, "seed": wish.seed, "steps": wish.num_steps}
    info = asked | {
        "seed": wish.seed if seed is None else seed,
        "width": wish.width,
        "height": wish.height,
        "cfg_scale": wish.guidance,
        "sampler_name": "Euler",
        "sd_model_name": wish.model,
        "sd_model_hash": CHECKPOINTS[wish.model],
    }
    content = {
        "images": [("data:image/png;base64," if data_url else "") + image],
        "parameters": asked,
        "info": json.dumps(info),
    }
    return json_answer(200, content)


def no_picture_answer() -> Answer:
    return json_answer(200, {"images": [], "parameters": {}, "info": ""})


def checkpoints() -> list[dict[str, str]]:
    """As `/sdapi/v1/sd-models` lists them."""
    return [
        {
            "title": f"{name}.safetensors [{short}]",
            "model_name": name,
            "hash": short,
            "filename": f"/models/Stable-diffusion/{name}.safetensors",
        }
        for name, short in CHECKPOINTS.items()
    ]


def _checkpoint(call: Mapping[str, Any]) -> str:
    settings = call.get("override_settings") or {}
    wanted = settings.get("sd_model_checkpoint") if isinstance(settings, dict) else None
    for entry in checkpoints():
        if wanted in entry.values():
            return entry["model_name"]
    return next(iter(CHECKPOINTS))


def _picture(text: object) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(base64.b64decode(str(text), validate=True)))
        image.load()
    except (binascii.Error, ValueError, OSError, SyntaxError):
        raise BoxError(error(500, "HTTPException", "Invalid encoded image")) from None
    return image


def _text(call: Mapping[str, Any], name: str, default: str) -> str:
    value = call.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(name, "Input should be a valid string")
    return default if value is None else value


def _whole(call: Mapping[str, Any], name: str, default: int, limits: tuple[int, int]) -> int:
    value = call.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise invalid(name, "Input should be a valid integer")
    _within(name, value, limits)
    return value


def _number(call: Mapping[str, Any], name: str, default: float, limits: tuple[float, float]) -> float:
    value = call.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(name, "Input should be a valid number")
    _within(name, value, limits)
    return float(value)


def _within(name: str, value: float, limits: tuple[float, float]) -> None:
    if not limits[0] <= value <= limits[1]:
        raise invalid(name, f"Input should be from {limits[0]} to {limits[1]}")


def _side(call: Mapping[str, Any], name: str) -> int:
    return _whole(call, name, 512, SIDE)
