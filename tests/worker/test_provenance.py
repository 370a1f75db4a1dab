"""What a picture that we encode says of itself, as the tools of the field read it."""

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worker.backends.base import Request
from worker.backends.provenance import parameters, png

INPUT = {
    "prompt": "a red fox, running",
    "negative_prompt": "blurry",
    "width": 96,
    "height": 64,
    "num_steps": 20,
    "guidance": 7.5,
    "seed": 4294967295,
}
PIXELS = np.random.default_rng(7).integers(0, 256, (64, 96, 3), np.uint8)


def texts_of(data: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(data)) as image:
        return {str(name): value for name, value in image.info.items()}


def made(job_id: str = "job_1", **changes: Any) -> bytes:
    request = Request(job_id, "stabilityai/sdxl", INPUT | changes)
    return png(PIXELS, request, "diffusers", "0123abcd", sampler="Euler")


def as_automatic1111_reads_it(text: str) -> dict[str, str]:
    """Lines of a prompt, from `Negative prompt:` on of the negative one, and a last line of at least three fields."""
    *lines, last = text.strip().split("\n")
    fields = re.findall(r'(?:^|, )([^:,]+): ("(?:[^"\\]|\\.)*"|[^,]*)', last)
    assert len(fields) >= 3
    read = {name: json.loads(value) if value.startswith('"') else value for name, value in fields}
    prompt, mark, negative = "\n".join(lines).partition("\nNegative prompt: ")
    return read | {"Prompt": prompt} | ({"Negative prompt": negative} if mark else {})


def test_the_fields_tools_read_the_parameters_back() -> None:
    assert as_automatic1111_reads_it(texts_of(made(strength=0.55))["parameters"]) == {
        "Prompt": "a red fox, running",
        "Negative prompt": "blurry",
        "Steps": "20",
        "Sampler": "Euler",
        "CFG scale": "7.5",
        "Seed": "4294967295",
        "Size": "96x64",
        "Model": "stabilityai/sdxl",
        "Denoising strength": "0.55",
    }


def test_what_is_not_known_is_left_out() -> None:
    text = parameters("flux", {"prompt": "a cat", "num_steps": 4, "negative_prompt": ""}, (1024, 1024), None)
    assert text == "a cat\nSteps: 4, Size: 1024x1024, Model: flux"


def test_a_name_with_marks_of_the_form_is_quoted() -> None:
    read = as_automatic1111_reads_it(parameters('a, b: "c"', INPUT, (8, 8), None))
    assert read["Model"] == 'a, b: "c"'


@pytest.mark.parametrize(
    ("prompt", "chunk"),
    [("a fox\nin two lines", b"tEXt"), ("ein Füchslein", b"tEXt"), ("猫 😀\nzwei Zeilen", b"iTXt")],
)
def test_any_prompt_comes_back_as_it_was(prompt: str, chunk: bytes) -> None:
    data = made(prompt=prompt)
    assert chunk + b"parameters\x00" in data
    texts = texts_of(data)
    assert as_automatic1111_reads_it(texts["parameters"])["Prompt"] == prompt
    assert json.loads(texts["darkroom"])["input"]["prompt"] == prompt


def test_a_prompt_that_the_fields_form_cannot_hold_is_exact_in_ours() -> None:
    prompt = "a fox\nNegative prompt: nothing\nSteps: 1, Seed: 2, Size: 3x4"
    assert json.loads(texts_of(made(prompt=prompt))["darkroom"])["input"] == INPUT | {"prompt": prompt}


def test_the_pixels_are_untouched_and_the_same_job_is_the_same_file() -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made()))), PIXELS)
    assert made() == made() != made("job_2")


def test_the_order_of_the_input_makes_no_other_file() -> None:
    turned = Request("job_1", "stabilityai/sdxl", dict(reversed(INPUT.items())))
    assert png(PIXELS, turned, "diffusers", "0123abcd", sampler="Euler") == made()
