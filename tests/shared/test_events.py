"""Events as clients see them: the job as it stood then, with what is true of it now where that must be so."""

from typing import Any

from sqlalchemy import insert, select

from shared import jobs
from shared.database import Database, now
from shared.errors import JobErrorCode
from shared.events import EVENT_OF, TERMINAL_EVENTS, Event, event_object, jobs_of
from shared.job_object import SHOWN
from shared.standing import TERMINAL
from shared.tables import Billed, Outcome, Status, events
from shared.tables import jobs as table
from tests import lives

URL = "http://here"


def told(database: Database, subject: str) -> list[Event]:
    query = select(events).where(events.c.subject_id == subject).order_by(events.c.sequence)
    with database.read() as connection:
        stored = connection.execute(query).all()
        rows = {row.id: row for row in connection.execute(jobs_of(stored))}
    return [event_object(event, rows.get(event.subject_id), URL) for event in stored]


def values(happened: list[Event], *names: str) -> list[Any]:
    return [tuple(event.model_dump(mode="json")["data"][name] for name in names) for event in happened]


def test_every_status_has_an_event_and_the_last_ones_end_a_job() -> None:
    assert set(EVENT_OF) == set(Status)
    assert {EVENT_OF[status] for status in TERMINAL} == set(TERMINAL_EVENTS)


def test_each_event_shows_the_job_as_it_stood_then(database: Database) -> None:
    job = lives.submit(database)
    first = lives.claim_one(database)
    with database.write() as tx:
        assert jobs.requeue(tx, first, reason="transient", after_seconds=0, counts=True)
        jobs.close_attempt(tx, job.id, 1, Outcome.failed, Billed.unknown)
    lives.ended(database, lives.claim_one(database))
    happened = told(database, job.id)
    assert [event.reason for event in happened] == [None, None, "transient", None, None]
    assert values(happened, "status", "sequence", "attempts") == [
        ("queued", 1, 0),
        ("running", 2, 1),
        ("queued", 3, 1),
        ("running", 4, 2),
        ("succeeded", 5, 2),
    ]
    shown = [
        {name for name in ("started_at", "completed_at", "image") if event.model_dump()["data"][name]}
        for event in happened
    ]
    assert shown == [set(), {"started_at"}, {"started_at"}, {"started_at"}, {"started_at", "completed_at", "image"}]
    # What it cost is told as it is known today, in each of them.
    assert {cost for (cost,) in values(happened, "cost_usd")} == {"0.016"}


def test_how_a_job_failed_is_told_by_the_event_of_its_end_alone(database: Database) -> None:
    job = lives.submit(database)
    claim = lives.claim_one(database)
    with database.write() as tx:
        error = jobs.JobError(JobErrorCode.rejected, "No.", retryable=False, billed=Billed.no)
        assert jobs.fail(tx, claim, error)
    errors = [error and error["code"] for (error,) in values(told(database, job.id), "error")]
    assert errors == [None, None, "rejected"]


def test_what_was_removed_since_stays_removed(database: Database) -> None:
    job = lives.submit(database, metadata={"ticket": "ABC-1"})
    with database.write() as tx:
        assert jobs.cancel(tx, job.id) and jobs.remove_data(tx, job.id)
    happened = told(database, job.id)
    assert len(happened) == 2
    assert "a red fox" not in repr(happened) and "ABC-1" not in repr(happened)
    assert values(happened, "data_removed") == [(True,), (True,)]


def test_an_endpoints_event_carries_what_was_stored_of_it(database: Database) -> None:
    data = {"id": "end_a", "reason": "gone"}
    with database.write() as tx:
        tx.execute(
            insert(events).values(
                subject_id="end_a",
                sequence=1,
                id="evt_a",
                project_id="prj_a",
                type="endpoint.disabled",
                data=data,
                created_at=now(),
                number=7,
            )
        )
    [event] = told(database, "end_a")
    assert (event.type, event.number, event.data) == ("endpoint.disabled", 7, data)
    with database.read() as connection:
        assert connection.execute(SHOWN.where(table.c.id == "end_a")).all() == []
