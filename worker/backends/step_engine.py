"""One thread owns the card and draws all jobs, one step at a time: jobs come and go between two steps.

Each turn of the engine:

1. Jobs that are canceled or out of time leave.
2. The size of the oldest job goes first, so that no size starves; the oldest jobs of that size, as many as there is
   room for, share one call of the model. Each may be at another step of another number of steps.
3. Jobs that have done their last step are decoded, one at a time, and leave.

This file knows no torch: what the card does is behind `Model`. What goes wrong there, the model sorts (`Trouble`):

- Out of memory: the same step again with half of the jobs, and never more for that size. A job that is alone is drawn
  with less memory, if the model can; then it fails.
- A fault: each job of the call tries alone. The one that fails again fails for good, the others never notice.
- Poisoned: the card takes no more calls from this process. It exits, and the supervisor starts it again.
- A call that takes longer than `stuck_seconds`: the same; it cannot be ended in any other way.

News goes to the queue that a job came with, in order; whoever reads it does what takes time (previews, encoding,
telling others), so that none of it holds up the card.
"""

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, Protocol

from worker.backends.base import Billed, Failure, Kind, PictureWarning
from worker.backends.batch_room import BatchRoom, Size
from worker.backends.source import Source

log = logging.getLogger(__name__)

EXIT_STATUS = 70  # EX_SOFTWARE: the supervisor starts the process again
PREVIEW_SECONDS = 1.0  # between two previews of one job
FIRST_PREVIEW = 0.15  # of the steps; before that there is only noise to see
CLOSE_SECONDS = 30.0  # how long close() waits for the step that runs
RECENT = 50  # steps that the figures look back on


class Trouble(Enum):
    """What an exception of the model means."""

    out_of_memory = "out of memory"
    poisoned = "poisoned"
    fault = "fault"


class Canvas(Protocol):
    """One unfinished picture, as the model keeps it."""

    step: int  # done
    steps: int  # in all
    warnings: tuple[PictureWarning, ...]


class Model(Protocol):
    """What the engine asks of a model, always from its own thread. Each may raise anything; `trouble` sorts it.

    A Failure is the job's outcome as it stands. Nothing has changed when a call raises: it may be made again.
    """

    def begin(self, input: Mapping[str, Any], source: Source | None) -> Any:
        """A Canvas with nothing but noise on it, or with the source under noise; texts and source are encoded."""

    def step(self, canvases: Sequence[Any]) -> None:
        """One step further for all of them, in one call. All are of one size."""

    def finish(self, canvas: Any) -> Any:
        """The pixels."""

    def glimpse(self, canvas: Any) -> Any:
        """What a preview is made from: small, and not on the card."""

    def trouble(self, error: Exception) -> Trouble: ...

    def free_memory(self) -> None:
        """Give back what is not in use."""

    def save_memory(self, size: Size) -> bool:
        """From now on draw this size with less memory, slower. False: that is being done already."""


@dataclass(frozen=True)
class Stepped:
    """News: a step was done. `glimpse` is there when a preview is due."""

    index: int
    step: int
    steps: int
    glimpse: Any | None


class Drawn(NamedTuple):
    """A picture, not encoded yet."""

    pixels: Any
    warnings: tuple[PictureWarning, ...]


@dataclass(frozen=True)
class Ended:
    """News, the last of a job."""

    index: int
    outcome: Drawn | Failure


News = SimpleQueue[Stepped | Ended]


@dataclass(eq=False)
class Row:
    """One job in the engine. `index`: how its news are marked. `canceled`: asked at every step, from the engine.

    `source`: what it starts from; its size is `size`. None: from nothing.
    """

    index: int
    input: Mapping[str, Any]
    size: Size
    canceled: Callable[[], bool]
    news: News
    source: Source | None = None
    deadline: float = 0.0
    canvas: Any = None  # from the first step on
    next_preview: float = 0.0


class Figures(NamedTuple):
    """What the engine did since it started. `seconds_per_step`: of recent calls, by size, however many shared them."""

    calls: int
    rows: int
    largest_batch: int
    seconds_per_step: Mapping[Size, float]


@dataclass
class _Tally:
    calls: int = 0
    rows: int = 0
    largest_batch: int = 0
    seconds: dict[Size, deque[float]] = field(default_factory=dict)


class _Gone(Exception):
    """The engine can't go on. The message says why."""


class StepEngine:
    """`job_seconds`: how long a job may take from submission. `exit_process`: ends it without asking anybody."""

    def __init__(
        self,
        model: Model,
        room: BatchRoom,
        *,
        job_seconds: float,
        stuck_seconds: float,
        exit_process: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._room = room
        self._job_seconds = job_seconds
        self._stuck_seconds = stuck_seconds
        self._exit_process = exit_process
        self._clock = clock
        self._changed = threading.Condition()
        self._rows: list[Row] = []  # in order of arrival
        self._closing = False
        self._ended: str | None = None  # why there is no engine any more
        self._at_work_since: float | None = None
        self._over = threading.Event()
        self._tally = _Tally()
        self._thread = threading.Thread(target=self._run, name="step-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="step-engine-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Take them in; each ends with one `Ended` in its news, whatever happens."""
        with self._changed:
            for row in rows:
                row.deadline = self._clock() + self._job_seconds
            if self._ended is None:
                self._rows += rows
                self._changed.notify()
                return
        for row in rows:
            row.news.put(Ended(row.index, Failure(Kind.not_accepted, Billed.no, self._ended)))

    def health(self) -> str | None:
        """None, or why nothing is drawn any more."""
        return self._ended

    def figures(self) -> Figures:
        tally = self._tally
        seconds = {size: sum(recent) / len(recent) for size, recent in list(tally.seconds.items())}
        return Figures(tally.calls, tally.rows, tally.largest_batch, seconds)

    def close(self) -> None:
        """End after the step that runs now. Jobs that are not done fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=min(self._stuck_seconds, CLOSE_SECONDS))
        self._over.set()

    # -- The engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the engine is closed"
        try:
            while rows := self._wait_for_rows():
                self._turn(rows)
                self._at_work_since = None
        except _Gone as gone:
            reason = str(gone)
        except BaseException:  # whatever it is: nobody else would tell
            log.critical("the engine broke and draws nothing any more", exc_info=True)
            reason = "the engine broke and draws nothing any more"
        self._at_work_since = None
        self._over.set()
        with self._changed:
            self._ended = reason
            rows, self._rows = self._rows, []
        for row in rows:
            row.news.put(Ended(row.index, Failure(Kind.transient, Billed.no, reason)))

    def _wait_for_rows(self) -> list[Row]:
        """All that are in hand, in order of arrival; empty: close."""
        with self._changed:
            while not self._rows and not self._closing:
                self._changed.wait()
            return [] if self._closing else list(self._rows)

    def _turn(self, rows: Sequence[Row]) -> None:
        rows = [row for row in rows if not self._leaves(row)]
        if not rows:
            return
        size = rows[0].size
        chosen = [row for row in rows if row.size == size][: self._room.cap(size)]
        for row in self._step([row for row in chosen if self._has_begun(row)]):
            self._tell(row)
            if row.canvas.step >= row.canvas.steps:
                self._finish(row)

    def _leaves(self, row: Row) -> bool:
        if self._is_canceled(row):
            self._end(row, Failure(Kind.canceled, Billed.no, "canceled"))
        elif self._clock() > row.deadline:
            message = f"the picture was not ready in {self._job_seconds:g} seconds"
            self._end(row, Failure(Kind.transient, Billed.no, message))
        else:
            return False
        return True

    def _has_begun(self, row: Row) -> bool:
        """Encode the texts and the source of a job that is new. False: it failed."""
        if row.canvas is not None:
            return True
        row.canvas = outcome = self._alone(row, partial(self._model.begin, row.input, row.source))
        return self._is_done(row, outcome)

    def _step(self, batch: Sequence[Row]) -> Sequence[Row]:
        """One step for as many as the memory allows, the oldest first; those that did it. What can't be drawn ends."""
        while len(batch) > 1:
            outcome = self._attempt(partial(self._call, batch))
            if outcome is Trouble.fault or isinstance(outcome, Failure):
                # Whose it was shows when each is alone.
                return [row for suspect in batch for row in self._step([suspect])]
            if outcome is not Trouble.out_of_memory:
                return batch
            batch = batch[: (len(batch) + 1) // 2]
            self._room.lower(batch[0].size, len(batch))
            log.warning("out of memory at %dx%d: at most %d at once from now on", *batch[0].size, len(batch))
        return [row for row in batch if self._is_done(row, self._alone(row, partial(self._call, batch)))]

    def _call(self, batch: Sequence[Row]) -> None:
        began = self._clock()
        self._model.step([row.canvas for row in batch])
        self._tally.calls += 1
        self._tally.rows += len(batch)
        self._tally.largest_batch = max(self._tally.largest_batch, len(batch))
        self._tally.seconds.setdefault(batch[0].size, deque(maxlen=RECENT)).append(self._clock() - began)

    def _is_done(self, row: Row, outcome: Any) -> bool:
        if isinstance(outcome, Failure):
            self._end(row, outcome)
            return False
        return True

    def _finish(self, row: Row) -> None:
        if self._leaves(row):
            return
        outcome = self._alone(row, partial(self._model.finish, row.canvas))
        self._end(row, outcome if isinstance(outcome, Failure) else Drawn(outcome, row.canvas.warnings))

    def _tell(self, row: Row) -> None:
        step, steps, now = row.canvas.step, row.canvas.steps, self._clock()
        glimpse = None
        if now >= row.next_preview and step >= FIRST_PREVIEW * steps and step < steps:
            glimpse = self._attempt(partial(self._model.glimpse, row.canvas))
            row.next_preview = now + PREVIEW_SECONDS
        row.news.put(Stepped(row.index, step, steps, None if isinstance(glimpse, Trouble | Failure) else glimpse))

    def _alone(self, row: Row, action: Callable[[], Any]) -> Any:
        """What the action says, or the Failure of the job; it may take less and less memory."""
        while True:
            outcome = self._attempt(action)
            if outcome is Trouble.out_of_memory:
                if self._model.save_memory(row.size):
                    log.warning("out of memory at %dx%d alone: drawing it with less, slower", *row.size)
                    continue
                message = "the card has too little memory for {}x{} pixels".format(*row.size)
                return Failure(Kind.out_of_memory, Billed.no, message)
            if outcome is Trouble.fault:
                return Failure(Kind.internal, Billed.no, "the backend failed; the fault is ours")
            return outcome

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """What the action says, the Failure that it raised, or the Trouble that there was."""
        self._at_work_since = self._clock()
        try:
            return action()
        except Failure as failure:
            return type(failure)(failure.kind, failure.billed, failure.message)  # without its traceback
        except Exception as error:  # noqa: BLE001 - torch raises nearly everything; the model sorts it
            trouble = self._model.trouble(error)
            text = traceback.format_exc()
        # Outside of the except block: the traceback held the tensors that filled the memory.
        if trouble is Trouble.poisoned:
            self._exit("the card takes no more calls from this process", text)
        if trouble is Trouble.out_of_memory:
            self._model.free_memory()
        else:
            log.error("a fault in the model\n%s", text)
        return trouble

    def _is_canceled(self, row: Row) -> bool:
        try:
            return row.canceled()
        except Exception:  # a question that can't be answered must not stop the card
            log.warning("could not ask whether a job is canceled", exc_info=True)
            return False

    def _end(self, row: Row, outcome: Drawn | Failure) -> None:
        with self._changed:
            self._rows.remove(row)
        row.canvas = None
        row.news.put(Ended(row.index, outcome))

    def _exit(self, reason: str, details: str = "") -> NoReturn:
        log.critical("%s: the process exits\n%s", reason, details)
        self._exit_process(EXIT_STATUS)
        raise _Gone(reason)  # where somebody else decides about the process

    # -- The watchdog's thread ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Exit when one call of the model takes too long: a hung kernel hears nothing, and no thread can be ended."""
        while not self._over.wait(min(self._stuck_seconds / 4, 5.0)):
            if self._is_stuck():
                self._ended = f"the card has not moved for {self._stuck_seconds:g} seconds"
                with suppress(_Gone):
                    self._exit(self._ended)
                return

    def _is_stuck(self) -> bool:
        since = self._at_work_since
        return since is not None and self._clock() - since > self._stuck_seconds
