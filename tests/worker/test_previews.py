"""A glimpse of a picture, from its latents."""

import io

import numpy as np
import pytest
from PIL import Image

from worker.backends.previews import jpeg


@pytest.mark.parametrize(
    ("latents", "size"),
    [((4, 32, 32), (32, 32)), ((4, 128, 96), (96, 128)), ((4, 256, 128), (128, 256)), ((4, 200, 400), (256, 128))],
)
def test_a_preview_is_a_small_jpeg(latents: tuple[int, ...], size: tuple[int, int]) -> None:
    data = jpeg(np.random.default_rng(1).normal(size=latents).astype(np.float32))
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("JPEG", size) and len(data) < 40_000


def test_latents_become_the_colours_that_the_matrix_says() -> None:
    latents = np.zeros((4, 16, 16), np.float32)
    assert Image.open(io.BytesIO(jpeg(latents))).getpixel((8, 8)) == pytest.approx((150, 140, 130), abs=3)
    latents[1] = 1.0  # less red than anything
    assert Image.open(io.BytesIO(jpeg(latents))).getpixel((8, 8)) == pytest.approx((90, 135, 140), abs=3)


def test_latents_that_are_no_numbers_are_shown_all_the_same() -> None:
    assert jpeg(np.full((4, 8, 8), np.nan, np.float32)).startswith(b"\xff\xd8\xff")
