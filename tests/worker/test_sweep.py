"""The repairs, on both databases: what each finds, and that two sweeps at once do no harm."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import insert, select, update
from sqlalchemy.exc import OperationalError

from shared import breaker, deliveries, endpoints, jobs, tickets
from shared.breaker import Breaker, BreakerBoard, Reason, key
from shared.database import Database, now
from shared.errors import JobErrorCode
from shared.image_store import DatabaseImageStore
from shared.jobs import JobError
from shared.tables import Billed, Status, attempts, events, idempotency_keys
from shared.tables import deliveries as sent
from shared.tables import jobs as table
from shared.webhook_secrets import Vault
from tests.lines import written
from tests.lives import SUBMISSION, TERMS, an_image, claim_one, ended, job_row, many, plan, submit
from worker.feed import Feed
from worker.sweep import Sweep, queued_and_due


class SilentBell(tickets.Bell):
    """Writes down who was rung for, instead of ringing."""

    def __init__(self) -> None:
        super().__init__(Celery())
        self.rung: list[tuple[str, int]] = []

    def ring(self, backend: str, jobs: int = 1) -> None:
        self.rung.append((backend, jobs))


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def a_sweep(
    database: Database,
    clock: Clock | None = None,
    bell: SilentBell | None = None,
    breakers: BreakerBoard | None = None,
) -> Sweep:
    return Sweep(
        database,
        DatabaseImageStore(database),
        bell or SilentBell(),
        ["dataoorts"],
        Feed(database),
        max_crashes=3,
        breakers=breakers,
        clock=clock or Clock(),
    )


def lapse(database: Database) -> None:
    with database.write() as tx:
        tx.execute(update(table).where(table.c.status == "running").values(lease_until=now(-1)))


def attempt_of(database: Database, job_id: str, number: int = 1) -> tuple[str, str]:
    query = select(attempts.c.outcome, attempts.c.billed)
    with database.read() as connection:
        row = connection.execute(query.where(attempts.c.job_id == job_id, attempts.c.number == number)).one()
    return row.outcome, row.billed


def test_a_lapsed_lease_is_rescued_only_when_it_was_seen_twice_five_seconds_apart(database: Database) -> None:
    job = submit(database)
    claim_one(database)
    lapse(database)
    clock = Clock()
    sweep = a_sweep(database, clock)
    sweep.rescue_lapsed()
    clock.time += 4.9
    sweep.rescue_lapsed()
    assert job_row(database, job.id).status == Status.running
    clock.time += 0.2
    sweep.rescue_lapsed()
    row = job_row(database, job.id)
    assert (row.status, row.crashes) == ("queued", 1)
    assert attempt_of(database, job.id) == ("unknown", "unknown")


@pytest.mark.parametrize("repair", ["rescue_lapsed", "rescue_deliveries"])
def test_what_was_seen_before_an_outage_must_be_seen_twice_after_it(
    database: Database, monkeypatch: pytest.MonkeyPatch, repair: str
) -> None:
    """Its owner lives, and could not renew it: after the outage he comes first."""
    clock = Clock()
    sweep = a_sweep(database, clock)
    rescued: list[str] = []
    for rescue in ("_rescue", "_rescue_delivery"):
        monkeypatch.setattr(sweep, rescue, lambda row: rescued.append(row.id))
    wait_for_deliveries(database)
    claim_one(database)
    with database.write() as tx:
        assert len(deliveries.claim(tx, "w", limit=9, probes=9)) == 1
        tx.execute(update(table).values(lease_until=now(-1)))
        tx.execute(update(sent).values(lease_until=now(-1)))
    sweep._run(getattr(sweep, repair))
    with monkeypatch.context() as away:
        away.setattr(database, "read", gone)
        for _ in range(60):
            clock.time += 1
            sweep._run(getattr(sweep, repair))
    sweep._run(getattr(sweep, repair))
    assert rescued == [], "at the first look"
    clock.time += 5
    sweep._run(getattr(sweep, repair))
    assert len(rescued) == 1


def wait_for_deliveries(database: Database) -> None:
    """A job, and an endpoint that is to be told of it."""
    project = submit(database).project_id
    url, told = "https://a.example/hook", ["job.queued"]
    with database.write() as tx:
        endpoints.register(tx, Vault("s" * 32), url=url, project_id=project, description="", events=told)
        deliveries.plan(tx, tx.execute(select(events)).all())


def gone() -> Any:
    raise OperationalError("SELECT", {}, Exception("the server is gone"))


def test_a_worker_that_renews_after_an_outage_keeps_its_job(database: Database) -> None:
    job = submit(database)
    claim = claim_one(database)
    lapse(database)
    clock = Clock()
    sweep = a_sweep(database, clock)
    sweep.rescue_lapsed()
    with database.write() as tx:
        jobs.renew(tx, [(claim.job_id, claim.fence)], 20)
    lapse(database)  # and it lapses again: another lease, seen for the first time
    clock.time += 6
    sweep.rescue_lapsed()
    assert job_row(database, job.id).status == Status.running


def test_a_picture_that_was_stored_before_the_crash_is_adopted_and_not_paid_again(database: Database) -> None:
    job = submit(database)
    claim = claim_one(database)
    DatabaseImageStore(database).put(an_image(claim, b"paid"), b"paid")
    lapse(database)
    clock = Clock()
    sweep = a_sweep(database, clock)
    sweep.rescue_lapsed()
    clock.time += 5
    sweep.rescue_lapsed()
    row = job_row(database, job.id)
    assert (row.status, row.image_attempt, row.crashes) == ("succeeded", 1, 0)
    assert attempt_of(database, job.id) == ("succeeded", "yes")


def test_jobs_that_waited_too_long_end(database: Database) -> None:
    impatient, patient = submit(database, deadline_seconds=1), submit(database)
    with database.write() as tx:
        tx.execute(update(table).where(table.c.id == impatient.id).values(deadline_at=now(-1)))
    sweep = a_sweep(database)
    sweep.expire_too_old()
    assert job_row(database, impatient.id).status == Status.expired
    assert job_row(database, patient.id).status == Status.queued
    with database.write() as tx:
        tx.execute(update(table).where(table.c.id == patient.id).values(queue_until=now(-1)))
    sweep.expire_too_old()
    assert job_row(database, patient.id).status == Status.expired


def test_what_backs_off_becomes_ready_when_it_is_due(database: Database) -> None:
    due, later = submit(database), submit(database)
    with database.write() as tx:
        for pause in (60, 600):
            jobs.requeue(tx, claim_one(database, tx), reason="transient", after_seconds=pause, counts=True)
        tx.execute(update(table).where(table.c.id == due.id).values(ready_at=now(-1)))
    a_sweep(database).ready_what_is_due()
    assert job_row(database, due.id).ready
    assert not job_row(database, later.id).ready


def test_an_attempt_that_nobody_closed_ends_as_unknown(database: Database) -> None:
    job = submit(database)
    ended_claim = claim_one(database)
    with database.write() as tx:
        jobs.succeed(tx, ended_claim, an_image(ended_claim))  # and dies before it closes the attempt
    sweep = a_sweep(database)
    sweep.close_abandoned_attempts()
    assert attempt_of(database, job.id) == ("running", "unknown"), "its time is not over yet"
    with database.write() as tx:
        tx.execute(update(attempts).values(deadline_at=now(-61)))
    sweep.close_abandoned_attempts()
    assert attempt_of(database, job.id) == ("unknown", "unknown")


def test_pictures_that_nothing_points_at_are_removed_and_no_others(database: Database) -> None:
    store = DatabaseImageStore(database)
    submit(database)
    loser = claim_one(database)
    lapse(database)
    with database.write() as tx:
        jobs.rescue(tx, loser.job_id, loser.fence, max_crashes=3)
    winner = claim_one(database)
    for claim in (loser, winner):
        store.put(an_image(claim, b"x"), b"x")
    ended(database, winner)
    submit(database)
    at_work = claim_one(database)
    store.put(an_image(at_work, b"y"), b"y")  # put, and about to be pointed at
    sweep = a_sweep(database)
    sweep.forget_unpointed_images()
    assert [image.attempt for image in store.of_job(winner.job_id)] == [winner.attempt]
    assert len(store.of_job(at_work.job_id)) == 1


def test_the_walk_over_the_pictures_begins_again_at_its_end(database: Database) -> None:
    store = DatabaseImageStore(database)
    sweep = a_sweep(database)
    sweep.LIMIT = 2
    for _ in range(3):
        submit(database)
        claim = claim_one(database)
        store.put(an_image(claim), b"picture")
        with database.write() as tx:
            jobs.fail(tx, claim, JobError(JobErrorCode.rejected, "", False, Billed.no))
    for _ in range(4):
        sweep.forget_unpointed_images()
    assert store.page(("", 0), 10) == []


def test_the_bell_is_rung_for_what_is_ready_and_no_more(database: Database) -> None:
    bell = SilentBell()
    sweep = a_sweep(database, bell=bell)
    sweep.ring()
    assert bell.rung == []
    for _ in range(3):
        submit(database)
    claim_one(database)
    sweep.ring()
    assert bell.rung == [("dataoorts", 2)]


def test_one_repair_that_fails_does_not_keep_the_others_from_being_made(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bell = SilentBell()
    sweep = a_sweep(database, bell=bell)
    submit(database)

    def broken() -> bool:
        raise ZeroDivisionError

    def away() -> bool:
        raise OperationalError("SELECT", {}, Exception("gone"))

    broken.__name__ = away.__name__ = "x"
    monkeypatch.setattr(sweep, "rescue_lapsed", broken)
    monkeypatch.setattr(sweep, "expire_too_old", away)
    sweep.round()
    assert bell.rung


def test_two_sweeps_at_once_do_no_harm(database: Database) -> None:
    with database.write() as tx:
        for _ in range(30):
            jobs.submit(tx, **SUBMISSION)
        jobs.claim(tx, "dataoorts", TERMS, limit=30)
    lapse(database)
    clock = Clock()
    sweeps = [a_sweep(database, clock) for _ in range(2)]
    for sweep in sweeps:
        sweep.rescue_lapsed()
    clock.time += 6
    threads = [threading.Thread(target=sweep.round) for sweep in sweeps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert set(connection.scalars(select(table.c.crashes))) == {1}
        assert len(connection.execute(select(events.c.id).where(events.c.type == "job.queued")).all()) == 60


def test_a_sweep_says_when_more_is_left_to_do(database: Database) -> None:
    for _ in range(3):
        submit(database, deadline_seconds=1)
    with database.write() as tx:
        tx.execute(update(table).values(deadline_at=now(-1)))
    sweep = a_sweep(database)
    sweep.LIMIT = 2
    assert sweep.round() is True
    assert sweep.round() is False
    with database.read() as connection:
        assert set(connection.scalars(select(table.c.status))) == {"expired"}


def test_what_the_sweep_looks_for_is_found_by_its_indexes(database: Database) -> None:
    """Enough jobs that a plan without the index would be the worse one, then the plans themselves."""
    many(database, 600)
    for column, index in (
        (table.c.queue_until, "ix_jobs_queue_until"),
        (table.c.deadline_at, "ix_jobs_deadline_at"),
    ):
        assert index in plan(database, queued_and_due(column).limit(10))
    assert "ix_jobs_not_ready" in plan(database, queued_and_due(table.c.ready_at, ~table.c.ready).limit(10))


def test_idempotency_keys_are_forgotten_after_a_day_and_not_before(database: Database) -> None:
    with database.write() as tx:
        for number, age in enumerate((-25 * 3600, -25 * 3600, -25 * 3600, -23 * 3600)):
            values = {
                "project_id": "prj_a",
                "key": str(number),
                "request_hash": "",
                "job_id": "",
                "created_at": now(age),
            }
            tx.execute(insert(idempotency_keys).values(**values))
    sweep = a_sweep(database)
    sweep.LIMIT = 2
    assert sweep.forget_old_keys() is True
    assert sweep.forget_old_keys() is False
    with database.read() as connection:
        assert list(connection.scalars(select(idempotency_keys.c.key))) == ["3"]


def test_a_repair_that_did_something_is_told_in_one_line_and_one_that_did_nothing_in_none(database: Database) -> None:
    for _ in range(2):
        submit(database)
    with database.write() as tx:
        tx.execute(update(table).values(queue_until=now(-1)))
    sweep = a_sweep(database)
    with written() as lines:
        sweep.round()
        sweep.round()
    [line] = [line for line in lines.as_json(logger="worker.sweep") if line["message"] == "repaired"]
    assert (line["repair"], line["count"]) == ("expire_too_old", 2)


def test_a_rescue_is_told_with_its_job(database: Database) -> None:
    job = submit(database)
    claim_one(database)
    lapse(database)
    clock = Clock()
    sweep = a_sweep(database, clock)
    with written() as lines:
        sweep.round()
        clock.time += 6
        sweep.round()
    rescued, repaired = lines.as_json(logger="worker.sweep")
    assert (rescued["job_id"], rescued["attempt"]) == (job.id, 1)
    assert (repaired["repair"], repaired["count"]) == ("rescue_lapsed", 1)


def test_that_a_breaker_opened_and_closed_is_said_once(
    sqlite_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    database, client = Database(sqlite_url), redis.Redis.from_url(redis_url)
    sweep = a_sweep(database, breakers=BreakerBoard(client))

    def rounds(standing: Breaker) -> list[str]:
        client.set(key("dataoorts"), breaker.written(standing))
        caplog.clear()
        for _ in range(3):
            sweep.round()
        return [record.getMessage() for record in caplog.records]

    moment = client.time()[0]
    assert rounds(Breaker()) == []
    opened = Breaker(turns=1, reason=Reason.failing, until=moment + 60)
    assert rounds(opened) == ["dataoorts: its breaker is open (failing): its jobs wait"]
    assert rounds(Breaker(turns=1, reason=Reason.failing, until=moment - 1)) == [], "half open is no news"
    assert rounds(Breaker(turns=1, reason=Reason.auth_failed, until=moment + 60)) == [
        "dataoorts: its breaker is open (auth_failed): its jobs wait"
    ]
    assert rounds(Breaker(turns=2, closed_at=moment)) == ["dataoorts: its breaker is closed again (it was auth_failed)"]
    client.close()
    database.close()


def test_a_sweep_that_is_asked_to_stop_begins_no_further_repair(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may wait for a database that is away, and there are more of them than its grace has such waits."""
    stopping, sweep = threading.Event(), a_sweep(database)
    sweep._stopping = stopping
    made: list[str] = []

    def run(repair: Callable[[], bool]) -> bool:
        made.append(repair.__name__)
        stopping.set()
        return False

    monkeypatch.setattr(sweep, "_run", run)
    assert not sweep.round() and made == ["rescue_lapsed"]


def test_what_is_done_to_a_job_is_said_with_its_id_and_that_of_its_request(database: Database) -> None:
    lost, late, old = (submit(database, request_id=f"req_{name}").id for name in ("lost", "late", "old"))
    sweep = a_sweep(database, clock := Clock())
    with database.write() as tx:
        tx.execute(update(table).where(table.c.id == old).values(queue_until=now(-1)))
        tx.execute(update(table).where(table.c.id == late).values(ready=False))
    assert claim_one(database).job_id == lost
    with database.write() as tx:
        tx.execute(update(table).where(table.c.id == late).values(queue_until=now(-1), attempts=1, failures=1))
    lapse(database)
    with written() as lines:
        sweep.round()
        clock.time += 6
        sweep.round()
        with database.write() as tx:
            tx.execute(update(attempts).values(outcome="running", deadline_at=now(-1000)))
        sweep.round()
    said = {
        (line.get("job_id"), line.get("request_id"), line["message"]) for line in lines.as_json(logger="worker.sweep")
    }
    assert said >= {
        (lost, "req_lost", "its worker is gone, now queued"),
        (late, "req_late", "it waited for longer than it may, now failed"),
        (old, "req_old", "it waited for longer than it may, now expired"),
        (lost, "req_lost", "its attempt, which nobody closed, is unknown"),
    }
