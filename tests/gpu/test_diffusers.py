"""The contract: outcomes, progress, cancellation, time, what may be claimed together."""

import hashlib
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.version import VERSION
from tests.gpu.conftest import Backends
from tests.gpu.drawing import INPUT, alter, draw, failure, photo, picture, pixels, request
from tests.kept import Kept
from worker.backends.base import Backend, Billed, Failure, Kind, Picture, Request
from worker.backends.diffusers import Diffusers
from worker.backends.step_engine import Row

ROOT = Path(__file__).parent.parent.parent


def count_calls(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch, during: Callable[[int], object] = lambda call: None
) -> list[int]:
    """Grows by one number at every call of the UNet: its rows. `during`: called in each call, with its number."""
    rows: list[int] = []
    unet = backend._sdxl._pipeline.unet
    real = unet.forward

    def forward(latents: Any, *arguments: Any, **named: Any) -> Any:
        rows.append(len(latents))
        during(len(rows))
        return real(latents, *arguments, **named)

    monkeypatch.setattr(unet, "forward", forward)
    return rows


def test_importing_the_backend_imports_no_torch() -> None:
    code = "import sys, worker.backends.diffusers; sys.exit(str({'torch', 'diffusers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_a_picture_is_handed_over_as_png_before_anything_else_is_said_of_it(backend: Diffusers) -> None:
    kept = Kept()
    plain = request(width=72, height=96)
    outcome = picture(draw(backend, Request("job_1", "sdxl", plain.input, kept.keep))[0])
    assert kept == [outcome.read()]
    assert outcome.sha256 == hashlib.sha256(outcome.read()).hexdigest()
    image = Image.open(io.BytesIO(outcome.read()))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (72, 96))
    assert (outcome.content_type, outcome.width, outcome.height, outcome.warnings) == ("image/png", 72, 96, ())
    assert backend.judge(plain, outcome.read()) == outcome


def test_a_picture_says_which_job_made_it_from_which_model_and_how(backend: Diffusers) -> None:
    [drawn, altered] = draw(backend, request(negative_prompt="blurry"), alter(photo(), strength=0.5))
    texts = Image.open(io.BytesIO(picture(drawn).read())).info
    assert json.loads(texts["darkroom"]) == {
        "job_id": "job_1",
        "model": "sdxl",
        "revision": backend.describe()["revision"],
        "backend": "diffusers",
        "input": INPUT | {"negative_prompt": "blurry"},
        "version": VERSION,
    }
    fields = "Steps: 4, Sampler: Euler, CFG scale: 7.5, Seed: 1, Size: 64x64, Model: sdxl"
    assert texts["parameters"] == f"a red fox\nNegative prompt: blurry\n{fields}"
    texts = Image.open(io.BytesIO(picture(altered).read())).info
    assert texts["parameters"] == f"a red fox\n{fields}, Denoising strength: 0.5"


def test_bytes_that_are_no_whole_picture_are_judged_so(backend: Diffusers) -> None:
    data = picture(draw(backend, request())[0]).read()
    with pytest.raises(Failure, match="cut short") as raised:
        backend.judge(request(), data[:-20])
    assert (raised.value.kind, raised.value.billed) == (Kind.bad_output, Billed.no)


def test_progress_tells_every_step_of_every_job_in_order(backend: Diffusers) -> None:
    told: list[tuple[int, int, int]] = []
    previews: list[bytes] = []

    def progress(index: int, step: int, steps: int, preview: bytes | None) -> None:
        told.append((index, step, steps))
        previews.extend([preview] if preview else [])

    backend.generate([request(num_steps=7), request(num_steps=3)], progress, lambda _: False)
    assert [news for news in told if news[0] == 0] == [(0, step, 7) for step in range(1, 8)]
    assert [news for news in told if news[0] == 1] == [(1, step, 3) for step in range(1, 4)]
    assert len(previews) >= 2  # each job's first
    for preview in previews:
        image = Image.open(io.BytesIO(preview))
        assert image.format == "JPEG" and image.size == (8, 8)


def test_who_cannot_be_told_of_the_progress_gets_the_picture_all_the_same(
    backend: Diffusers, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ConnectionError("Redis is away")

    [outcome] = backend.generate([request()], broken, lambda _: False)
    assert isinstance(outcome, Picture) and "Redis is away" in caplog.text


def test_a_canceled_job_leaves_within_one_step_and_the_others_stay(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = count_calls(backend, monkeypatch)
    at_cancel: list[int] = []

    def canceled(index: int) -> bool:
        """The second job, from the question after the third call on."""
        if index == 1 and len(rows) >= 3:
            at_cancel.append(len(rows))
            return True
        return False

    stays, leaves = backend.generate([request(num_steps=8), request(num_steps=8, seed=2)], lambda *_: None, canceled)
    picture(stays)
    assert failure(leaves).kind == Kind.canceled and failure(leaves).billed == Billed.no
    assert rows[: at_cancel[0]] == [4] * 3 and rows[at_cancel[0] :] == [2] * 5


def test_a_cancellation_from_elsewhere_lets_at_most_the_running_step_end(
    backend: Diffusers, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, runs = threading.Event(), threading.Event()

    def during(call: int) -> None:
        if call == 3:  # it runs when the flag comes, however long who hears of the second takes
            runs.set()
            assert flag.wait(60)

    rows = count_calls(backend, monkeypatch, during)

    def progress(index: int, step: int, steps: int, preview: bytes | None) -> None:
        if step == 2 and runs.wait(60):
            flag.set()

    [outcome] = backend.generate([request(num_steps=100)], progress, lambda _: flag.is_set())
    assert failure(outcome).message == "canceled"
    assert len(rows) == 3, "a step began after the engine had heard of it"


def test_a_job_out_of_time_ends_within_one_step(a_backend: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = a_backend(attempt_seconds=30)
    assert backend.attempt_seconds > 30
    rows = count_calls(backend, monkeypatch)
    engine = backend._engine
    assert engine is not None
    # Not put back at the end: a watchdog that reads both clocks takes the engine for stuck, and ends this process.
    engine._clock = lambda: 20.0 * len(rows)
    [outcome] = draw(backend, request(num_steps=50))
    assert (failure(outcome).kind, failure(outcome).billed) == (Kind.transient, Billed.no)
    assert failure(outcome).message == "the picture was not ready in 30 seconds" and len(rows) == 2


def test_what_a_prompt_is_too_long_for_is_said(backend: Diffusers) -> None:
    # The tiny model has a token for every letter and reads 75 of them.
    fits, long, both, unguided = draw(
        backend,
        request(prompt="a" * 75),
        request(prompt="a" * 80),
        request(prompt="a" * 76, negative_prompt="b" * 100),
        request(negative_prompt="b" * 100, guidance=1.0),
    )
    assert picture(fits).warnings == picture(unguided).warnings == ()
    assert [(warning.code, warning.message) for warning in picture(long).warnings] == [
        ("prompt_truncated", "the prompt is too long: the model reads 75 tokens, the last 5 were dropped")
    ]
    assert [warning.message for warning in picture(both).warnings] == [
        "the prompt is too long: the model reads 75 tokens, the last 1 were dropped",
        "the negative prompt is too long: the model reads 75 tokens, the last 25 were dropped",
    ]


def test_prompts_stay_out_of_the_log(backend: Diffusers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    draw(backend, request(prompt="a secret " * 40))
    assert "secret" not in caplog.text


def test_what_may_be_claimed_beside_what_is_in_hand(a_backend: Backends) -> None:
    backend = a_backend(most_at_once={64 * 64: 2})
    small, other, third = INPUT, INPUT | {"width": 72}, INPUT | {"width": 80}
    accepts = backend.compatible([small])
    assert accepts is not None
    assert [accepts(input) for input in (small, small, other, third, other)] == [True, False, True, False, False]


def test_many_callers_at_once_share_calls(backend: Diffusers, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = threading.Semaphore(0)

    def during(call: int) -> None:
        if call == 1:  # whoever came first, the others come while it is being drawn
            assert all(submitted.acquire(timeout=60) for _ in range(4))

    rows = count_calls(backend, monkeypatch, during)
    engine = backend._engine
    assert engine is not None
    submit = engine.submit

    def submit_and_say(jobs: Sequence[Row]) -> None:
        submit(jobs)
        submitted.release()

    monkeypatch.setattr(engine, "submit", submit_and_say)
    outcomes: list[Picture | Failure] = []

    def call(seed: int) -> None:
        outcomes.extend(draw(backend, request(seed=seed, num_steps=10)))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({pixels(outcome).tobytes() for outcome in outcomes}) == 4
    assert len(rows) < 40 and sum(rows) == 2 * 40


def test_more_than_it_can_hold_is_a_mistake_of_the_caller(backend: Diffusers) -> None:
    with pytest.raises(ValueError, match="at most 64"):
        draw(backend, *[request()] * 65)


def test_before_and_after_it_is_loaded_nothing_is_accepted(tiny_sdxl: Path) -> None:
    backend: Backend = Diffusers(str(tiny_sdxl), device="cpu")
    for _ in range(2):
        assert backend.health() == "the model is not loaded"
        [outcome] = backend.generate([request()], lambda *_: None, lambda _: False)
        assert isinstance(outcome, Failure) and outcome.kind == Kind.not_accepted
        backend.load()
        assert backend.health() is None
        backend.close()


def test_it_says_what_it_is_and_what_fits(backend: Diffusers, tiny_sdxl: Path) -> None:
    draw(backend, request())
    facts = backend.describe()
    assert facts["model"] == str(tiny_sdxl) and facts["device"] == "cpu" and facts["dtype"] == "float32"
    assert facts["most_at_once"] == {
        "256x256": 8, "512x512": 8, "768x768": 4, "1024x1024": 2, "1536x1536": 1, "2048x2048": 1
    }  # fmt: skip
    assert facts["seconds_per_step"]["64x64"] > 0 and facts["calls"] == 4
