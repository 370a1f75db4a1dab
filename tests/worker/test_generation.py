"""One attempt, top to bottom, on both databases, with a backend whose answers the test decides."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select, update

from shared import jobs
from shared.database import Database, now
from shared.image_store import DatabaseImageStore
from shared.tables import Outcome, Status, attempts
from shared.tables import jobs as table
from tests.lives import PRICES, an_image, claim_one, job_row, submit
from worker.backends.base import (
    Billed,
    Canceled,
    Capabilities,
    Failure,
    Kind,
    Picture,
    PictureWarning,
    Progress,
    Request,
)
from worker.generation import Generation
from worker.leases import Leases

DATA = b"a picture's bytes"
PICTURE = Picture(DATA, "image/png", 512, 512, hashlib.sha256(DATA).hexdigest())


class ScriptedBackend:
    """A backend that answers what the test says, in turn; the last answer stays."""

    name = "dataoorts"
    attempt_seconds = 60.0
    capabilities = Capabilities(256, 2048, 8, 20, True, False, False, False, 1)

    def __init__(self, *answers: Picture | Failure | Callable[[], Picture | Failure]) -> None:
        self.answers = list(answers)
        self.seen: list[Request] = []

    def load(self) -> None: ...

    def health(self) -> str | None:
        return None

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        self.seen += requests
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [answer() if callable(answer) else answer]

    def close(self) -> None: ...


class Bench:
    """A generation at work on a database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.images = DatabaseImageStore(database)
        self.leases = Leases(database, 20)
        self.stopping = threading.Event()

    def generation(self, backend: ScriptedBackend) -> Generation:
        generation = Generation(
            database=self.database,
            images=self.images,
            backend=backend,
            leases=self.leases,
            worker="w",
            prices=PRICES,
            max_attempts=3,
            max_crashes=3,
            lease_seconds=20,
            stopping=self.stopping,
        )
        generation.AWAY_PAUSE_SECONDS = 0.01
        return generation

    def attempt(self, job_id: str, number: int = 1) -> tuple[str, str]:
        with self.database.read() as connection:
            query = select(attempts.c.outcome, attempts.c.billed)
            row = connection.execute(query.where(attempts.c.job_id == job_id, attempts.c.number == number)).one()
        return row.outcome, row.billed

    def make_due(self) -> None:
        with self.database.write() as tx:
            for job_id in tx.scalars(select(table.c.id).where(~table.c.ready)).all():
                tx.execute(update(table).where(table.c.id == job_id).values(ready_at=now(-1)))
                jobs.make_ready(tx, job_id)


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    bench = Bench(database)
    yield bench
    bench.leases._database.close()


def test_a_picture_ends_the_job_and_is_stored_as_it_was_received(bench: Bench) -> None:
    job = submit(bench.database, input={"prompt": "x", "seed": 7})
    warning = PictureWarning("size_differs", "300x200")
    backend = ScriptedBackend(replace(PICTURE, warnings=(warning,)))
    bench.generation(backend).work()
    row = job_row(bench.database, job.id)
    assert (row.status, row.image_attempt, row.image_bytes) == ("succeeded", 1, len(DATA))
    assert row.warnings == [{"code": "size_differs", "message": "300x200"}]
    assert bench.images.get(job.id, 1) == DATA
    assert bench.attempt(job.id) == ("succeeded", "yes")
    assert backend.seen == [Request(job.id, "m", {"prompt": "x", "seed": 7})]


def test_work_goes_on_until_no_job_is_left(bench: Bench) -> None:
    submitted = [submit(bench.database).id for _ in range(5)]
    bench.generation(ScriptedBackend(PICTURE)).work()
    assert {job_row(bench.database, job_id).status for job_id in submitted} == {"succeeded"}


def test_an_attempt_stands_in_the_database_before_the_backend_is_called(bench: Bench) -> None:
    job = submit(bench.database)
    during: list[tuple[str, str]] = []

    def look() -> Picture:
        during.append(bench.attempt(job.id))
        return PICTURE

    bench.generation(ScriptedBackend(look)).work()
    assert during == [("running", "unknown")]


def test_a_passing_failure_goes_back_to_the_queue_and_then_succeeds(bench: Bench) -> None:
    job = submit(bench.database)
    failure = Failure(Kind.transient, Billed.no, "HTTP 503")
    generation = bench.generation(ScriptedBackend(failure, PICTURE))
    generation.work()
    row = job_row(bench.database, job.id)
    assert (row.status, row.failures) == ("queued", 1)
    assert bench.attempt(job.id) == ("failed", "no")
    bench.make_due()
    generation.work()
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert bench.attempt(job.id, 2) == ("succeeded", "yes")


def test_failures_are_bounded_by_max_attempts(bench: Bench) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(Failure(Kind.transient, Billed.unknown, "timed out"))
    generation = bench.generation(backend)
    for _ in range(10):
        generation.work()
        bench.make_due()
    row = job_row(bench.database, job.id)
    assert (row.status, row.error["code"], row.error["billed"]) == ("failed", "backend_unavailable", "unknown")
    assert len(backend.seen) == 3


def test_what_was_not_accepted_is_not_bounded_in_number(bench: Bench) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(*[Failure(Kind.not_accepted, Billed.no, "refused")] * 6, PICTURE)
    generation = bench.generation(backend)
    for _ in range(7):
        generation.work()
        bench.make_due()
    assert job_row(bench.database, job.id).status == Status.succeeded


def test_what_the_vendor_rejects_is_not_tried_again(bench: Bench) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(Failure(Kind.rejected, Billed.no, "'/num_steps' must be <= 20"))
    bench.generation(backend).work()
    row = job_row(bench.database, job.id)
    assert row.error == {
        "code": "rejected",
        "message": "'/num_steps' must be <= 20",
        "retryable": False,
        "billed": "no",
    }
    assert len(backend.seen) == 1


def test_a_fault_of_ours_costs_neither_the_job_nor_the_thread(bench: Bench) -> None:
    first, second = submit(bench.database), submit(bench.database)

    def broken() -> Picture:
        raise ZeroDivisionError

    bench.generation(ScriptedBackend(broken, PICTURE)).work()
    assert job_row(bench.database, first.id).status == Status.queued
    assert bench.attempt(first.id) == ("failed", "unknown")
    assert job_row(bench.database, second.id).status == Status.succeeded


def test_who_is_asked_to_stop_claims_nothing_more_and_gives_back_what_it_has_not_sent(bench: Bench) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(PICTURE)
    generation = bench.generation(backend)
    claim = claim_one(bench.database)
    bench.stopping.set()
    generation.run_attempt(claim)
    generation.work()
    row = job_row(bench.database, job.id)
    assert (row.status, row.ready, row.failures, row.crashes) == ("queued", True, 0, 0)
    assert bench.attempt(job.id) == ("canceled", "no")
    assert backend.seen == []


def test_a_picture_that_comes_after_the_rescue_still_ends_the_job(bench: Bench) -> None:
    job = submit(bench.database)

    def slow() -> Picture:
        with bench.database.write() as tx:
            tx.execute(update(table).values(lease_until=now(-1)))
            assert jobs.rescue(tx, job.id, 1, max_crashes=3) is Status.queued
            jobs.close_attempt(tx, job.id, 1, Outcome.unknown, Billed.unknown)
        return PICTURE

    bench.generation(ScriptedBackend(slow)).work()
    row = job_row(bench.database, job.id)
    assert (row.status, row.image_attempt, row.attempts) == ("succeeded", 1, 1)
    assert bench.attempt(job.id) == ("succeeded", "yes"), "what was unknown is known now"


def test_a_second_picture_is_counted_and_thrown_away(bench: Bench) -> None:
    job = submit(bench.database)

    def overtaken() -> Picture:
        with bench.database.write() as tx:
            tx.execute(update(table).values(lease_until=now(-1)))
            jobs.rescue(tx, job.id, 1, max_crashes=3)
        successor = claim_one(bench.database)
        bench.images.put(an_image(successor, b"theirs"), b"theirs")
        with bench.database.write() as tx:
            assert jobs.succeed(tx, successor, an_image(successor, b"theirs"))
        return PICTURE

    bench.generation(ScriptedBackend(overtaken)).work()
    row = job_row(bench.database, job.id)
    assert row.image_attempt == 2
    assert bench.images.get(job.id, 1) is None and bench.images.get(job.id, 2) == b"theirs"
    assert bench.attempt(job.id, 1) == ("succeeded", "yes"), "it was paid for, and is counted"


def test_a_canceled_calls_picture_is_thrown_away_and_its_cost_is_counted(bench: Bench) -> None:
    job = submit(bench.database)

    def canceled_meanwhile() -> Picture:
        with bench.database.write() as tx:
            assert jobs.cancel(tx, job.id)
        return PICTURE

    bench.generation(ScriptedBackend(canceled_meanwhile)).work()
    assert job_row(bench.database, job.id).status == Status.canceled
    assert bench.images.of_job(job.id) == []
    assert bench.attempt(job.id) == ("canceled", "yes")


def test_a_canceled_calls_failure_changes_nothing_but_its_attempt(bench: Bench) -> None:
    job = submit(bench.database)

    def canceled_meanwhile() -> Failure:
        with bench.database.write() as tx:
            assert jobs.cancel(tx, job.id)
        return Failure(Kind.transient, Billed.unknown, "timed out")

    bench.generation(ScriptedBackend(canceled_meanwhile)).work()
    assert job_row(bench.database, job.id).status == Status.canceled
    assert bench.attempt(job.id) == ("failed", "unknown")


def test_a_commit_whose_answer_was_lost_is_not_undone_by_the_second_try(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    job = submit(bench.database)
    generation = bench.generation(ScriptedBackend(PICTURE))
    point_at, calls = generation._point_at, 0

    def lose_the_answer(*args: Any) -> None:
        nonlocal calls
        calls += 1
        point_at(*args)
        if calls == 1:
            raise OperationalError("COMMIT", {}, Exception("connection lost"))

    monkeypatch.setattr(generation, "_point_at", lose_the_answer)
    generation.work()
    assert calls == 2
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert bench.images.get(job.id, 1) == DATA


def test_a_picture_is_kept_while_the_database_is_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    job = submit(bench.database)
    backend = ScriptedBackend(PICTURE)
    generation = bench.generation(backend)
    put, failures = bench.images.put, 5

    def away(*args: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OperationalError("INSERT", {}, Exception("server closed the connection"))
        put(*args)

    monkeypatch.setattr(bench.images, "put", away)
    generation.work()
    assert failures == 0
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert len(backend.seen) == 1, "paid once"
