"""The vendor's wire format: its models and limits, how a call is read, and how its answers and errors look.

Sources: docs.dataoorts.com (image models, as of 2026-05-05) for models, parameters and limits; Cloudflare Workers AI
for the error envelope and codes, whose parameter names and envelope Dataoorts shares (it documents no errors itself).
"""

import base64
import json
import math
import secrets
from dataclasses import dataclass
from typing import Any

from sandbox.painter import Wish

BAD_INPUT = 5006
UNKNOWN_MODEL = 5007
AUTHENTICATION = 10000

#: Lowest, highest, default, both ends included. The vendor names none for seed and guidance: ours keep them sane.
PROMPT_LENGTH = (2, 2048)
SIDE = (256, 2048, 512)
SEED = (-(2**63), 2**64 - 1)
GUIDANCE = (-1000, 1000, 7.5)


@dataclass(frozen=True)
class Model:
    """`steps` is the name of the parameter and its limits; `json`: answers JSON with a JPEG instead of raw PNG."""

    steps: tuple[str, int, int, int]
    seed: bool = True
    fixed_size: tuple[int, int] | None = None
    json: bool = False


MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": Model(("num_steps", 1, 20, 20)),
    "bytedance/stable-diffusion-xl-lightning": Model(("num_steps", 1, 20, 20)),
    "lykon/dreamshaper-8-lcm": Model(("num_steps", 1, 20, 20), seed=False),
    "black-forest-labs/flux-1-schnell": Model(("steps", 1, 8, 4), fixed_size=(1024, 1024), json=True),
}


class VendorError(Exception):
    """The call is refused: HTTP `status`, the vendor's `code`, and its words."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; `pictures` is 1 if its body is one whole picture that the vendor would bill."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    pictures: int = 0


def json_answer(status: int, content: object, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    return Answer(status, "application/json", json.dumps(content).encode(), headers)


def error_answer(status: int, code: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """Cloudflare's envelope."""
    errors = [{"code": code, "message": message}]
    return json_answer(status, {"success": False, "errors": errors, "result": {}, "messages": []}, headers)


def picture_answer(picture: bytes, kind: str, as_json: bool, whole: bool = True) -> Answer:
    """A picture as the vendor sends it: raw, or base64 in JSON. `kind` (PNG or JPEG) is what the label says."""
    if as_json:
        body = b'{"result": {"image_base64": "' + base64.b64encode(picture) + b'"}}'
        return Answer(200, "application/json", body, pictures=int(whole))
    return Answer(200, f"image/{kind.lower()}", picture, pictures=int(whole))


def check_key(authorization: str) -> None:
    """Any key will do, as long as there is one. Raises VendorError 401."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise VendorError(401, AUTHENTICATION, "Authentication error")


def read_call(body: bytes) -> Wish:
    """What is asked for. Parameters that the vendor does not know are ignored; null is no value and refused.

    Raises VendorError 400, code 5006 (bad input) or 5007 (unknown model).
    """
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        raise _bad("Error: request body is not valid JSON") from None
    if not isinstance(call, dict) or not isinstance(call.get("model"), str) or not isinstance(call.get("data"), dict):
        raise _bad("Error: required properties at '/' are 'model' and 'data'")
    name, data = call["model"], call["data"]
    if name not in MODELS:
        raise VendorError(400, UNKNOWN_MODEL, f"AiError: No such model {name[:200]} or task")
    model = MODELS[name]
    if "prompt" not in data:
        raise _bad("Error: required properties at '/' are 'prompt'")
    steps_name, *step_limits = model.steps
    sized = model.fixed_size is None  # FLUX takes prompt, steps and seed alone
    width, height = model.fixed_size or (_whole(data, "width", *SIDE), _whole(data, "height", *SIDE))
    return Wish(
        model=name,
        prompt=_text(data, "prompt", *PROMPT_LENGTH),
        negative_prompt=_text(data, "negative_prompt", 0, PROMPT_LENGTH[1]) if sized else "",
        seed=_seed(data) if model.seed else secrets.randbelow(2**32),
        width=width,
        height=height,
        num_steps=_whole(data, steps_name, *step_limits),
        guidance=_number(data, "guidance", *GUIDANCE) if sized else GUIDANCE[2],
        kind="JPEG" if model.json else "PNG",
    )


def _bad(detail: str) -> VendorError:
    return VendorError(400, BAD_INPUT, f"AiError: Bad input: {detail}")


def _mismatch(name: str, wanted: str, value: object) -> VendorError:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return _bad(f"Error: Type mismatch of '/{name}', '{wanted}' not in '{names.get(type(value), 'null')}'")


def _text(data: dict[str, Any], name: str, shortest: int, longest: int) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        raise _mismatch(name, "string", value)
    if len(value) < shortest:
        raise _bad(f"Error: Length of '/{name}' must be >= {shortest}")
    if len(value) > longest:
        raise _bad(f"Error: Length of '/{name}' must be <= {longest}")
    return value


def _number(data: dict[str, Any], name: str, lowest: float, highest: float, default: float) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _mismatch(name, "number", value)
    _within(name, value, lowest, highest)
    return float(value)


def _whole(data: dict[str, Any], name: str, lowest: int, highest: int, default: int) -> int:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mismatch(name, "integer", value)
    _within(name, value, lowest, highest)
    return value


def _within(name: str, value: float, lowest: float, highest: float) -> None:
    if value < lowest:
        raise _bad(f"Error: '/{name}' must be >= {lowest}")
    if value > highest:
        raise _bad(f"Error: '/{name}' must be <= {highest}")


def _seed(data: dict[str, Any]) -> int:
    """A number or a numeric string (the vendor takes both); drawn when there is none."""
    if "seed" not in data:
        return secrets.randbelow(2**32)
    value = data["seed"]
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal() and len(value) <= 40:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mismatch("seed", "integer", value)
    _within("seed", value, *SEED)
    return value
