"""Which backend a job of `auto` goes to. Pure: no I/O, no clock, no chance. The API asks at a submission, the sweep
where a job is to move on.

Among the backends that can do the job, each line narrows what the lines above it left over:

1. those whose queue is not full;
2. the well ones: a worker is there, and the breaker is not open. A half-open breaker counts as closed only while
   nothing waits or runs there, so that one job goes to find out: a backend that nobody names would never be tried
   again. If none is well, those with a worker;
3. those where it would begin within ROOM_SECONDS; where there are none, the one where it would begin soonest;
4. the cheapest. Cards of one's own cost nothing;
5. the first in the order of the setting BACKENDS.

The reason is the line that decided, in the words of RoutingReason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

from shared.breaker import Standing, State
from shared.catalogue import MODELS, cost
from shared.load import Present

#: Who begins within so many seconds does not wait: only then the price decides.
ROOM_SECONDS = 10.0
#: What a picture takes where no worker has made one yet.
UNKNOWN_SECONDS = 1.0

#: What stands in a job's `backend_asked` if the choice is ours.
AUTO = "auto"


class RoutingReason(StrEnum):
    """Why a job waits for this backend and not for another."""

    asked = "asked"  # it was named
    only_one = "only_one"  # no other can do it
    breaker_open = "breaker_open"  # the other fails, or asks to be left alone
    no_worker = "no_worker"  # nobody works for the other
    failed_elsewhere = "failed_elsewhere"  # the other has tried, and failed
    has_room = "has_room"  # at the other it would have to wait
    soonest = "soonest"  # it would have to wait anywhere, and here for the shortest time
    cheapest = "cheapest"
    first = "first"  # in the order of the setting


@dataclass(frozen=True)
class Choice:
    backend: str
    reason: RoutingReason


@dataclass(frozen=True)
class Candidate:
    """A backend that can do the job. `price`: millionths of a dollar. `seconds`: what a picture takes, if known."""

    backend: str
    price: int
    breaker: State
    workers: int
    slots: int
    seconds: float | None
    queued: int
    in_hand: int
    full: bool = False

    @property
    def trouble(self) -> RoutingReason | None:
        """What speaks against it; None: it is well."""
        if not self.workers:
            return RoutingReason.no_worker
        idle = self.queued == 0 and self.in_hand == 0
        if self.breaker == State.open or (self.breaker == State.half_open and not idle):
            return RoutingReason.breaker_open
        return None

    @property
    def wait(self) -> float:
        """How long until a job that comes now begins, in seconds: the whole turns of its slots before it."""
        if not self.slots:
            return math.inf
        seconds = UNKNOWN_SECONDS if self.seconds is None else self.seconds
        return seconds * ((self.queued + self.in_hand) // self.slots)


_WORSE = {None: 0, RoutingReason.breaker_open: 1, RoutingReason.no_worker: 2}


def candidate(
    backend: str,
    model: str,
    prices: Mapping[str, Decimal],
    standing: Standing | None,
    present: Present,
    queued: int,
    *,
    full: bool = False,
) -> Candidate:
    """From what is known of a backend. `standing`: None while Redis, which knows, is away: then it counts as closed."""
    return Candidate(
        backend=backend,
        price=cost(backend, model, prices),
        breaker=State.closed if standing is None else standing.state,
        workers=present.workers,
        slots=present.slots,
        seconds=present.seconds,
        queued=queued,
        in_hand=present.in_hand,
        full=full,
    )


def able(backends: Sequence[str], model: str, input: Mapping[str, Any]) -> list[str]:
    """Those of these backends that can do such a job, in their order."""
    if model not in MODELS:
        return []
    can = MODELS[model].alters if input.get("image") is not None else MODELS[model].backends
    return [backend for backend in backends if backend in can]


def choose(candidates: Sequence[Candidate]) -> Choice | None:
    """One of these, which can all do the job and stand in the order of the setting. None if there are none."""
    if not candidates:
        return None
    left, reason = list(candidates), RoutingReason.only_one
    for narrow in (_with_a_place, _well, _with_room, _cheapest, _first):
        fewer, why = narrow(left)
        if len(fewer) < len(left):
            left, reason = fewer, why
    [chosen] = left
    return Choice(chosen.backend, reason)


def _lowest(of: list[Candidate], key: Callable[[Candidate], float]) -> list[Candidate]:
    lowest = min(map(key, of))
    return [each for each in of if key(each) == lowest]


def _with_a_place(of: list[Candidate]) -> tuple[list[Candidate], RoutingReason]:
    return _lowest(of, lambda each: each.full), RoutingReason.has_room


def _well(of: list[Candidate]) -> tuple[list[Candidate], RoutingReason]:
    best = _lowest(of, lambda each: _WORSE[each.trouble])
    others = (each.trouble for each in of if each not in best)
    return best, next((trouble for trouble in others if trouble is not None), RoutingReason.first)


def _with_room(of: list[Candidate]) -> tuple[list[Candidate], RoutingReason]:
    roomy = [each for each in of if each.wait <= ROOM_SECONDS]
    return (roomy, RoutingReason.has_room) if roomy else (_lowest(of, lambda each: each.wait), RoutingReason.soonest)


def _cheapest(of: list[Candidate]) -> tuple[list[Candidate], RoutingReason]:
    return _lowest(of, lambda each: each.price), RoutingReason.cheapest


def _first(of: list[Candidate]) -> tuple[list[Candidate], RoutingReason]:
    return of[:1], RoutingReason.first
