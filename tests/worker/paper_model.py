"""A model that draws nothing: what the step engine does, without torch, and with every trouble on demand."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from worker.backends.base import Failure, PictureWarning
from worker.backends.batch_room import BatchRoom, Size, size_of
from worker.backends.source import Source
from worker.backends.step_engine import Drawn, Ended, News, Row, StepEngine, Stepped, Trouble

SECONDS = 60.0  # that a test waits for what should come at once


class OutOfMemory(Exception): ...


class Poisoned(Exception): ...


@dataclass
class Sheet:
    name: str
    size: Size
    steps: int
    step: int = 0
    warnings: tuple[PictureWarning, ...] = ()


class PaperModel:
    """`calls`: the names of the jobs in each call. `before_step`: may raise, wait, or change the world."""

    def __init__(self, before_step: Callable[[list[str]], None] = lambda names: None) -> None:
        self.calls: list[list[str]] = []
        self.freed = 0
        self.frugal: set[Size] = set()
        self.before_step = before_step
        self.before_begin: Callable[[str], None] = lambda name: None
        self.before_finish: Callable[[str], None] = lambda name: None

    def begin(self, input: Mapping[str, Any], source: Source | None) -> Sheet:
        """From an image it takes half of the steps."""
        self.before_begin(input["prompt"])
        return Sheet(input["prompt"], size_of(input), input["num_steps"] // (1 if source is None else 2))

    def step(self, canvases: Sequence[Sheet]) -> None:
        assert len({sheet.size for sheet in canvases}) == 1
        names = [sheet.name for sheet in canvases]
        self.before_step(names)
        self.calls.append(names)
        for sheet in canvases:
            sheet.step += 1

    def finish(self, canvas: Sheet) -> str:
        self.before_finish(canvas.name)
        return f"picture of {canvas.name}"

    def glimpse(self, canvas: Sheet) -> str:
        return f"glimpse of {canvas.name} at {canvas.step}"

    def trouble(self, error: Exception) -> Trouble:
        return {OutOfMemory: Trouble.out_of_memory, Poisoned: Trouble.poisoned}.get(type(error), Trouble.fault)

    def free_memory(self) -> None:
        self.freed += 1

    def save_memory(self, size: Size) -> bool:
        is_new = size not in self.frugal
        self.frugal.add(size)
        return is_new


class Bench:
    """An engine with a paper model. `clock`: seconds, set by the test. `exits`: what the process would end with."""

    def __init__(
        self, model: PaperModel, most_at_once: Mapping[int, int] | None = None, stuck_seconds: float = 1000.0
    ) -> None:
        self.model = model
        self.clock = 0.0
        self.exits: SimpleQueue[int] = SimpleQueue()
        self.room = BatchRoom(most_at_once or {512 * 512: 4})
        self.news: News = SimpleQueue()
        self.steps: list[Stepped] = []
        self._submitted = 0
        self.engine = StepEngine(
            model,
            self.room,
            job_seconds=60.0,
            stuck_seconds=stuck_seconds,
            exit_process=self.exits.put,
            clock=lambda: self.clock,
        )

    def job(
        self,
        name: str,
        steps: int = 3,
        size: Size = (512, 512),
        canceled: Callable[[], bool] = lambda: False,
        *,
        alters: bool = False,
    ) -> Row:
        self._submitted += 1
        input = {"prompt": name, "num_steps": steps, "width": size[0], "height": size[1]}
        source = Source(np.zeros((size[1], size[0], 3), np.uint8), None) if alters else None
        return Row(self._submitted - 1, input, size, canceled, self.news, source)

    def submit(self, *rows: Row) -> None:
        self.engine.submit(rows)

    def draw(self, *rows: Row) -> list[str | Failure]:
        """Submit them to an engine that starts only then; their outcomes, by index."""
        self.submit(*rows)
        self.engine.start()
        return self.outcomes(len(rows))

    def outcomes(self, count: int) -> list[str | Failure]:
        """The next `count` that end, in the order of their indexes."""
        ended: dict[int, str | Failure] = {}
        while len(ended) < count:
            item = self.news.get(timeout=SECONDS)
            if isinstance(item, Ended):
                assert item.index not in ended
                ended[item.index] = item.outcome.pixels if isinstance(item.outcome, Drawn) else item.outcome
            else:
                self.steps.append(item)
        return [ended[index] for index in sorted(ended)]


def gate() -> tuple[Callable[[list[str]], None], threading.Event, threading.Event]:
    """Holds up the first step: (before_step, it is held up, let it go)."""
    reached, go = threading.Event(), threading.Event()

    def before_step(names: list[str]) -> None:
        reached.set()
        assert go.wait(SECONDS)

    return before_step, reached, go
