"""What a picture starts from: upright, opaque, of the size that was asked for; and exact outside of its mask."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worker.backends.base import Failure, Kind, Request
from worker.backends.source import source_of


def png(pixels: np.ndarray, **how: Any) -> bytes:
    with BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG", **how)
        return file.getvalue()


def some_pixels(height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


def request(image: bytes | None, mask: bytes | None = None, width: int = 96, height: int = 64) -> Request:
    return Request("job_1", "a model", {"width": width, "height": height}, image=image, mask=mask)


def test_a_request_without_an_image_starts_from_nothing() -> None:
    assert source_of(request(None)) is None


def test_an_image_of_the_size_that_was_asked_for_is_taken_pixel_for_pixel() -> None:
    source = source_of(request(png(some_pixels())))
    assert source is not None and source.mask is None
    assert np.array_equal(source.image, some_pixels())


def test_what_lies_outside_of_the_mask_is_kept_exactly() -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[10:20, 30:50] = 255
    source = source_of(request(png(some_pixels()), png(mask)))
    assert source is not None
    kept = source.keep(np.full((64, 96, 3), 9, np.uint8))
    assert (kept[10:20, 30:50] == 9).all()
    kept[10:20, 30:50] = some_pixels()[10:20, 30:50]
    assert np.array_equal(kept, some_pixels())


def test_a_photograph_that_lies_on_its_side_is_turned_upright() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: the picture is upright after a quarter turn clockwise
    source = source_of(request(png(some_pixels(96, 64), exif=turned)))
    assert source is not None
    assert np.array_equal(source.image, np.rot90(some_pixels(96, 64), -1))


def test_what_is_see_through_shows_white() -> None:
    clear = np.dstack([some_pixels(), np.zeros((64, 96), np.uint8)])
    source = source_of(request(png(clear)))
    assert source is not None and (source.image == 255).all()


def test_an_image_of_another_shape_is_cut_to_the_one_that_was_asked_for_and_its_mask_with_it() -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 48:144] = 200
    source = source_of(request(png(wide), png(wide[:, :, 0]), width=64, height=64))
    assert source is not None and source.mask is not None
    assert (source.image[:, 10:-10] == 200).all() and source.mask[:, 10:-10].all()


def test_bytes_that_are_no_picture_are_the_requests_fault() -> None:
    with pytest.raises(Failure) as failed:
        source_of(request(b"no picture"))
    assert failed.value.kind is Kind.rejected and not failed.value.asked
