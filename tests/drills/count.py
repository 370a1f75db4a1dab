"""What a drill counted, what every drill promises of it, and how it is shown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.figures import percentile
from tests.drills.systems import Books


@dataclass(frozen=True)
class Count:
    """Times in seconds. `calls` are counted by the vendor's stand-in; `broken`: promises of this drill alone."""

    accepted: int
    refused: int
    ended: int
    succeeded: int
    lost: int
    ended_twice: int
    images: int
    calls: int
    in_flight: int
    books: Books | None
    faults: int
    recovery: float
    answers: tuple[float, ...]
    broken: tuple[str, ...]
    notes: tuple[str, ...]
    spoilt: int = 0  # calls that the vendor answers with no picture
    unbooked: int = 0  # calls that stand in no attempt of their job
    in_hand: float = math.nan  # from a worker's kill until what it had in its hands has ended, worst
    uncalled: int = 0  # claims that may have led to no call
    doomed: int = 0  # jobs that are to fail

    @property
    def beyond(self) -> int:
        """Calls beyond images: pictures that were paid for in vain."""
        return self.calls - self.images

    @property
    def answer(self) -> float:
        """What a submission took until it was accepted, p99."""
        return percentile(self.answers, 99)

    def broken_promises(self) -> list[str]:
        """Of every drill, and of this one."""
        promises = {
            "every job that was accepted ends": self.lost == 0,
            "and succeeds": self.succeeded == self.ended - self.doomed,
            "with its picture": self.images == self.succeeded,
            "once": self.ended_twice == 0,
            "every submission is accepted in the end": self.refused == 0,
            "no more calls beyond images than were in flight at the faults": self.beyond
            <= self.in_flight + self.spoilt,
        }
        if self.books is not None:
            promises["every call stands in the books, at its job"] = self.unbooked == 0
            promises["no more unknown attempts than calls in flight at the faults"] = (
                self.books.unknown <= self.in_flight + self.uncalled
            )
        return [promise for promise, holds in promises.items() if not holds] + list(self.broken)


def _seconds(value: float) -> str:
    return "never" if value == math.inf else "-" if math.isnan(value) else f"{value:.1f}"


ROWS: dict[str, Callable[[Count], str]] = {
    "jobs accepted": lambda count: f"{count.accepted:,}",
    "  ended": lambda count: f"{count.ended:,}",
    "  succeeded": lambda count: f"{count.succeeded:,}",
    "  lost": lambda count: f"{count.lost:,}",
    "images": lambda count: f"{count.images:,}",
    "vendor calls, by its stand-in": lambda count: f"{count.calls:,}",
    "  beyond images": lambda count: f"{count.beyond:,}",
    "  in flight at the faults": lambda count: f"{count.in_flight:,}",
    "  answered with no picture": lambda count: f"{count.spoilt:,}",
    "attempts `unknown`": lambda count: "-" if count.books is None else f"{count.books.unknown:,}",
    "faults": lambda count: f"{count.faults:,}",
    "seconds to recover, worst": lambda count: _seconds(count.recovery),
    "  from a kill, what was in hand": lambda count: _seconds(count.in_hand),
    "seconds to accept a job, p99": lambda count: f"{count.answer:.2f}",
    "promises broken": lambda count: f"{len(count.broken_promises()):,}",
}


def table(titles: Sequence[str], counts: Sequence[Count]) -> str:
    """A column a system, and what is to be said about each below it."""
    lines = [("", *titles)] + [(title, *map(show, counts)) for title, show in ROWS.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles) + 1)]
    shown = [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    for title, count in zip(titles, counts, strict=True):
        shown += [f"{title}, broken: {promise}" for promise in count.broken_promises()]
        shown += [f"{title}: {note}" for note in count.notes]
    return "\n".join(shown)
