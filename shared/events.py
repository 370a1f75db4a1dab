"""Events as clients see them: what is stored of one, told with the job as it stood then."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import Row, Select

from shared.job_object import SHOWN, Job, Moment, job_object
from shared.tables import Status, jobs


class EventType(StrEnum):
    """Everything that is stored and numbered."""

    job_queued = "job.queued"
    job_started = "job.started"
    job_succeeded = "job.succeeded"
    job_failed = "job.failed"
    job_canceled = "job.canceled"
    job_expired = "job.expired"
    endpoint_disabled = "endpoint.disabled"
    endpoint_test = "endpoint.test"


#: The event of each move, by where the move leads.
EVENT_OF: Mapping[Status, EventType] = {
    Status.queued: EventType.job_queued,
    Status.running: EventType.job_started,
    Status.succeeded: EventType.job_succeeded,
    Status.failed: EventType.job_failed,
    Status.canceled: EventType.job_canceled,
    Status.expired: EventType.job_expired,
}
#: The reason of an event that tells of a job queued before: it waits for another backend now.
REROUTED = "rerouted"

_STATUS_OF = {event: status for status, event in EVENT_OF.items()}

#: What a job ends with, and what a receiver is told when it asked for nothing in particular.
TERMINAL_EVENTS = (EventType.job_succeeded, EventType.job_failed, EventType.job_canceled, EventType.job_expired)


class Event(BaseModel):
    """One thing that happened to a job or an endpoint."""

    id: str = Field(description="`evt_…`; the `webhook-id` of its deliveries")
    object: Literal["event"]
    type: EventType
    timestamp: Moment
    sequence: int = Field(description="its place among the events of its job or endpoint, from 1")
    number: int | None = Field(description="its place in the project's feed; null for a moment after it happened")
    reason: str | None = Field(description="why a job is in the queue again; `rerouted`: for another backend")
    data: Job | dict[str, Any] = Field(description="the job as it stood then; of an endpoint's event, the endpoint")


def event_object(event: Row[Any], job: Row[Any] | None, base_url: str) -> Event:
    """An event as clients see it. `job`: its row as SHOWN reads it, None if the event is not a job's."""
    return Event(
        id=event.id,
        object="event",
        type=event.type,
        timestamp=event.created_at,
        sequence=event.sequence,
        number=event.number,
        reason=event.data.get("reason"),
        data=event.data if job is None else _as_it_was(event, job, base_url),
    )


def _as_it_was(event: Row[Any], job: Row[Any], base_url: str) -> Job:
    """The job at the time of the event. What was removed from it since stays removed; its cost is today's."""
    now = job_object(job, job.cost, None, base_url)
    if event.sequence == job.sequence:
        return now
    status = _STATUS_OF[event.type]
    return now.model_copy(
        update={
            "status": status,
            "sequence": event.sequence,
            "attempts": event.data["attempts"],
            "routing": now.routing[: event.data.get("routed", 1)],
            "error": None,
            "image": None,
            "warnings": [],
            "started_at": now.started_at if event.data["attempts"] else None,
            "completed_at": None,
        }
    )


def jobs_of(stored: Sequence[Row[Any]]) -> Select[Any]:
    """The jobs that these events happened to, to be read for `event_object`."""
    return SHOWN.where(jobs.c.id.in_({event.subject_id for event in stored if event.subject_id.startswith("job_")}))
