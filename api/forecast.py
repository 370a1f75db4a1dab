"""When it is worth asking for a job again, from what is known of the workers: what Retry-After says."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, select

from api.job_object import FARTHEST_POSITION
from shared.database import Database
from shared.present import was_seen
from shared.standing import TERMINAL
from shared.tables import Status, workers

#: Bounds of Retry-After, in seconds.
SOONEST, LATEST = 1, 60


@dataclass(frozen=True)
class Present:
    """The workers of a backend that are there and not stuck, and what a picture takes them (None: not known yet).

    `stuck`: those that are there beside them and make no progress, as their rows say.
    """

    slots: int
    seconds: float | None
    workers: int = 0
    in_hand: int = 0
    stuck: int = 0


def present(connection: Connection, backend: str, lease_seconds: float) -> Present:
    """A worker whose heartbeat was not seen for a lease, four beats, does not count as being there.

    `backend`: or what else workers do, as their rows say it.
    """
    well = workers.c.trouble.is_(None)
    query = select(
        func.sum(workers.c.slots).filter(well),
        func.avg(workers.c.seconds).filter(well),
        func.count().filter(well),
        func.sum(workers.c.in_hand),
        func.count().filter(~well),
    )
    row = connection.execute(query.where(workers.c.backend == backend, was_seen(lease_seconds))).one()
    seconds = None if row[1] is None else float(row[1])
    return Present(int(row[0] or 0), seconds, int(row[2]), int(row[3] or 0), int(row[4]))


class Forecast:
    """A hint, from what was looked up in the last seconds."""

    LOOK_UP_SECONDS = 5.0

    def __init__(self, database: Database, backends: Sequence[str], lease_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._known: dict[str, tuple[float, Present]] = {backend: (0.0, Present(0, None)) for backend in backends}

    def retry_after(self, row: Row[Any], position: int | None) -> dict[str, str]:
        """The header Retry-After of an unfinished job, none of an ended one."""
        if row.status in TERMINAL:
            return {}
        known = self._look_up(row.backend)
        seconds = known.seconds or SOONEST
        if row.status == Status.running:
            # Somewhere in the middle of it.
            return _header(seconds / 2)
        ahead = position or (FARTHEST_POSITION if row.ready else 1)
        turns = ahead / max(known.slots, 1)
        return _header(seconds * math.ceil(turns))

    def seconds_for(self, backend: str, jobs: int) -> float:
        """How long its workers need for so many jobs, as far as was known last. Without a worker, a minute at least."""
        known = self._known[backend][1]
        if not known.slots:
            return LATEST
        return (known.seconds or SOONEST) * math.ceil(jobs / known.slots)

    def look(self) -> None:
        """Look up what `seconds_for` tells. Call it while no connection is held. Raises AWAY."""
        for backend in self._known:
            self._look_up(backend)

    def _look_up(self, backend: str) -> Present:
        until, known = self._known.get(backend, (0.0, Present(0, None)))
        if time.monotonic() >= until:
            with self._database.read() as connection:
                known = present(connection, backend, self._lease_seconds)
            self._known[backend] = (time.monotonic() + self.LOOK_UP_SECONDS, known)
        return known


def _header(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(min(max(math.ceil(seconds), SOONEST), LATEST))}
