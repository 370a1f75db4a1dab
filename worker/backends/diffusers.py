"""The local backend: SDXL on a card of this machine. Pictures cost nothing but time.

The contract and the wiring. `step_engine.py` draws the jobs of all threads together on one thread of its own,
`sdxl.py` knows the model; what takes time beside the card happens here, in the threads that wait: reading images to
start from, encoding pictures, previews, and telling about progress.

Importing this file imports no torch: `load` does.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from shared.catalogue import SIDE
from shared.picture import Unfit, inspect
from shared.settings import CALL_SECONDS, Settings
from worker.backends import previews, provenance
from worker.backends.base import (
    Billed,
    Canceled,
    CannotLoad,
    Capabilities,
    Failure,
    Kind,
    Picture,
    Progress,
    Request,
    one_line,
)
from worker.backends.batch_room import MOST_AT_ONCE, BatchRoom, Size, size_of
from worker.backends.source import Source, source_of
from worker.backends.step_engine import Drawn, News, Row, StepEngine, Stepped

log = logging.getLogger(__name__)

SAMPLER = "Euler"  # as the field calls it
SLACK_SECONDS = 15.0  # for what a job may take beyond its time: the step that runs, decoding, encoding

#: Only one at a time: shared.picture.inspect turns warnings into errors, for the whole process.
_judging = threading.Lock()


class Diffusers:
    """`model`: a folder that save_pretrained made, or a hub id; `revision`: which one (see `model_folder.py`).

    `device`: auto, cuda, mps, cpu. `dtype`: auto (bfloat16 from Ampere on, float16 on older cards and Apple's, float32
    on a CPU), bfloat16, float16, float32. `low_memory`: for cards of 8 GB; each new job costs a second more.
    `compile_sizes`: sizes that are compiled while loading, minutes each. `attempt_seconds`: how long a job may take.
    `stuck_seconds`: a call of the model that takes longer ends the process. `most_at_once`: how many jobs share a call,
    by the pixels of their pictures (see `batch_room.py`). `exit_process`: for tests.
    """

    #: The longest that a job may take, if nobody says otherwise.
    ATTEMPT_SECONDS = CALL_SECONDS["diffusers"]

    name = "diffusers"
    capabilities = Capabilities(
        smallest_side=int(SIDE.minimum),
        largest_side=int(SIDE.maximum),
        side_multiple_of=SIDE.multiple_of or 1,
        most_steps=100,
        seed=True,
        progress=True,
        cancel=True,
        image_to_image=True,
        most_at_once=64,
        hosted=False,
    )

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        *,
        download: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        low_memory: bool = False,
        compile_sizes: Sequence[Size] = (),
        attempt_seconds: float = ATTEMPT_SECONDS,
        stuck_seconds: float = 300.0,
        most_at_once: Mapping[int, int] = MOST_AT_ONCE,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._model = model
        self._compile_sizes = compile_sizes
        self._job_seconds = attempt_seconds
        self._stuck_seconds = stuck_seconds
        self._exit_process = exit_process
        self._room = BatchRoom(most_at_once)
        self._loading: dict[str, Any] = {
            "revision": revision,
            "download": download,
            "device": device,
            "dtype": dtype,
            "low_memory": low_memory,
        }
        self._sdxl: Any = None
        self._revision: str | None = None
        self._engine: StepEngine | None = None

    @property
    def attempt_seconds(self) -> float:
        return self._job_seconds + SLACK_SECONDS

    def load(self) -> None:
        """Read the model, draw one step with it, start the engine. Raises CannotLoad, which says what to do."""
        self._sdxl = _sdxl_loading().load(self._model, **self._loading)
        try:
            self._sdxl.warm_up(self._compile_sizes, self._room)
        except Exception as error:
            problem = f"the first step failed: {type(error).__name__}: {error}"
            raise CannotLoad(one_line(problem)) from error
        self._revision = self._sdxl.folder.revision
        self._engine = StepEngine(
            self._sdxl,
            self._room,
            job_seconds=self._job_seconds,
            stuck_seconds=self._stuck_seconds,
            exit_process=self._exit_process,
        )
        self._engine.start()

    def survey(self) -> list[tuple[str, str]]:
        """What `load` would find and do, as (name, sentence), in seconds. Raises CannotLoad."""
        return list(_sdxl_loading().survey(self._model, **self._loading))

    def health(self) -> str | None:
        return "the model is not loaded" if self._engine is None else self._engine.health()

    def describe(self) -> dict[str, Any]:
        """For an operator: card, memory, model, what shares a call, seconds a step (None until something was drawn)."""
        if self._engine is None:
            raise RuntimeError("describe() comes after load()")
        figures = self._engine.figures()
        sides = (256, 512, 768, 1024, 1536, 2048)
        return {
            "model": self._model,
            **self._sdxl.facts(),
            "most_at_once": {f"{side}x{side}": self._room.cap((side, side)) for side in sides},
            "seconds_per_step": {"{}x{}".format(*size): value for size, value in figures.seconds_per_step.items()},
            "calls": figures.calls,
            "mean_batch": figures.rows / figures.calls if figures.calls else None,
            "largest_batch": figures.largest_batch,
        }

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool] | None:
        admit = self._room.admission(size_of(input) for input in in_hand)
        return lambda input: admit(size_of(input))

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        if len(requests) > self.capabilities.most_at_once:
            raise ValueError(f"at most {self.capabilities.most_at_once} pictures a call")
        if self._engine is None:
            return [Failure(Kind.not_accepted, Billed.no, "the model is not loaded")] * len(requests)
        news: News = SimpleQueue()
        outcomes: dict[int, Picture | Failure] = {}
        rows: dict[int, Row] = {}
        for index, request in enumerate(requests):
            try:
                source = source_of(request)
            except Failure as failure:
                outcomes[index] = failure
                continue
            rows[index] = Row(index, request.input, size_of(request.input), partial(canceled, index), news, source)
        self._engine.submit(list(rows.values()))
        while len(outcomes) < len(requests):
            item = news.get()
            if isinstance(item, Stepped):
                _tell(progress, item)
            else:
                outcomes[item.index] = self._outcome(requests[item.index], rows[item.index].source, item.outcome)
        return [outcomes[index] for index in range(len(requests))]

    def _outcome(self, request: Request, source: Source | None, outcome: Drawn | Failure) -> Picture | Failure:
        if isinstance(outcome, Failure):
            return outcome
        try:
            pixels = outcome.pixels if source is None else source.keep(outcome.pixels)
            data = provenance.png(pixels, request, self.name, self._revision, sampler=SAMPLER)
            request.received(data)
            height, width = pixels.shape[:2]
            return Picture.of(data, "image/png", width, height, outcome.warnings)
        except Exception:  # one job's fault must not be raised: the others have outcomes
            log.exception("%s: a fault in the backend", request.job_id)
            return Failure(Kind.internal, Billed.no, "the backend failed; the fault is ours")

    def judge(self, request: Request, data: bytes) -> Picture:
        try:
            with _judging:
                facts = inspect(data)
        except Unfit as unfit:
            raise Failure(Kind.bad_output, Billed.no, f"the picture is unfit: {unfit}") from None
        return Picture.of(data, facts.content_type, facts.width, facts.height)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._sdxl is not None:
            sdxl, self._sdxl = self._sdxl, None
            free = sdxl.free_memory
            del sdxl
            free()


def local_backend(wanted: Settings) -> Diffusers:
    """The backend that the settings ask for, not loaded."""
    return Diffusers(
        wanted.gpu_model,
        revision=wanted.gpu_revision,
        download=wanted.gpu_download,
        device=wanted.gpu_device,
        dtype=wanted.gpu_dtype,
        low_memory=wanted.gpu_low_memory,
        compile_sizes=wanted.gpu_compile,
        attempt_seconds=wanted.call_seconds(Diffusers.name),
    )


def _sdxl_loading() -> Any:
    """The module that reads torch. Raises CannotLoad where that is not installed."""
    try:
        from worker.backends import sdxl_loading
    except ImportError as error:
        missing = error.name or one_line(str(error))
        raise CannotLoad(f"{missing} is missing: install requirements-gpu.lock (docs/gpu.md)") from None
    return sdxl_loading


def _tell(progress: Progress, news: Stepped) -> None:
    preview = None
    if news.glimpse is not None:
        try:
            preview = previews.jpeg(news.glimpse)
        except Exception:  # a glimpse is not worth a picture
            log.warning("no preview", exc_info=True)
    try:
        progress(news.index, news.step, news.steps, preview)
    except Exception:  # nor is news of it
        log.warning("nobody could be told of the progress", exc_info=True)
