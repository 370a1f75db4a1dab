"""The painter: the same wish gives the same bytes, and every part of the wish shows."""

import io
import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from sandbox.painter import Wish, paint
from tests.sandbox.calling import SDXL

WISH = Wish(SDXL, "a lighthouse by the sea at sunset", seed=7, width=256, height=256)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_the_same_input_gives_the_same_bytes() -> None:
    assert paint(WISH) == paint(replace(WISH))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a lighthouse by the sea at night"},
        {"negative_prompt": "birds"},
        {"negative_prompt": "text, watermark"},
        {"seed": 8},
        {"num_steps": 19},
        {"guidance": 7.6},
        {"width": 264},
        {"height": 264},
    ],
)
def test_every_parameter_shows_in_the_pixels(change: dict[str, Any]) -> None:
    first, second = opened(paint(WISH)), opened(paint(replace(WISH, **change)))
    assert first.size != second.size or ImageChops.difference(first, second).getbbox() is not None


def test_the_negative_prompt_takes_things_away() -> None:
    tower = (0, 40, 256, 130)  # where a lighthouse would stand out against the sky
    wish = replace(WISH, prompt="lighthouse at night", guidance=7.5)
    with_it, without = (opened(paint(replace(wish, negative_prompt=text))).crop(tower) for text in ("", "lighthouse"))
    reds = [
        int((np.asarray(image, int)[..., 0] - np.asarray(image, int)[..., 2]).max()) for image in (with_it, without)
    ]
    assert reds[0] > 60 > reds[1]


def test_the_parameters_are_written_into_the_file() -> None:
    image = Image.open(io.BytesIO(paint(WISH)))
    noted = json.loads(image.text["parameters"])  # type: ignore[attr-defined]  # PNG images have it
    assert (noted["made_by"], noted["prompt"], noted["seed"]) == ("sandbox", WISH.prompt, 7)


@pytest.mark.parametrize("size", [(256, 256), (512, 512), pytest.param((2048, 2048), marks=pytest.mark.slow)])
def test_the_strip_that_says_sandbox_is_in_every_picture(size: tuple[int, int]) -> None:
    """Its yellow letters stand in the lowest part, as wide as 30 letters are."""
    image = opened(paint(replace(WISH, width=size[0], height=size[1])))
    assert image.size == size
    letter = max(11, min(size) // 40)
    yellow = np.abs(np.asarray(image, int) - (255, 214, 120)).max(axis=2) < 12
    rows, columns = np.nonzero(yellow[-4 * letter :])
    assert np.ptp(rows) > 0.55 * letter
    assert np.ptp(columns) > 15 * letter


@pytest.mark.parametrize("prompt", ["", "名月を 🚀", "x" * 2048, "line\nbreak\ttab", "\x00\u202e"])
def test_any_text_can_be_drawn(prompt: str) -> None:
    assert opened(paint(replace(WISH, prompt=prompt, negative_prompt=prompt))).size == (256, 256)


@pytest.mark.parametrize(
    "prompt",
    [
        "futuristic spacecraft",
        "a galaxy",
        "rocket over the city at night",
        "neon city by the river",
        "desert dunes",
        "a boat, a cabin and a lighthouse on a snowy mountain lake with birds, pine trees and clouds",
    ],
)
def test_scenes_are_neither_plain_nor_bleached_nor_black(prompt: str) -> None:
    for seed in range(3):
        pixels = np.asarray(opened(paint(replace(WISH, prompt=prompt, seed=seed))), float)
        assert pixels.std() > 15
        assert 10 < pixels.mean() < 215


def test_a_spacecraft_is_in_the_newcomers_first_picture() -> None:
    """Without it, the same sky is left; the difference is as large as a craft of a third of the width."""
    wish = Wish(SDXL, "futuristic spacecraft", seed=42)
    with_it, without = (opened(paint(replace(wish, negative_prompt=text))) for text in ("", "shuttle"))
    changed = np.asarray(ImageChops.difference(with_it, without), int).max(axis=2)[:440] > 24
    columns = np.flatnonzero(changed.sum(axis=0) > 4)
    assert columns.max() - columns.min() > 512 / 3


def test_a_picture_of_512_takes_some_thousand_calls_and_none_for_each_pixel() -> None:
    """Else it would take a minute in place of a third of a second. Counted: a clock would tell of the machine, too."""
    calls = 0

    def count(_frame: object, event: str, _what: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    paint(WISH)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        paint(Wish(SDXL, "futuristic spacecraft", seed=42))
    finally:
        sys.setprofile(before)
    assert calls < 20_000
