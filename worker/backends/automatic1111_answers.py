"""What a server with the Automatic1111 web UI's API says, and what is said to it. Pure: no network, no clock.

Facts, from github.com/AUTOMATIC1111/stable-diffusion-webui as of version 1.10 (2024), `modules/api/api.py`,
`modules/api/models.py`, `modules/processing.py` and `modules/shared_state.py`, unless another source is named:

- `/sdapi/v1/txt2img` and `/img2img` answer `{"images": [base64 ...], "parameters": {...}, "info": "JSON in a string"}`;
  `info` has `seed`, `sd_model_name`, `sd_model_hash` (1.6 and newer). With `do_not_save_grid` no grid comes before the
  picture, whatever the server's settings say; a mask may come after it (`return_mask`).
- Fields that it does not know it ignores. A checkpoint that it does not know too, and draws with what is loaded.
- Errors are `{"error": class, "detail": text, "body": text, "errors": text}`: 500 for whatever was raised (a full card
  is `OutOfMemoryError`), 404 for a sampler that it does not have, 401 without the password of `--api-auth`. FastAPI's
  own are `{"detail": text or list}`: 422 for a value of the wrong type, 404 for every route without `--api`.
- `/sdapi/v1/progress` tells of whatever is drawn, for whomever. `job_count` is 0 while nothing is. `job_timestamp` is
  when the job began, in seconds; `interrupted` and `skipped` stay as they are until the next job begins.
- What was interrupted comes back half-drawn, with status 200. SD.Next answers 500 or no picture
  (vladmandic/sdnext#4201, 2025).
- Forge (lllyasviel/stable-diffusion-webui-forge, 2024) has the same state; SD.Next (vladmandic/sdnext, 2025) begins a
  new job within the job for its decoder.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from shared.catalogue import MODELS, Number
from worker.backends.base import Billed, Failure, Kind, PictureWarning, Request, one_line
from worker.backends.json_answers import decode_base64, read_json
from worker.retry_after import retry_after_seconds

SAMPLER = "Euler"  # as the backend `diffusers` draws
#: A prompt of commas stands in the answer several times.
MOST_VALUES = 100_000
#: What an image and its mask are told by in `Request.input`.
_SOURCES = frozenset({"image", "mask", "strength"})
_IN_MEMORY = r"out ?of ?memory|not enough memory|could not allocate"


@dataclass(frozen=True)
class Drawn:
    """An answer with a picture in it, its bytes not looked at any closer. `info`: what the server says of it."""

    picture: bytes
    info: Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """What a server is at. `since`: when it began, in the server's words. `preview`: base64 of what there is so far."""

    idle: bool
    since: str
    step: int
    steps: int
    broken_off: bool  # what is drawn, or was drawn last, was interrupted or skipped
    preview: str | None


def body_of(request: Request, checkpoint: str | None, image: str | None, mask: str | None) -> dict[str, Any]:
    """The body of the POST. Raises Failure (rejected) for what the model does not take.

    `image` and `mask`: PNG in base64, of the size that is asked for. Nothing that names a script is ever sent.
    """
    model = MODELS.get(request.model)
    if model is None:
        raise Failure(Kind.rejected, Billed.no, f"there is no model {request.model} any more", asked=False)
    known = set(model.parameters) | (_SOURCES if image is not None else frozenset())
    unknown = sorted(name for name, value in request.input.items() if value is not None and name not in known)
    if unknown:
        raise Failure(Kind.rejected, Billed.no, f"{request.model} does not take {', '.join(unknown)}", asked=False)

    def number(name: str) -> Any:
        value, limits = request.input.get(name), model.parameters.get(name)
        return limits.default if value is None and isinstance(limits, Number) else value

    body = {
        "prompt": request.input["prompt"],
        "negative_prompt": request.input.get("negative_prompt") or "",
        "steps": number("num_steps"),
        "cfg_scale": number("guidance"),
        "width": number("width"),
        "height": number("height"),
        "seed": -1 if number("seed") is None else number("seed"),
        "sampler_name": SAMPLER,
        "batch_size": 1,
        "n_iter": 1,
        "send_images": True,
        # Nothing is kept there: `save_images` since 1.0, the others before and in SD.Next.
        "save_images": False,
        "do_not_save_samples": True,
        "do_not_save_grid": True,
        "override_settings": {} if checkpoint is None else {"sd_model_checkpoint": checkpoint},
        # It stays loaded for the next job; to change back and forth takes longer than a picture.
        "override_settings_restore_afterwards": False,
    }
    if image is not None:
        body |= {"init_images": [image], "denoising_strength": request.input["strength"], "resize_mode": 0}
    if mask is not None:
        body |= {
            "mask": mask,
            "inpainting_mask_invert": 0,  # white may change
            "inpainting_fill": 1,  # from what is there
            "inpaint_full_res": False,  # the whole picture at once, not the masked part made larger
            "mask_blur": 0,
        }
    return body


def judge_answer(
    status: int, headers: Mapping[str, str], body: bytes, redact: Callable[[str], str] = lambda text: text
) -> Drawn:
    """What came with a picture; or Failure. `redact` takes out of the server's words what must not be repeated."""
    content = read_json(body, MOST_VALUES)
    words = redact(_words(content))
    if 200 <= status < 300:
        return _drawn(content, status)
    kind, sentence = _kind_of(status, content, words)
    message = f"{sentence} (HTTP {status})"
    if kind == Kind.rejected and words:
        message += f": {words}"
    retry_after = retry_after_seconds({name.lower(): value for name, value in headers.items()})
    raise Failure(kind, Billed.no, message, retry_after)


def _drawn(content: object, status: int) -> Drawn:
    if not isinstance(content, dict) or "images" not in content:
        raise _bad_output(f"answered with something that is not the API's (HTTP {status})")
    images = content["images"]
    if not isinstance(images, list) or not images:
        raise _bad_output("sent no picture")
    try:
        if not isinstance(images[0], str):
            raise ValueError(type(images[0]))
        picture = decode_base64(images[0])
    except ValueError:
        raise _bad_output("sent a picture that is not base64") from None
    told = content.get("info")
    info = read_json(told.encode(errors="replace"), MOST_VALUES) if isinstance(told, str) else None
    return Drawn(picture, info if isinstance(info, dict) else {})


def _bad_output(what: str) -> Failure:
    return Failure(Kind.bad_output, Billed.no, f"the server {what}")


def _kind_of(status: int, content: object, words: str) -> tuple[Kind, str]:
    """What an error means, and a sentence that may be shown to everybody."""
    if status in (401, 403, 407):
        return Kind.auth_failed, "the server refused our user and password"
    if status in (404, 405, 410):
        if isinstance(content, dict) and "sampler" in words.lower():
            return Kind.auth_failed, f"the server does not know the sampler {SAMPLER}"
        return Kind.auth_failed, "the server has no such API: it runs without --api, or the address is wrong"
    if 300 <= status < 400:
        return Kind.auth_failed, "the server is not at this address any more"
    if status == 429:
        return Kind.rate_limited, "the server takes no more requests now"
    if status in (408, 409, 421, 423, 425):
        return Kind.transient, "the server could not draw the picture now"
    if 400 <= status < 500:
        return Kind.rejected, "the server refused the request"
    if 500 <= status < 600 and re.search(_IN_MEMORY, words, re.IGNORECASE):
        return Kind.out_of_memory, "the server has too little memory for this picture"
    return Kind.transient, "the server could not draw the picture"


def _words(content: object) -> str:
    """What an error answer says; not redacted, at most a few thousand characters. Of anything but JSON, nothing."""
    if not isinstance(content, dict):
        return ""
    words = []
    for name in ("error", "detail", "errors", "message"):  # the last is Forge's
        value = content.get(name)
        if isinstance(value, str):
            words.append(value)
        elif isinstance(value, list):  # FastAPI's; it may repeat what was sent, under `input`
            words += [_validation_words(entry) for entry in value[:20] if isinstance(entry, dict)]
    return "; ".join(word.strip()[:2000] for word in words if word.strip())


def _validation_words(entry: Mapping[str, Any]) -> str:
    place = entry.get("loc")
    where = ".".join(map(str, place[:10])) if isinstance(place, list) else ""
    return f"{where}: {entry.get('msg')}"


def state_of(content: object) -> State | None:
    """The answer of `/sdapi/v1/progress`; None if it is none."""
    state = content.get("state") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(state, dict):
        return None
    preview = content.get("current_image")
    return State(
        idle=state.get("job_count") == 0,
        since=str(state.get("job_timestamp")),
        step=_whole(state.get("sampling_step")),
        steps=_whole(state.get("sampling_steps")),
        broken_off=state.get("interrupted") is True or state.get("skipped") is True,
        preview=preview if isinstance(preview, str) and preview else None,
    )


def _whole(value: object) -> int:
    return value if type(value) is int else 0


def knows(models: object, checkpoint: str) -> bool:
    """Whether `/sdapi/v1/sd-models` names this checkpoint, in one of the ways that the server takes."""
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    names = {
        str(entry.get(name)) for entry in entries for name in ("title", "model_name", "hash", "sha256", "filename")
    }
    return checkpoint in names or _plain(checkpoint) in {_plain(name) for name in names}


def warnings(
    request: Request, width: int, height: int, info: Mapping[str, Any], checkpoint: str | None
) -> tuple[PictureWarning, ...]:
    """What of a picture is not as it was asked for."""
    found = []
    asked = (request.input.get("width", width), request.input.get("height", height))
    if asked != (width, height):
        found.append(PictureWarning("size_differs", f"asked for {asked[0]}x{asked[1]} pixels, got {width}x{height}"))
    seed, used = request.input.get("seed"), info.get("seed")
    if seed is not None and type(used) is int and used != seed:
        found.append(PictureWarning("seed_differs", f"asked for seed {seed}, drawn with {used}"))
    model = info.get("sd_model_name")
    if checkpoint and isinstance(model, str) and model and not _is(checkpoint, model, info.get("sd_model_hash")):
        found.append(PictureWarning("model_differs", f"asked for {checkpoint}, drawn by {one_line(model)[:100]}"))
    return tuple(found)


def model_hash(info: Mapping[str, Any]) -> str | None:
    """Of the checkpoint that drew, as the server names it; None if it does not."""
    found = info.get("sd_model_hash")
    return one_line(found)[:100] if isinstance(found, str) and found else None


def _is(checkpoint: str, model: str, short_hash: object) -> bool:
    return _plain(checkpoint) == _plain(model) or checkpoint == short_hash


def _plain(checkpoint: str) -> str:
    """`folder/sd_xl.safetensors [31e35c80fc]`, as a list of models has it, without all but the name."""
    name = PurePosixPath(checkpoint.replace("\\", "/").partition(" [")[0]).name
    return re.sub(r"\.(safetensors|ckpt|pt)$", "", name).lower()
