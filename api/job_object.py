"""How a job's row is read for the client who asks, and shown to it."""

from typing import Any

from flask import g, request
from sqlalchemy import BigInteger, Connection, Row, String, bindparam, func, or_, select, tuple_

from api.errors import not_found
from shared.ids import is_id
from shared.job_object import SHOWN, Job, job_object
from shared.progress import Progress
from shared.settings import Settings
from shared.standing import ATTEMPT_RUNS, CLAIMABLE
from shared.tables import Billed, Status, attempts, jobs

#: How far `queue_position` is counted. Who is behind that many has no use for the exact number.
FARTHEST_POSITION = 1000

# Built once: on the path of every poll, building a statement costs more than running it.
_READ = SHOWN.where(jobs.c.id == bindparam("job_id"), jobs.c.project_id == bindparam("project"))
_PLACE = tuple_(bindparam("its_rank", type_=BigInteger), bindparam("its_id", type_=String))
_AHEAD = select(func.count()).select_from(
    select(jobs.c.id)
    .where(
        jobs.c.backend == bindparam("of_backend"),
        CLAIMABLE,
        tuple_(jobs.c.rank, jobs.c.id) < _PLACE,
    )
    # The order keeps PostgreSQL to the queue's index: it expects as many rows soon, and would walk the table for them.
    # Backwards: from a job far behind, it never comes to the head, where the entries of what was claimed may still lie.
    .order_by(jobs.c.rank.desc(), jobs.c.id.desc())
    .limit(FARTHEST_POSITION)
    .subquery()
)

_UNSETTLED = (
    select(attempts.c.number)
    .where(attempts.c.job_id == bindparam("its_id"), attempts.c.number <= bindparam("over"))
    .where(or_(ATTEMPT_RUNS, attempts.c.billed == Billed.unknown))
    .limit(1)
)


def read_job(connection: Connection, job_id: str) -> Row[Any] | None:
    """The caller's job of this id; None if there is none. Refuses what has not even the shape of an id."""
    if not is_id("job", job_id):
        raise not_found()
    return connection.execute(_READ, {"job_id": job_id, "project": g.project_id}).one_or_none()


def queue_position(connection: Connection, row: Row[Any]) -> int | None:
    """1 for the job that is claimed next. None if it is not waiting to be claimed, or too far behind to count."""
    if row.status != Status.queued or not row.ready:
        return None
    its = {"of_backend": row.backend, "its_rank": row.rank, "its_id": row.id}
    count: int = connection.scalar(_AHEAD, its) or 0
    return count + 1 if count < FARTHEST_POSITION else None


def is_settled(connection: Connection, row: Row[Any]) -> bool:
    """Whether what it has cost so far stays what it is: of no call before the one that runs is the bill still open."""
    over = row.attempts - (row.status == Status.running)
    if not over:
        return True  # most polls: there is nothing to look for
    return connection.execute(_UNSETTLED, {"its_id": row.id, "over": over}).first() is None


def show(row: Row[Any], cost: int, position: int | None, settings: Settings, progress: Progress | None = None) -> Job:
    """A job's row as clients see it."""
    return job_object(row, cost, position, settings.public_url or request.host_url, progress)
