"""How busy a backend is: what waits for it, and who is there to make it."""

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, func, literal_column, select

from shared.present import was_seen
from shared.standing import is_status
from shared.tables import Status, jobs, workers

_QUEUED = select(func.count()).select_from(
    select(literal_column("1"))
    .where(jobs.c.backend == bindparam("of_backend"), is_status(Status.queued))
    .limit(bindparam("at_most"))
    .subquery()
)


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


def queued(connection: Connection, backend: str, at_most: int) -> int:
    """How many jobs wait for a backend; no more than `at_most` are counted."""
    return connection.scalar(_QUEUED, {"of_backend": backend, "at_most": at_most}) or 0
