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


def draw(backend: Diffusers, *requests: Request) -> list[Picture | Failure]:
    return backend.generate(requests, lambda *_: None, lambda _: False)


def picture(outcome: Picture | Failure) -> Picture:
    assert isinstance(outcome, Picture), outcome
    return outcome


def failure(outcome: Picture | Failure) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


def pixels(outcome: Picture | Failure) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(picture(outcome).data))).astype(int)


def largest_difference(outcomes: Sequence[Picture | Failure], expected: Sequence[NDArray[np.int64]]) -> int:
    assert len(outcomes) == len(expected)
    return max(int(abs(pixels(outcome) - image).max()) for outcome, image in zip(outcomes, expected, strict=True))
