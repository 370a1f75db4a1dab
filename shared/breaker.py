"""A backend's breaker: while it is open no job of this backend is claimed. Kept in Redis, where all see the same one.

Soft state: what is lost costs a few calls. Its times are those of Redis' own clock, so that nobody's else matters; what
a clock that was set back makes of them is bounded where they are read. `worker/breaker.py` says when it opens and
closes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

import redis
from pydantic import TypeAdapter, ValidationError

#: No pause is longer than this, in seconds, whatever the vendor asks for.
LONGEST_PAUSE = 900.0
#: A probe is given up for dead when its worker has not renewed it for so long, in seconds.
PROBE_SECONDS = 10.0


class State(StrEnum):
    """Whether jobs of the backend are claimed."""

    closed = "closed"  # yes
    open = "open"  # no
    half_open = "half_open"  # one at a time, to see whether the backend is well again


class Reason(StrEnum):
    """Why it is open."""

    failing = "failing"  # the vendor fails, or can't be reached
    rate_limited = "rate_limited"  # the vendor wants to be left alone for a while
    quota_exhausted = "quota_exhausted"  # the account is spent: an operator must mend it
    auth_failed = "auth_failed"  # so must he the key or the address


@dataclass(frozen=True)
class Breaker:
    """What is known of a backend. `turns`: how often it has opened or closed; odd: it is open.

    Open: `until` its pause is over, `probe` is at work, if there is one, and believed until `probe_until`. Closed:
    `recent` are the calls that ended last, + or -, from a failure on, the last failure at `failed_at`; `closed_at` is
    when it closed, if it ever did.

    `alone`: the job that every failing call since `alone_since` was made for, if no other call was made meanwhile.
    """

    turns: int = 0
    reason: Reason | None = None
    until: float = 0.0
    probe: str | None = None
    probe_until: float = 0.0
    recent: str = ""
    failed_at: float = 0.0
    closed_at: float | None = None
    alone: str | None = None
    alone_since: float = 0.0

    @property
    def is_open(self) -> bool:
        return self.turns % 2 == 1

    def open_for(self, now: float) -> float:
        """How long its pause still takes, in seconds; 0 if it is over, or can't be true."""
        left = self.until - now if self.is_open else 0.0
        return left if 0 < left <= LONGEST_PAUSE else 0.0

    def is_probed(self, now: float) -> bool:
        """Whether somebody finds out whether the backend is well again."""
        return self.probe is not None and 0 < self.probe_until - now <= PROBE_SECONDS

    def standing(self, now: float) -> "Standing":
        if not self.is_open:
            return Standing(State.closed, None, None)
        if left := self.open_for(now):
            return Standing(State.open, self.reason, datetime.fromtimestamp(self.until, UTC), left)
        return Standing(State.half_open, self.reason, None)


@dataclass(frozen=True)
class Standing:
    """As it is shown. `until`: when the next call will be tried, if the breaker is open; `open_for`: how many seconds
    were left until then by Redis' clock, when it was read."""

    state: State
    reason: Reason | None
    until: datetime | None
    open_for: float = 0.0


_FORM = TypeAdapter(Breaker)


def key(backend: str) -> str:
    return f"darkroom:breaker:{backend}"


def written(breaker: Breaker) -> bytes:
    return _FORM.dump_json(breaker)


def read(stored: bytes | None) -> Breaker | None:
    """None for nothing, and for what another version wrote."""
    try:
        return None if stored is None else _FORM.validate_json(stored)
    except ValidationError:
        return None


def clock_of_redis(answer: tuple[int, int]) -> float:
    """What TIME answers, in seconds."""
    return answer[0] + answer[1] / 1_000_000


class BreakerBoard:
    """Reads how the breakers stand, for those who show it: the queue, the readiness check, the metrics, the log.

    While Redis is away nothing is known, and nobody waits for it more than once a while.
    """

    PAUSE_SECONDS = 5.0

    def __init__(self, redis: redis.Redis, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._clock = clock
        self._away_until = 0.0

    def read(self, backends: Sequence[str]) -> dict[str, Standing | None]:
        """How the breaker of each of these backends stands; None while that can't be known."""
        if self._clock() < self._away_until:
            return dict.fromkeys(backends)
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.mget([key(backend) for backend in backends])
                pipe.time()
                stored, moment = pipe.execute()
        except (redis.RedisError, OSError):
            self._away_until = self._clock() + self.PAUSE_SECONDS
            return dict.fromkeys(backends)
        now = clock_of_redis(moment)
        return {
            backend: (read(found) or Breaker()).standing(now) for backend, found in zip(backends, stored, strict=True)
        }
