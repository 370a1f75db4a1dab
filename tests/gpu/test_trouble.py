"""A card that fails, simulated at the model's own parts: what is lost, and what never is.

What the engine does about it in each order of events, `tests/worker/test_step_engine.py` shows; here it is shown that
the real exceptions and the real numbers are told apart.
"""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from tests.gpu.conftest import Backends
from tests.gpu.drawing import draw, failure, largest_difference, picture, pixels, request
from worker.backends.base import Billed, Kind
from worker.backends.diffusers import Diffusers

SECONDS = 60.0  # that a test waits for what should come at once
Before = Callable[..., None]


def parts(backend: Diffusers) -> Any:
    return backend._sdxl._pipeline


def before_unet(backend: Diffusers, monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], None]) -> None:
    """Call `before` with the latents of every call of the UNet."""
    unet = parts(backend).unet
    real = unet.forward

    def forward(latents: Any, *arguments: Any, **named: Any) -> Any:
        before(latents)
        return real(latents, *arguments, **named)

    monkeypatch.setattr(unet, "forward", forward)


def test_out_of_memory_halves_the_batch_for_good_and_costs_no_picture(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [request(seed=seed, num_steps=3 + seed) for seed in range(3)]
    expected = [pixels(draw(backend, each)[0]) for each in wanted]
    sizes = []

    def room_for_two(latents: Any) -> None:
        sizes.append(len(latents) // 2)  # with guidance, two rows a job
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    before_unet(backend, monkeypatch, room_for_two)
    assert largest_difference(draw(backend, *wanted), expected) <= 2
    assert sizes[:2] == [3, 2] and 3 not in sizes[1:]
    assert backend.describe()["most_at_once"]["256x256"] == 8  # another size is not concerned
    sizes.clear()
    assert largest_difference(draw(backend, *wanted), expected) <= 2
    assert max(sizes) == 2
    accepts = backend.compatible([wanted[0].input])
    assert accepts is not None and [accepts(each.input) for each in wanted[1:]] == [True, False]


def test_out_of_memory_alone_draws_row_by_row_and_decodes_in_tiles(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    [usual] = draw(backend, request())

    def room_for_one_row(latents: Any) -> None:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    before_unet(backend, monkeypatch, room_for_one_row)
    assert largest_difference(draw(backend, request()), [pixels(usual)]) <= 2
    assert parts(backend).vae.use_tiling
    draw(backend, request(width=72))
    draw(backend, request(width=72, guidance=1.0))


def test_out_of_memory_for_good_fails_the_job_and_no_other(backend: Diffusers, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room_for_wide_ones(latents: Any) -> None:
        if latents.shape[-1] > 8:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    before_unet(backend, monkeypatch, no_room_for_wide_ones)
    fits, huge = draw(backend, request(), request(width=128))
    picture(fits)
    assert (failure(huge).kind, failure(huge).billed) == (Kind.out_of_memory, Billed.no)
    assert "128x64" in failure(huge).message
    assert backend.health() is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])  # -1 is black
def test_a_decoder_that_fails_in_half_precision_decodes_again_in_single(
    a_backend: Backends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: float
) -> None:
    backend = a_backend(dtype="bfloat16")
    [expected] = draw(backend, request())
    vae = parts(backend).vae
    real = vae.decode

    def overflows(latents: Any, return_dict: bool = True) -> Any:
        image = real(latents, return_dict=return_dict)[0]
        return (image if latents.dtype == torch.float32 else torch.full_like(image, bad),)

    monkeypatch.setattr(vae, "decode", overflows)
    [outcome] = draw(backend, request())
    assert largest_difference([outcome], [pixels(expected)]) <= 16  # float32 is more exact
    assert vae.dtype == torch.bfloat16 and "decoding it again in float32" in caplog.text


def test_a_picture_that_stays_black_is_bad_output(backend: Diffusers, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = parts(backend).vae
    monkeypatch.setattr(vae, "decode", lambda latents, return_dict: (torch.full((1, 3, 64, 64), -1.0),))
    [outcome] = draw(backend, request())
    assert (failure(outcome).kind, failure(outcome).billed) == (Kind.bad_output, Billed.no)
    assert "black" in failure(outcome).message


def test_numbers_that_are_none_are_bad_output_and_spoil_no_other_picture(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = request(seed=1), request(seed=2)
    expected = [pixels(outcome) for outcome in draw(backend, first)]
    unet = parts(backend).unet
    real = unet.forward

    def spoils_the_second(latents: Any, *arguments: Any, **named: Any) -> Any:
        [noise] = real(latents, *arguments, **named)
        noise[len(noise) // 2 - 1] = torch.nan
        return (noise,)

    monkeypatch.setattr(unet, "forward", spoils_the_second)
    good, bad = draw(backend, first, second)
    assert largest_difference([good], expected) <= 2
    assert failure(bad).kind == Kind.bad_output and "NaN" in failure(bad).message


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
    ids=["accelerator", "assert", "cudnn"],
)
def test_a_poisoned_card_ends_the_process(
    a_backend: Backends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    exits: SimpleQueue[int] = SimpleQueue()
    backend = a_backend(exit_process=exits.put)

    def poisoned(latents: Any) -> None:
        raise error

    before_unet(backend, monkeypatch, poisoned)
    [outcome] = draw(backend, request())
    assert exits.get(timeout=SECONDS) == 70
    assert failure(outcome).kind == Kind.transient and backend.health() is not None
    assert any(record.levelno == logging.CRITICAL and str(error) in record.getMessage() for record in caplog.records)


def test_a_hung_kernel_ends_the_process(a_backend: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: SimpleQueue[int] = SimpleQueue()
    backend = a_backend(exit_process=exits.put, stuck_seconds=0.5)
    go = threading.Event()
    before_unet(backend, monkeypatch, lambda latents: [go.wait(SECONDS)].clear())
    waiting = threading.Thread(target=draw, args=(backend, request()))
    waiting.start()
    assert exits.get(timeout=SECONDS) == 70
    assert "has not moved" in str(backend.health())
    go.set()
    waiting.join(SECONDS)


def test_a_fault_of_ours_fails_its_job_alone(backend: Diffusers, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = draw(backend, request(), request(seed="not a number"))
    picture(good)
    assert (failure(bad).kind, failure(bad).billed) == (Kind.internal, Billed.no)
    assert "ValueError" in caplog.text and backend.health() is None


def test_a_size_that_the_model_cannot_draw_is_rejected(backend: Diffusers) -> None:
    [outcome] = draw(backend, request(width=260))
    assert failure(outcome).kind == Kind.rejected and "multiples of 8, not 260x64" in failure(outcome).message
