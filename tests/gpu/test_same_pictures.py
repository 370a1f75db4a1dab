"""The engine draws what the plain pipeline draws, whatever else it draws at the same time."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray

from tests.gpu.conftest import Backends
from tests.gpu.drawing import draw, largest_difference, picture, pixels, request
from worker.backends.base import Failure, Picture, Request
from worker.backends.diffusers import Diffusers

CLOSE = 2  # of 255: sums of floats come out a little different in a batch of another size


@pytest.fixture(scope="session")
def pipeline(tiny_sdxl: Path) -> Any:
    return plain(tiny_sdxl)


def plain(folder: Path, dtype: Any = torch.float32) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_the_pipeline(pipeline: Any, request: Request) -> NDArray[np.int64]:
    wanted = request.input
    [image] = pipeline(
        wanted["prompt"],
        negative_prompt=wanted["negative_prompt"] or None,
        width=wanted["width"],
        height=wanted["height"],
        num_inference_steps=wanted["num_steps"],
        guidance_scale=wanted["guidance"],
        generator=torch.Generator("cpu").manual_seed(wanted["seed"]),
    ).images
    return np.asarray(image).astype(int)


MIXED = (
    request(seed=1, num_steps=9),
    request(seed=2, num_steps=3, guidance=3.0, negative_prompt="blurry"),
    request(seed=3, num_steps=6, guidance=12.0, prompt="the sea at night"),
    request(seed=4, num_steps=5, guidance=1.0),
    request(seed=5, num_steps=7, guidance=0.0, negative_prompt="not looked at"),
    request(seed=6, num_steps=4, negative_prompt=""),
    request(seed=7, num_steps=20, width=96),
    request(seed=8, num_steps=4, width=96, guidance=2.0, prompt="late " * 40),
)


def test_jobs_of_every_kind_in_one_call_are_as_the_pipeline_draws_them(backend: Diffusers, pipeline: Any) -> None:
    outcomes = draw(backend, *MIXED)
    assert largest_difference(outcomes, [by_the_pipeline(pipeline, each) for each in MIXED]) <= CLOSE
    assert backend.describe()["largest_batch"] == 6


def test_jobs_that_join_and_leave_change_no_picture(a_backend: Backends, pipeline: Any) -> None:
    """Six callers, each beginning when the one before has seen its first step, with room for two at once."""
    backend = a_backend(most_at_once={64 * 64: 2})
    wanted = MIXED[:6]
    outcomes: dict[int, Picture | Failure] = {}
    begun = [threading.Event() for _ in wanted]

    def call(index: int) -> None:
        def progress(*_: object) -> None:
            begun[index].set()

        [outcomes[index]] = backend.generate([wanted[index]], progress, lambda _: False)
        begun[index].set()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(wanted))]
    for thread, event in zip(threads, begun, strict=True):
        thread.start()
        assert event.wait(60)
    for thread in threads:
        thread.join(60)
    expected = [by_the_pipeline(pipeline, each) for each in wanted]
    assert largest_difference([outcomes[index] for index in range(len(wanted))], expected) <= CLOSE
    assert backend.describe()["largest_batch"] <= 2


def test_the_same_job_alone_is_the_same_file_to_the_byte(a_backend: Backends) -> None:
    [first], [again], [elsewhere] = (draw(backend, request()) for backend in [a_backend()] * 2 + [a_backend()])
    assert picture(first).read() == picture(again).read() == picture(elsewhere).read()


def test_another_seed_is_another_picture(backend: Diffusers) -> None:
    first, second = draw(backend, request(seed=1), request(seed=2))
    assert (pixels(first) != pixels(second)).mean() > 0.5


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_models_that_predict_something_else_are_followed(
    tmp_path: Path, a_backend: Backends, prediction: str, spacing: str
) -> None:
    from diffusers import EulerDiscreteScheduler

    from tests.gpu.tiny_sdxl import save_tiny_sdxl

    scheduler = EulerDiscreteScheduler(prediction_type=prediction, timestep_spacing=spacing, steps_offset=1)
    folder = save_tiny_sdxl(tmp_path / "other", scheduler=scheduler)
    wanted = request(seed=3), request(seed=4, num_steps=3)
    outcomes = draw(a_backend(folder), *wanted)
    assert largest_difference(outcomes, [by_the_pipeline(plain(folder), each) for each in wanted]) <= CLOSE


@pytest.mark.filterwarnings("ignore:`upcast_vae`")  # the pipeline's own, of its own
@pytest.mark.parametrize(("dtype", "close"), [("float16", 4), ("bfloat16", 16)])
def test_half_precision_draws_the_same_seed(tiny_sdxl: Path, a_backend: Backends, dtype: str, close: int) -> None:
    """Less exact, but the same picture. At 72x72 the noise of a seed depends on its type."""
    wanted = request(seed=5, width=72, height=72), request(seed=6, guidance=2.0)
    outcomes = draw(a_backend(dtype=dtype), *wanted)
    same = plain(tiny_sdxl, getattr(torch, dtype))
    assert largest_difference(outcomes, [by_the_pipeline(same, each) for each in wanted]) <= close


def test_with_low_memory_the_picture_is_the_same(a_backend: Backends) -> None:
    [usual], [low] = draw(a_backend(), request()), draw(a_backend(low_memory=True), request())
    assert largest_difference([low], [pixels(usual)]) <= CLOSE
