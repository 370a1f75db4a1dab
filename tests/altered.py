"""Altering through the whole service: what must hold whichever backend draws."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.service import Service

SIDE = 256


def expect_images_are_altered(running: Service) -> None:
    """From an image, inside of a mask, and from the picture of an earlier job. Fails where a pixel is not kept."""
    start = np.random.default_rng(7).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[64:192, 32:224] = 255
    before = running.count().total()
    anew = _submit(running, image=_base64(start), strength=0.5)
    inside = _submit(running, image=_base64(start), mask=_base64(mask), strength=0.9)
    running.all_ended(before + 2)
    again = _submit(running, image=anew, mask=_base64(mask), strength=0.9)
    running.all_ended(before + 3)
    for job_id in (anew, inside, again):
        job = running.job(job_id)
        assert (job["status"], job["attempts"], job["cost_usd"]) == ("succeeded", 1, "0"), job
    assert (_pixels(running, anew) != start).any()
    for job_id, began_with in ((inside, start), (again, _pixels(running, anew))):
        drawn = _pixels(running, job_id)
        assert np.array_equal(drawn[mask == 0], began_with[mask == 0])
        assert (drawn[mask == 255] != began_with[mask == 255]).any()
    assert running.job(again)["input"]["image"]["job"] == anew


def _submit(running: Service, **input: Any) -> str:
    return running.submit("a red fox", input={"num_steps": 4, **input})


def _base64(pixels: NDArray[np.uint8]) -> str:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def _pixels(running: Service, job_id: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(running.image(job_id))).convert("RGB"))
