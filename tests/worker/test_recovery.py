"""What dead workers left on the spool, offered on both databases: whatever became of the job, nothing is paid twice."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from shared import jobs
from shared.database import Database, now
from shared.image_store import DatabaseImageStore
from shared.jobs import Claim
from shared.tables import Billed, Outcome, Status, attempts
from shared.tables import jobs as table
from tests.lines import written
from tests.lives import TERMS, an_image, claim_one, job_row, submit
from tests.worker.scripted import DATA, ScriptedBackend, picture_of
from worker.backends.base import Failure, Kind, Picture, Unjudged
from worker.closing import Closing
from worker.recovery import Recovery
from worker.spool import Spool

AWAY = OperationalError("SELECT", {}, Exception("connection refused"))
PATIENCE = 60  # seconds


class House:
    """A database, a spool, and a worker that has just started."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.images = DatabaseImageStore(database)
        self.backend = ScriptedBackend()
        self.stopping = threading.Event()
        self.spool = Spool(folder)

    def recovery(self, database: Database | None = None) -> Recovery:
        database = database or self.database
        closing = Closing(database, DatabaseImageStore(database))
        recovery = Recovery(database, closing, self.backend, self.spool, self.stopping)
        recovery.AWAY_PAUSE_SECONDS = recovery.LOOK_SECONDS = 0.01
        return recovery

    def dies_with(self, claim: Claim, data: bytes = DATA) -> None:
        """The worker that made this claim is dead; the picture of its attempt was received."""
        dead = Spool(self.folder)
        dead.keep(claim.job_id, claim.attempt, data)
        dead.close()

    def lapse(self, claim: Claim) -> None:
        """The sweep found its lease lapsed."""
        with self.database.write() as tx:
            tx.execute(update(table).where(table.c.id == claim.job_id).values(lease_until=now(-1)))
            assert jobs.rescue(tx, claim.job_id, claim.fence, max_crashes=3) is Status.queued
            jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.unknown, Billed.unknown)

    def attempt(self, claim: Claim) -> tuple[str, str]:
        query = select(attempts.c.outcome, attempts.c.billed)
        mine = query.where(attempts.c.job_id == claim.job_id, attempts.c.number == claim.attempt)
        with self.database.read() as connection:
            row = connection.execute(mine).one()
        return row.outcome, row.billed

    def pictures(self) -> list[Path]:
        return sorted(self.folder.rglob("*.picture"))


@pytest.fixture
def house(database: Database, tmp_path: Path) -> Iterator[House]:
    house = House(database, tmp_path / "spool")
    yield house
    house.stopping.set()
    house.spool.close()


def test_a_running_jobs_picture_ends_it_before_anybody_else_can_pay_again(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    house.dies_with(claim)
    house.recovery().round()
    row = job_row(house.database, job.id)
    assert (row.status, row.image_attempt, row.image_bytes) == ("succeeded", 1, len(DATA))
    assert house.images.get(job.id, 1) == DATA
    assert house.attempt(claim) == ("succeeded", "yes")
    assert [path.name for path in house.folder.iterdir()] == [house.spool._folder().path.name]
    assert house.backend.seen == []


def test_a_rescued_jobs_picture_keeps_it_from_being_claimed_again(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    house.dies_with(claim)
    house.lapse(claim)
    house.recovery().round()
    assert job_row(house.database, job.id).status == Status.succeeded
    assert house.attempt(claim) == ("succeeded", "yes"), "what was unknown is known now"
    with house.database.write() as tx:
        assert jobs.claim(tx, "dataoorts", TERMS) == []


def test_the_worker_that_has_the_job_by_then_is_fenced_out(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    house.dies_with(claim)
    house.lapse(claim)
    successor = claim_one(house.database)
    house.recovery().round()
    closing = Closing(house.database, house.images)
    closing.with_picture(job.id, successor.attempt, picture_of(b"theirs"), successor)
    assert job_row(house.database, job.id).image_attempt == 1
    assert [image.attempt for image in house.images.of_job(job.id)] == [1]
    assert house.attempt(claim) == house.attempt(successor) == ("succeeded", "yes")


def test_a_picture_that_was_put_and_not_pointed_at_is_pointed_at(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    house.images.put(an_image(claim, DATA), DATA)
    house.dies_with(claim)
    house.recovery().round()
    assert job_row(house.database, job.id).status == Status.succeeded
    assert house.pictures() == []


def test_a_picture_that_was_pointed_at_and_not_removed_is_removed(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    Closing(house.database, house.images).with_picture(job.id, 1, picture_of(DATA), claim)
    before = job_row(house.database, job.id)
    house.dies_with(claim)
    house.recovery().round()
    assert job_row(house.database, job.id) == before and house.images.get(job.id, 1) == DATA
    assert house.pictures() == []


def test_a_picture_of_a_job_that_ended_with_another_one_is_counted_and_thrown_away(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    house.lapse(claim)
    successor = claim_one(house.database)
    Closing(house.database, house.images).with_picture(job.id, 2, picture_of(b"theirs"), successor)
    house.dies_with(claim)
    house.recovery().round()
    assert job_row(house.database, job.id).image_attempt == 2
    assert [image.attempt for image in house.images.of_job(job.id)] == [2]
    assert house.attempt(claim) == ("succeeded", "yes")
    assert house.pictures() == []


def test_a_canceled_jobs_picture_is_thrown_away_and_its_cost_is_counted(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    with house.database.write() as tx:
        assert jobs.cancel(tx, job.id)
    house.dies_with(claim)
    house.recovery().round()
    assert job_row(house.database, job.id).status == Status.canceled
    assert house.images.of_job(job.id) == [] and house.pictures() == []
    assert house.attempt(claim) == ("canceled", "yes")


def test_a_removed_jobs_picture_does_not_come_back(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    Closing(house.database, house.images).with_picture(job.id, 1, picture_of(DATA), claim)
    house.dies_with(claim)
    with house.database.write() as tx:
        assert jobs.remove_data(tx, job.id)
    house.images.remove(job.id, 1)
    house.recovery().round()
    row = job_row(house.database, job.id)
    assert row.data_removed and row.image_attempt is None
    assert house.images.of_job(job.id) == [] and house.pictures() == []


def test_a_picture_of_another_databases_job_is_kept_for_its_own_worker(
    house: House, tmp_path: Path, migrated_sqlite: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = submit(house.database)
    house.dies_with(claim_one(house.database))
    copy = tmp_path / "other.db"
    copy.write_bytes(migrated_sqlite.read_bytes())
    stranger = Database(f"sqlite:///{copy}")
    other = House(stranger, house.folder)
    for _ in range(3):
        other.recovery().round()
    assert len(house.pictures()) == 1
    assert sum("knows no such job" in line for line in caplog.messages) == 1
    house.recovery().round()
    assert job_row(house.database, job.id).status == Status.succeeded and house.pictures() == []
    other.spool.close()
    stranger.close()


def test_what_is_no_whole_picture_leaves_the_spool_and_its_attempt_is_billed(house: House) -> None:
    job = submit(house.database)
    claim = claim_one(house.database)
    house.dies_with(claim)
    house.backend.judgements = [Failure(Kind.bad_output, Billed.yes, "cut short")]
    house.recovery().round()
    assert job_row(house.database, job.id).status == Status.running, "its job is the rescue's"
    assert house.attempt(claim) == ("failed", "yes")
    assert house.pictures() == [] and house.images.of_job(job.id) == []


def test_one_that_cannot_be_offered_keeps_no_other_from_it_and_is_told_of_once(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = submit(house.database), submit(house.database)
    house.dies_with(claim_one(house.database), b"first")
    house.dies_with(claim_one(house.database), b"second")

    def judge() -> Picture:
        if house.backend.judged[-1] == b"first":
            raise ZeroDivisionError
        return picture_of(b"second")

    house.backend.judgements = [judge]
    recovery = house.recovery()
    for _ in range(3):
        recovery.round()
    assert job_row(house.database, first.id).status == Status.running
    assert job_row(house.database, second.id).status == Status.succeeded
    assert len(house.pictures()) == 1, "it is kept"
    assert sum(record.levelno >= logging.ERROR for record in caplog.records) == 1


# The thread.


def test_with_an_empty_spool_it_is_done_without_asking_the_database(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise AWAY

    monkeypatch.setattr(house.database, "read", away)
    recovery = house.recovery()
    recovery.start()
    assert recovery.done.wait(PATIENCE)
    house.stopping.set()
    recovery.close()


@pytest.mark.parametrize("what", ["the database", "the judge"])
def test_it_is_not_done_before_what_was_away_is_back(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    job = submit(house.database)
    house.dies_with(claim_one(house.database))
    read, judge = house.database.read, house.backend.judge
    tries, back, done_meanwhile = threading.Semaphore(0), threading.Event(), []

    def ask(real: Any, missing: Exception) -> Any:
        def asked(*args: Any) -> Any:
            if not back.is_set():
                done_meanwhile.append(recovery.done.is_set())
                tries.release()
                raise missing
            return real(*args)

        return asked

    if what == "the database":
        monkeypatch.setattr(house.database, "read", ask(read, AWAY))
    else:
        unjudged = Unjudged(Kind.transient, Billed.yes, "no process")
        monkeypatch.setattr(house.backend, "judge", ask(judge, unjudged))
    recovery = house.recovery()
    recovery.start()
    for _ in range(3):
        assert tries.acquire(timeout=PATIENCE)
    back.set()
    assert recovery.done.wait(PATIENCE)
    assert job_row(house.database, job.id).status == Status.succeeded
    assert done_meanwhile and not any(done_meanwhile)
    assert sum("can't be offered yet" in line for line in caplog.messages) == 1
    house.stopping.set()
    recovery.close()


def test_it_goes_on_looking_for_workers_that_die_later(house: House) -> None:
    recovery = house.recovery()
    recovery.start()
    assert recovery.done.wait(PATIENCE)
    moved = threading.Event()
    job = submit(house.database)
    claim = claim_one(house.database)
    house.database.after_commit = lambda ids: moved.set()
    house.dies_with(claim)
    assert moved.wait(PATIENCE)
    house.stopping.set()
    recovery.close()
    assert job_row(house.database, job.id).status == Status.succeeded


def test_a_spool_that_cannot_be_read_is_no_reason_not_to_work(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(house.spool, "left_behind", broken)
    recovery = house.recovery()
    recovery.start()
    assert recovery.done.wait(PATIENCE)
    house.stopping.set()
    recovery.close()
    assert "Input/output error" in caplog.text


def test_a_worker_that_stops_leaves_the_rest_for_the_next_one(house: House) -> None:
    for _ in range(3):
        submit(house.database)
        house.dies_with(claim_one(house.database))

    def stop() -> Picture:
        house.stopping.set()
        return picture_of(DATA)

    house.backend.judgements = [stop]
    house.recovery().round()
    assert len(house.pictures()) == 2


def test_what_becomes_of_a_dead_workers_picture_is_said_with_the_id_of_its_jobs_request(house: House) -> None:
    job = submit(house.database, request_id="req_a")
    house.dies_with(claim_one(house.database))
    with written() as lines:
        house.recovery().round()
    [line] = lines.as_json(logger="worker.recovery")
    assert (line["job_id"], line["attempt"], line["request_id"]) == (job.id, 1, "req_a")
