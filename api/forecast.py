"""When it is worth asking for a job again, from what is known of workers and breakers: what Retry-After says."""

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from api.breaker_watch import BreakerWatch
from api.job_object import FARTHEST_POSITION
from shared import routing
from shared.database import AWAY, Database
from shared.load import Present, present
from shared.routing import AUTO
from shared.standing import TERMINAL
from shared.tables import Status

#: Bounds of Retry-After, in seconds, where no breaker is open.
SOONEST, LATEST = 1, 60


class Forecast:
    """A hint, from what was looked up in the last seconds."""

    LOOK_UP_SECONDS = 5.0

    def __init__(self, database: Database, watch: BreakerWatch, backends: Sequence[str], lease_seconds: float) -> None:
        self._database = database
        self._watch = watch
        self._lease_seconds = lease_seconds
        self._known: dict[str, tuple[float, Present]] = {backend: (0.0, Present(0, None)) for backend in backends}

    def retry_after(self, row: Row[Any], position: int | None) -> dict[str, str]:
        """The header Retry-After of an unfinished job, none of an ended one. It does not raise AWAY."""
        if row.status in TERMINAL:
            return {}
        self._watch.ask()
        try:
            known = self._look_up(row.backend)
        except AWAY:
            # The job of a submission is made by now: that nobody knows when to ask for it must not hide it.
            _, known = self._known.get(row.backend, (0.0, Present(0, None)))
        seconds = known.seconds or SOONEST
        if row.status == Status.running:
            # Somewhere in the middle of it.
            return _header(seconds / 2)
        ahead = position or (FARTHEST_POSITION if row.ready else 1)
        turns = ahead / max(known.slots, 1)
        return _header(seconds * math.ceil(turns), max(_pause_of(row), self._open_for(row)))

    def _open_for(self, row: Row[Any]) -> float:
        """In how many seconds a job may be tried: one that may be made elsewhere is moved there meanwhile."""
        able = routing.able(tuple(self._known), row.model, row.input) if row.backend_asked == AUTO else ()
        return min(map(self._watch.open_for, able or (row.backend,)))

    def seconds_for(self, backend: str, jobs: int) -> float:
        """How long its workers need for so many jobs, as far as was known last: once its breaker lets them. Without a
        worker, a minute at least."""
        known = self.known(backend)
        needed = (known.seconds or SOONEST) * math.ceil(jobs / known.slots) if known.slots else LATEST
        return self._watch.open_for(backend) + needed

    def known(self, backend: str) -> Present:
        """As it was looked up last."""
        return self._known[backend][1]

    def look(self) -> None:
        """Look up what `known` and `seconds_for` tell. Call it while no connection is held. Raises AWAY."""
        for backend in self._known:
            self._look_up(backend)

    def _look_up(self, backend: str) -> Present:
        until, known = self._known.get(backend, (0.0, Present(0, None)))
        if time.monotonic() >= until:
            with self._database.read() as connection:
                known = present(connection, backend, self._lease_seconds)
            self._known[backend] = (time.monotonic() + self.LOOK_UP_SECONDS, known)
        return known


def _pause_of(row: Row[Any]) -> float:
    """In how many seconds a job that backs off may be claimed again. By our clock, which is good enough for a hint."""
    return 0.0 if row.ready_at is None else (row.ready_at - datetime.now(UTC)).total_seconds()


def _header(seconds: float, at_least: float = 0.0) -> dict[str, str]:
    return {"Retry-After": str(max(min(max(math.ceil(seconds), SOONEST), LATEST), math.ceil(at_least)))}
