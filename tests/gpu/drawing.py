"""What the tests ask for, and how they look at what they get."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.backends.base import Failure, Picture, Request
from worker.backends.diffusers import Diffusers

INPUT = {
    "prompt": "a red fox",
    "negative_prompt": None,
    "width": 64,
    "height": 64,
    "num_steps": 4,
    "guidance": 7.5,
    "seed": 1,
}


def request(job_id: str = "job_1", **changes: Any) -> Request:
    return Request(job_id, "sdxl", INPUT | changes)


def photo(width: int = 64, height: int = 64, seed: int = 7) -> NDArray[np.uint8]:
    """Coloured patches of 8x8: what is not all noise, so that a decoder leaves something of it to be seen."""
    patches = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return patches.repeat(8, axis=0).repeat(8, axis=1)


def alter(image: NDArray[np.uint8], mask: NDArray[np.bool_] | None = None, **changes: Any) -> Request:
    """A request to alter an image, where the mask says so."""
    size = {"width": image.shape[1], "height": image.shape[0]}
    input = INPUT | size | {"strength": 0.6} | changes
    return Request(
        "job_1", "sdxl", input, image=png(image), mask=None if mask is None else png(mask.astype("u1") * 255)
    )


def png(pixels: NDArray[Any]) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def draw(backend: Diffusers, *requests: Request) -> list[Picture | Failure]:
    return backend.generate(requests, lambda *_: None, lambda _: False)


def picture(outcome: Picture | Failure) -> Picture:
    assert isinstance(outcome, Picture), outcome
    return outcome


def failure(outcome: Picture | Failure) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


def pixels(outcome: Picture | Failure) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(picture(outcome).read()))).astype(int)


def largest_difference(outcomes: Sequence[Picture | Failure], expected: Sequence[NDArray[np.int64]]) -> int:
    assert len(outcomes) == len(expected)
    return max(int(abs(pixels(outcome) - image).max()) for outcome, image in zip(outcomes, expected, strict=True))
