"""The job object: a job as clients see it, in answers, in streams and in webhooks."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainSerializer, WithJsonSchema
from sqlalchemy import Row, Select, func, select

from shared.progress import Progress
from shared.routing import RoutingReason
from shared.tables import Billed, Outcome, Status, attempts, jobs

#: What the attempts of a job cost, in millionths of a dollar. What is unknown counts in full.
_COST = (
    select(func.coalesce(func.sum(attempts.c.price), 0))
    .where(attempts.c.job_id == jobs.c.id, attempts.c.billed != Billed.no, attempts.c.outcome != Outcome.running)
    .scalar_subquery()
    .label("cost")
)

#: All that is shown of a job, but its place in the queue.
SHOWN: Select[Any] = select(jobs, _COST)


def rfc3339(moment: datetime) -> str:
    """As every time leaves this service: UTC, with milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Moment = Annotated[
    datetime, PlainSerializer(rfc3339, return_type=str), WithJsonSchema({"type": "string", "format": "date-time"})
]


def usd(millionths: int) -> str:
    """An amount of US dollars as a decimal string: `0.008`."""
    return f"{Decimal(millionths) / 1_000_000:f}"


class Image(BaseModel):
    url: str
    content_type: str
    width: int
    height: int
    bytes: int
    sha256: str


class JobError(BaseModel):
    code: str = Field(description="one of the codes of a job's errors, see docs/errors.md")
    message: str
    retryable: bool
    billed: Billed


class Warning(BaseModel):
    code: str
    message: str


class Urls(BaseModel):
    self: str
    image: str
    cancel: str


class Routing(BaseModel):
    """One choice of the backend that a job waits for."""

    backend: str
    reason: RoutingReason = Field(
        description="`asked`: it was named. `only_one`: no other can do it. `breaker_open`, `no_worker`, "
        "`failed_elsewhere`: what is the matter with the other one. `has_room`: at the other it would have to wait; "
        "`soonest`: so it would anywhere, and here for the shortest time. `cheapest`; `first`: in the operator's order"
    )
    at: Moment


class Job(BaseModel):
    """One request for one image, and everything that becomes of it."""

    id: str
    object: Literal["job"]
    status: Status
    sequence: int = Field(description="grows by one at every event of the job")
    model: str
    backend: str = Field(description="as asked for; `routing` tells who it waits for, the attempts who tried")
    routing: list[Routing] = Field(
        description="the choices of its backend, the latest last: more than one if it was moved on, which happens to "
        "jobs of `auto` alone, while they wait"
    )
    sandbox: bool
    input: dict[str, Any] = Field(
        description="as submitted, with defaults filled in and the seed that is used. A seed means the same image on "
        "the same backend only. Of `image` and `mask` there is what they are: content_type, width, height, bytes, "
        "sha256, and `job` where it was a job's"
    )
    queue_position: int | None = Field(
        description="a hint: 1 is claimed next; null if it does not wait to be claimed or is far behind, in lists, "
        "and in the answer to a submission that did not wait"
    )
    progress: Progress | None = Field(
        description="a hint, outside of `sequence` and ETag: how far the running attempt is; null where its backend "
        "tells nothing, in lists, in events, and before and after"
    )
    attempts: int
    cost_usd: str = Field(description="a decimal number; attempts whose bill is unknown count in full")
    image: Image | None
    error: JobError | None
    warnings: list[Warning]
    metadata: dict[str, str]
    retried_from: str | None = Field(description="the job that this one was submitted again from")
    created_at: Moment
    started_at: Moment | None
    completed_at: Moment | None
    deadline_at: Moment | None
    data_removed: bool = Field(description="whether its image, prompt and metadata were removed")
    urls: Urls


def job_object(row: Row[Any], cost: int, position: int | None, base_url: str, progress: Progress | None = None) -> Job:
    """A job's row as clients see it. `cost` in millionths of a dollar; `base_url`: where clients reach this service."""
    url = f"{base_url.rstrip('/')}/v1/jobs/{row.id}"
    return Job(
        id=row.id,
        object="job",
        status=row.status,
        sequence=row.sequence,
        model=row.model,
        backend=row.backend_asked,
        routing=[Routing.model_validate({"at": row.created_at} | choice) for choice in row.routing or ()],
        sandbox=row.sandbox,
        input=row.input,
        queue_position=position,
        progress=progress,
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
