"""The job object: how a job's row is read for clients, and shown to them."""

from typing import Any

from flask import g, request
from sqlalchemy import Connection, Row, Select, bindparam, func, select, tuple_

from api.errors import not_found
from api.schemas import Image, Job, JobError, Urls, Warning, usd
from shared.ids import is_id
from shared.settings import Settings
from shared.standing import CLAIMABLE
from shared.tables import Billed, Outcome, Status, attempts, jobs

#: How far `queue_position` is counted. Who is behind that many has no use for the exact number.
FARTHEST_POSITION = 1000

#: What the attempts of a job cost, in millionths of a dollar. What is unknown counts in full.
_COST = (
    select(func.coalesce(func.sum(attempts.c.price), 0))
    .where(attempts.c.job_id == jobs.c.id, attempts.c.billed != Billed.no, attempts.c.outcome != Outcome.running)
    .scalar_subquery()
    .label("cost")
)

#: All that is shown of a job, but its place in the queue.
SHOWN: Select[Any] = select(jobs, _COST)


# Built once: on the path of every poll, building a statement costs more than running it.
_READ = SHOWN.where(jobs.c.id == bindparam("job_id"), jobs.c.project_id == bindparam("project"))
_AHEAD = select(func.count()).select_from(
    select(jobs.c.id)
    .where(
        jobs.c.backend == bindparam("of_backend"),
        CLAIMABLE,
        tuple_(jobs.c.rank, jobs.c.id) < tuple_(bindparam("its_rank"), bindparam("its_id")),
    )
    .limit(FARTHEST_POSITION)
    .subquery()
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


def show(row: Row[Any], cost: int, position: int | None, settings: Settings) -> Job:
    """A job's row as clients see it."""
    url = f"{(settings.public_url or request.host_url).rstrip('/')}/v1/jobs/{row.id}"
    return Job(
        id=row.id,
        object="job",
        status=row.status,
        sequence=row.sequence,
        model=row.model,
        backend=row.backend_asked,
        sandbox=row.sandbox,
        input=row.input,
        queue_position=position,
        attempts=row.attempts,
        cost_usd=usd(cost),
        image=_show_image(row, f"{url}/image"),
        error=None if row.error is None else JobError.model_validate(row.error),
        warnings=[Warning.model_validate(warning) for warning in row.warnings],
        metadata=row.metadata,
        retried_from=row.retried_from,
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
        deadline_at=row.deadline_at,
        data_removed=row.data_removed,
        urls=Urls(self=url, image=f"{url}/image", cancel=f"{url}/cancel"),
    )


def _show_image(row: Row[Any], url: str) -> Image | None:
    if row.image_attempt is None:
        return None
    return Image(
        url=url,
        content_type=row.image_content_type,
        width=row.image_width,
        height=row.image_height,
        bytes=row.image_bytes,
        sha256=row.image_sha256,
    )
