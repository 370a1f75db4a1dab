"""Pictures that start from an image: as diffusers' own pipelines alter them, in the steps that all jobs share."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from numpy.typing import NDArray
from PIL import Image

from tests.gpu.conftest import Backends
from tests.gpu.drawing import alter, draw, failure, largest_difference, photo, picture, pixels, request
from tests.gpu.tiny_sdxl import save_tiny_sdxl
from worker.backends.base import Billed, Kind, Request
from worker.backends.diffusers import Diffusers

CLOSE = 2  # of 255, as in test_same_pictures.py

#: The right half, but for a corner. On the grid of the latents, so that a pipeline's mask means the same.
MASK = np.zeros((64, 64), np.bool_)
MASK[:, 32:] = True
MASK[:16, 48:] = False

#: Ten pixels in the middle of a cell, which the grid of the latents alone would not see.
SPECK = np.zeros((64, 64), np.bool_)
SPECK[34:36, 34:39] = True


@pytest.fixture(scope="session")
def pipeline(tiny_sdxl: Path) -> Any:
    return plain(tiny_sdxl)


def plain(folder: Path, dtype: Any = torch.float32) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, add_watermarker=False)


def by_a_pipeline(pipeline: Any, request: Request) -> NDArray[np.int64]:
    wanted, given = request.input, {}
    kind = StableDiffusionXLImg2ImgPipeline
    if request.mask is not None:
        kind = StableDiffusionXLInpaintPipeline
        given = {"mask_image": opened(request.mask), "width": wanted["width"], "height": wanted["height"]}
    altering = kind(**pipeline.components, add_watermarker=False)
    altering.set_progress_bar_config(disable=True)
    [image] = altering(
        wanted["prompt"],
        image=opened(request.image),
        negative_prompt=wanted["negative_prompt"] or None,
        strength=wanted["strength"],
        num_inference_steps=wanted["num_steps"],
        guidance_scale=wanted["guidance"],
        generator=torch.Generator("cpu").manual_seed(wanted["seed"]),
        **given,
    ).images
    return np.asarray(image).astype(int)


def opened(data: bytes | None) -> Image.Image:
    return Image.open(io.BytesIO(data or b""))


MIXED = (
    alter(photo(), num_steps=9),
    alter(photo(seed=8), num_steps=5, strength=0.99, guidance=1.0, seed=2),
    alter(photo(seed=9), num_steps=10, strength=0.3, seed=3, negative_prompt="blurry"),
    alter(photo(seed=10), num_steps=4, strength=1.0, seed=4, guidance=3.0),
    alter(photo(seed=11), num_steps=5, strength=0.2, seed=5, prompt="the sea at night"),
    alter(photo(96, 64), num_steps=6, seed=6),
)


def test_jobs_of_every_kind_in_one_call_are_as_the_pipeline_alters_them(backend: Diffusers, pipeline: Any) -> None:
    outcomes = draw(backend, *MIXED)
    assert largest_difference(outcomes, [by_a_pipeline(pipeline, each) for each in MIXED]) <= CLOSE
    assert backend.describe()["largest_batch"] == 5


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
def test_inside_of_a_mask_a_picture_is_as_the_pipeline_draws_it(
    backend: Diffusers, pipeline: Any, strength: float
) -> None:
    wanted = alter(photo(), MASK, strength=strength, num_steps=6)
    drawn, expected = pixels(draw(backend, wanted)[0]), by_a_pipeline(pipeline, wanted)
    assert abs(drawn - expected)[MASK].max() <= CLOSE


def test_outside_of_a_mask_every_pixel_is_what_was_sent(backend: Diffusers) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)  # no decoder gives this back
    for strength in (0.1, 1.0):
        drawn = pixels(draw(backend, alter(noise, MASK, strength=strength))[0])
        assert np.array_equal(drawn[~MASK], noise[~MASK])
        assert (drawn[MASK] != noise[MASK]).mean() > 0.5


def test_a_mask_finer_than_the_latents_is_followed_to_the_pixel(backend: Diffusers) -> None:
    outcomes = draw(backend, *(alter(photo(), SPECK, prompt=prompt, guidance=20.0) for prompt in ("a fox", "the sea")))
    first, second = (pixels(outcome) for outcome in outcomes)
    assert np.array_equal(first[~SPECK], photo()[~SPECK]) and np.array_equal(second[~SPECK], photo()[~SPECK])
    assert (first[SPECK] != second[SPECK]).mean() > 0.5, "no step has changed anything there"


def test_a_mask_that_lets_nothing_change_gives_back_the_image(backend: Diffusers) -> None:
    [outcome] = draw(backend, alter(photo(), np.zeros((64, 64), np.bool_)))
    assert np.array_equal(pixels(outcome), photo())


def test_the_less_the_strength_the_more_the_image_decides(backend: Diffusers) -> None:
    apart = []
    for strength in (0.01, 0.5, 1.0):
        outcomes = draw(backend, *(alter(photo(seed=seed), strength=strength, num_steps=20) for seed in (1, 2)))
        first, second = (pixels(outcome) for outcome in outcomes)
        apart.append(float(abs(first - second).mean()))
    assert apart == sorted(apart, reverse=True) and apart[0] > 2 * apart[-1], apart


def test_altering_and_drawing_share_each_call_and_change_no_picture(backend: Diffusers) -> None:
    wanted = (
        request(num_steps=6),
        alter(photo(), num_steps=10, seed=2),
        alter(photo(seed=8), MASK, num_steps=12, strength=0.5, seed=3),
        request(num_steps=3, guidance=1.0, seed=4),
    )
    alone = [pixels(draw(backend, each)[0]) for each in wanted]
    calls = backend.describe()["calls"]
    assert largest_difference(draw(backend, *wanted), alone) <= CLOSE
    assert backend.describe()["largest_batch"] == 4 and backend.describe()["calls"] - calls == 6


def test_the_same_job_alone_is_the_same_file_to_the_byte(a_backend: Backends) -> None:
    wanted = alter(photo(), MASK)
    [first], [again], [elsewhere] = (draw(backend, wanted) for backend in [a_backend()] * 2 + [a_backend()])
    assert picture(first).read() == picture(again).read() == picture(elsewhere).read()


@pytest.mark.parametrize(
    ("steps", "strength", "made"), [(10, 1.0, 10), (10, 0.55, 5), (10, 0.01, 1), (1, 0.3, 1), (100, 0.29, 28)]
)
def test_progress_counts_the_steps_that_are_made(backend: Diffusers, steps: int, strength: float, made: int) -> None:
    told: list[tuple[int, int]] = []
    previews: list[bytes] = []

    def progress(_index: int, step: int, steps: int, preview: bytes | None) -> None:
        told.append((step, steps))
        previews.extend([preview] if preview else [])

    backend.generate([alter(photo(), MASK, num_steps=steps, strength=strength)], progress, lambda _: False)
    assert told == [(step, made) for step in range(1, made + 1)]
    assert all(Image.open(io.BytesIO(preview)).size == (8, 8) for preview in previews)
    assert bool(previews) == (made > 1)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_other_schedules_are_followed(tmp_path: Path, a_backend: Backends, spacing: str) -> None:
    """This one leaves a little noise at its end, where the pipeline leaves none outside of a mask."""
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_spacing=spacing, steps_offset=1, final_sigmas_type="sigma_min"
    )
    folder = save_tiny_sdxl(tmp_path / "other", scheduler=scheduler)
    plainly, masked = alter(photo(), num_steps=5), alter(photo(), MASK, num_steps=5, strength=1.0)
    first, second = draw(a_backend(folder), plainly, masked)
    assert largest_difference([first], [by_a_pipeline(plain(folder), plainly)]) <= CLOSE
    assert abs(pixels(second) - by_a_pipeline(plain(folder), masked))[MASK].max() <= CLOSE


def test_a_decoder_with_a_mean_and_a_deviation_is_followed(tmp_path: Path, a_backend: Backends, pipeline: Any) -> None:
    parts = pipeline.vae.config | {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.0, 2.0]}
    torch.manual_seed(1)
    folder = save_tiny_sdxl(tmp_path / "other", vae=AutoencoderKL.from_config(parts))
    wanted = alter(photo(), num_steps=5)
    assert largest_difference(draw(a_backend(folder), wanted), [by_a_pipeline(plain(folder), wanted)]) <= CLOSE


@pytest.mark.filterwarnings("ignore:`upcast_vae`")  # the pipeline's own, of its own
@pytest.mark.parametrize(("dtype", "close"), [("float16", 8), ("bfloat16", 24)])
def test_half_precision_alters_with_the_same_seed(tiny_sdxl: Path, a_backend: Backends, dtype: str, close: int) -> None:
    wanted = alter(photo(72, 72), seed=5), alter(photo(), seed=6, guidance=2.0)
    outcomes = draw(a_backend(dtype=dtype), *wanted)
    same = plain(tiny_sdxl, getattr(torch, dtype))
    assert largest_difference(outcomes, [by_a_pipeline(same, each) for each in wanted]) <= close


def test_with_low_memory_the_picture_is_the_same(a_backend: Backends) -> None:
    wanted = alter(photo(), MASK)
    [usual], [low] = draw(a_backend(), wanted), draw(a_backend(low_memory=True), wanted)
    assert largest_difference([low], [pixels(usual)]) <= CLOSE


# -- Trouble ----------------------------------------------------------------------------------------------------------


def instead_of_encoding(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch, instead: Callable[[Any, Callable[..., Any]], Any]
) -> Any:
    """Call `instead` with the pixels, and with what they would have been given to. The VAE."""
    vae = backend._sdxl._pipeline.vae
    real = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: instead(pixels, real))
    return vae


def test_memory_that_runs_out_while_encoding_is_saved_and_then_the_job_fails_alone(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled: list[bool] = []

    def no_room(pixels: Any, encode: Callable[..., Any]) -> Any:
        tiled.append(vae.use_tiling)
        if pixels.shape[-1] > 64 or not vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    vae = instead_of_encoding(backend, monkeypatch, no_room)
    fits, huge, other = draw(backend, alter(photo()), alter(photo(128, 64)), request())
    assert pixels(fits).any() and pixels(other).any()
    assert (failure(huge).kind, failure(huge).billed) == (Kind.out_of_memory, Billed.no)
    assert "128x64" in failure(huge).message and tiled == [False, True, False, True]


def test_an_encoder_that_fails_in_half_precision_encodes_again_in_single(
    a_backend: Backends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = a_backend(dtype="bfloat16")
    [expected] = draw(backend, alter(photo()))

    def overflows(pixels: Any, encode: Callable[..., Any]) -> Any:
        return encode(pixels if pixels.dtype == torch.float32 else pixels * torch.nan)

    vae = instead_of_encoding(backend, monkeypatch, overflows)
    [outcome] = draw(backend, alter(photo()))
    assert largest_difference([outcome], [pixels(expected)]) <= 24  # float32 is more exact
    assert vae.dtype == torch.bfloat16 and "encoding it again in float32" in caplog.text


def test_an_image_that_is_no_numbers_to_the_model_is_bad_output(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_encoding(backend, monkeypatch, lambda pixels, encode: encode(pixels * torch.nan))
    bad, good = draw(backend, alter(photo()), request())
    assert (failure(bad).kind, failure(bad).billed) == (Kind.bad_output, Billed.no)
    assert "NaN" in failure(bad).message and pixels(good).any()


def test_a_black_image_may_stay_black(backend: Diffusers, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = backend._sdxl._pipeline.vae
    monkeypatch.setattr(vae, "decode", lambda latents, return_dict: (torch.full((1, 3, 64, 64), -1.0),))
    drawn, altered = draw(backend, request(), alter(np.zeros((64, 64, 3), np.uint8)))
    assert failure(drawn).kind == Kind.bad_output and not pixels(altered).any()


def test_an_image_that_cannot_be_read_fails_its_job_alone(backend: Diffusers) -> None:
    bad, good = draw(backend, replace(alter(photo()), image=b"no picture"), request())
    assert (failure(bad).kind, failure(bad).billed) == (Kind.rejected, Billed.no)
    assert "can't be read" in failure(bad).message and pixels(good).any()


def test_a_job_that_is_canceled_before_it_begins_is_not_encoded(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    instead_of_encoding(backend, monkeypatch, lambda pixels, encode: seen.append(1))
    [outcome] = backend.generate([alter(photo())], lambda *_: None, lambda _: True)
    assert failure(outcome).kind == Kind.canceled and not seen
