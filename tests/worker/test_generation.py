"""One attempt, top to bottom, on both databases, with a backend whose answers the test decides."""

import errno
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, event, select, text, update
from sqlalchemy.exc import OperationalError

from shared import inputs, jobs
from shared.database import Database, now
from shared.image_store import DatabaseImageStore
from shared.inputs import Input
from shared.progress import Report
from shared.queue_head import QueueHead
from shared.tables import Outcome, Status, attempts
from shared.tables import jobs as table
from tests.lines import written
from tests.lives import PRICES, an_image, claim_one, job_row, submit
from tests.worker.scripted import DATA, PICTURE, Answer, ScriptedBackend
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
    Unjudged,
)
from worker.breaker import Permit
from worker.closing import Closing
from worker.generation import Generation
from worker.leases import Leases
from worker.recovery import Recovery
from worker.shared_breaker import SharedBreaker
from worker.slots import OWN_SECONDS, Slots
from worker.spool import Entry, Spool

AWAY = OperationalError("INSERT", {}, Exception("server closed the connection"))
UNJUDGED = Unjudged(Kind.transient, Billed.yes, "no process to judge pictures could be started")


class Bench:
    """A generation at work on a database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.images = DatabaseImageStore(database)
        self.leases = Leases(database, 20)
        self.stopping = threading.Event()

    def generation(self, backend: ScriptedBackend, spool: Spool | None = None, **options: Any) -> Generation:
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
            spool=spool,
            **options,
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


def test_a_worker_goes_on_where_it_found_the_queue_to_begin_and_misses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QueueHead, "BELIEVED_SECONDS", 3600.0)
    put_off, second, third = (submit(bench.database).id for _ in range(3))
    with bench.database.write() as tx:
        tx.execute(update(table).where(table.c.id == put_off).values(ready=False))

    def make_it_due() -> Picture:
        bench.make_due()
        return PICTURE

    backend = ScriptedBackend(make_it_due, PICTURE, PICTURE)
    bench.generation(backend).work()
    assert [request.job_id for request in backend.seen] == [second, third, put_off]


def test_while_the_backend_works_its_slot_has_the_time_of_an_attempt(bench: Bench) -> None:
    submit(bench.database)
    submit(bench.database, input=ALTERING, starts_from=(PIXELS, WHITE))
    slots, limits = Slots(1), list[float]()

    def look() -> Picture:
        limits.extend(slot.limit_seconds for slot in slots._working)
        return PICTURE

    backend = ScriptedBackend(look, look)
    bench.generation(backend, slots=slots).work()
    assert limits == [backend.attempt_seconds] * 2 and backend.attempt_seconds > OWN_SECONDS


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
    assert (row.status, row.failures, row.refusals) == ("queued", 0, 1), "an outage begins so"
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


def test_a_process_that_stood_still_after_its_claim_sends_nothing_and_gives_back_what_is_still_its_own(
    bench: Bench,
) -> None:
    lost, kept = submit(bench.database), submit(bench.database)
    backend = ScriptedBackend(PICTURE)
    generation = bench.generation(backend)
    claims = generation._take(2)
    with bench.database.write() as tx:
        tx.execute(update(table).where(table.c.id == lost.id).values(lease_until=now(-1)))
        assert jobs.rescue(tx, lost.id, 1, max_crashes=3) is Status.queued
        jobs.close_attempt(tx, lost.id, 1, Outcome.unknown, Billed.unknown)
    its_successor = claim_one(bench.database)
    generation._taken = {its: (permit, taken_at - 15) for its, (permit, taken_at) in generation._taken.items()}
    for claim in claims:
        generation.run_attempt(claim)
    assert backend.seen == []
    assert its_successor.job_id == lost.id and job_row(bench.database, lost.id).fence == its_successor.fence
    assert bench.attempt(lost.id) == ("canceled", "no"), "what was unknown is known now"
    row = job_row(bench.database, kept.id)
    assert (row.status, row.ready, row.failures, row.crashes) == ("queued", True, 0, 0)
    assert bench.attempt(kept.id) == ("canceled", "no") and generation._in_hand == {}


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
    job = submit(bench.database)
    generation = bench.generation(ScriptedBackend(PICTURE))
    store, calls = generation._closing.with_picture, 0

    def lose_the_answer(*args: Any) -> None:
        nonlocal calls
        calls += 1
        store(*args)
        if calls == 1:
            raise AWAY

    monkeypatch.setattr(generation._closing, "with_picture", lose_the_answer)
    generation.work()
    assert calls == 2
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert bench.images.get(job.id, 1) == DATA


def test_a_picture_is_kept_while_the_database_is_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(PICTURE)
    generation = bench.generation(backend)
    put, failures = bench.images.put, 5

    def away(*args: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise AWAY
        put(*args)

    monkeypatch.setattr(bench.images, "put", away)
    generation.work()
    assert failures == 0
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert len(backend.seen) == 1, "paid once"


# The breaker.


OUTAGE = Failure(Kind.transient, Billed.no, "HTTP 503")


class Clock:
    """Of a breaker; the test sets it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def breaker_of(clock: Clock, **options: Any) -> SharedBreaker:
    return SharedBreaker("dataoorts", clock=clock, **options)


def queued(bench: Bench) -> list[Any]:
    with bench.database.read() as connection:
        return list(connection.execute(select(table).where(table.c.status == Status.queued)))


def test_an_outage_burns_no_attempt_and_few_calls_and_then_every_job_succeeds(bench: Bench, clock: Clock) -> None:
    for _ in range(30):
        submit(bench.database)
    rung: list[None] = []
    backend = ScriptedBackend(OUTAGE)
    breaker = breaker_of(clock, closed=lambda: rung.append(None))
    generation = bench.generation(backend, breaker=breaker)
    generation.work()
    assert len(backend.seen) == 10, "then it is open"
    for probes in range(1, 13):
        bench.make_due()
        generation.work()
        clock.now += 5
        generation.work()
        assert len(backend.seen) == 10 + probes, "one each time"
    assert len(queued(bench)) == 30 and sum(row.failures for row in queued(bench)) == 0
    backend.answers = [PICTURE]
    bench.make_due()
    clock.now += 5
    assert not rung
    generation.work()
    assert rung == [None]
    assert queued(bench) == []


def hours_of_failure(bench: Bench, clock: Clock, generation: Generation, hours: float) -> None:
    """In turns: whoever has failed waits until after the next probe."""
    end = clock.now + hours * 3600
    while clock.now < end and (waiting := queued(bench)):
        if all(not row.ready for row in waiting):
            first = min(waiting, key=lambda row: row.attempts).id
            with bench.database.write() as tx:
                tx.execute(update(table).where(table.c.id == first).values(ready_at=now(-1)))
                jobs.make_ready(tx, first)
        generation.work()
        clock.now += 30


def test_a_job_that_fails_while_nothing_else_runs_ends_after_a_while(bench: Bench, clock: Clock) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(OUTAGE)
    hours_of_failure(bench, clock, bench.generation(backend, breaker=breaker_of(clock)), 1)
    row = job_row(bench.database, job.id)
    assert row.status == Status.failed and row.error["code"] == "backend_unavailable"
    assert len(backend.seen) < 40, "a quarter of an hour and three more"


def test_two_jobs_that_fail_while_nothing_else_runs_wait_for_the_end_of_the_outage(bench: Bench, clock: Clock) -> None:
    for _ in range(2):
        submit(bench.database)
    backend = ScriptedBackend(OUTAGE)
    generation = bench.generation(backend, breaker=breaker_of(clock))
    hours_of_failure(bench, clock, generation, 1)
    assert [row.failures for row in queued(bench)] == [0, 0]


def test_a_probe_whose_claim_could_not_be_committed_is_given_back(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be renewed for as long as this process lives, and no other one would ever be sent."""
    submit(bench.database)
    backend = ScriptedBackend(Failure(Kind.auth_failed, Billed.no, "HTTP 401"), PICTURE)
    generation = bench.generation(backend, breaker=breaker_of(clock))
    generation.work()
    assert len(backend.seen) == 1, "then the breaker is open"
    clock.now += 60
    bench.make_due()
    write = bench.database.write

    @contextmanager
    def full() -> Iterator[Connection]:
        with write() as tx:
            yield tx
            raise AWAY

    with monkeypatch.context() as patch:
        patch.setattr(bench.database, "write", full)
        generation.work()
    assert len(backend.seen) == 1, "the claim was nobody's"
    generation.work()
    assert len(backend.seen) == 2 and not queued(bench)


@pytest.mark.parametrize("kind", [Kind.auth_failed, Kind.quota_exhausted])
def test_one_wrong_key_is_enough_and_a_probe_a_minute_finds_out_that_it_was_mended(
    bench: Bench, clock: Clock, kind: Kind
) -> None:
    for _ in range(3):
        submit(bench.database)
    backend = ScriptedBackend(Failure(kind, Billed.no, "HTTP 401"))
    generation = bench.generation(backend, breaker=breaker_of(clock))
    for minute in range(1, 4):
        for _ in range(6):
            bench.make_due()
            generation.work()
            assert len(backend.seen) == minute
            clock.now += 10
    backend.answers = [PICTURE]
    generation.work()
    bench.make_due()
    generation.work()
    assert queued(bench) == []


def test_a_rate_limit_pauses_the_whole_backend(bench: Bench, clock: Clock) -> None:
    for _ in range(5):
        submit(bench.database)
    backend = ScriptedBackend(Failure(Kind.rate_limited, Billed.no, "HTTP 429", 7), PICTURE)
    generation = bench.generation(backend, breaker=breaker_of(clock))
    generation.work()
    clock.now += 6.9
    generation.work()
    assert len(backend.seen) == 1
    clock.now += 0.2
    generation.work()
    assert len(queued(bench)) == 1, "the one that was refused waits for as long as it was told to"


def test_what_one_job_did_holds_up_nobody(bench: Bench, clock: Clock) -> None:
    for _ in range(25):
        submit(bench.database)
    backend = ScriptedBackend(*[Failure(Kind.rejected, Billed.no, "no")] * 12, Failure(Kind.bad_output, Billed.yes, ""))
    bench.generation(backend, breaker=breaker_of(clock)).work()
    assert len(backend.seen) == 25


def test_an_attempt_of_an_outage_stands_in_the_books(bench: Bench, clock: Clock) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(OUTAGE)
    breaker = breaker_of(clock)
    generation = bench.generation(backend, breaker=breaker)
    for _ in range(12):
        generation.work()
        bench.make_due()
        clock.now += 5
    row = job_row(bench.database, job.id)
    assert (row.status, row.attempts, row.failures) == ("queued", 12, 0)
    assert bench.attempt(job.id, 12) == ("failed", "no")


def test_what_may_have_to_be_paid_counts_even_in_an_outage(bench: Bench, clock: Clock) -> None:
    for _ in range(4):
        submit(bench.database)
    backend = ScriptedBackend(Failure(Kind.transient, Billed.unknown, "timed out"))
    generation = bench.generation(backend, breaker=breaker_of(clock))
    for _ in range(40):
        generation.work()
        bench.make_due()
        clock.now += 60
    assert len(backend.seen) == 4 * 3, "each job at most max_attempts times, however long it lasts"
    with bench.database.read() as connection:
        assert set(connection.scalars(select(table.c.status))) == {"failed"}


def test_a_job_that_fails_alone_is_bounded_by_max_attempts(bench: Bench, clock: Clock) -> None:
    bad = submit(bench.database)
    others = 0

    def answer() -> Picture | Failure:
        return OUTAGE if backend.seen[-1].job_id == bad.id else PICTURE

    backend = ScriptedBackend(answer)
    generation = bench.generation(backend, breaker=breaker_of(clock))
    while job_row(bench.database, bad.id).status == Status.queued:
        submit(bench.database)
        others += 1
        generation.work()
        bench.make_due()
    row = job_row(bench.database, bad.id)
    assert (row.status, row.error["code"], row.attempts) == ("failed", "backend_unavailable", 4)
    assert queued(bench) == []


def test_a_backend_of_ones_own_answers_for_every_failure(bench: Bench, clock: Clock) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(OUTAGE)
    backend.capabilities = replace(backend.capabilities, hosted=False)
    generation = bench.generation(backend, breaker=breaker_of(clock))
    for _ in range(10):
        generation.work()
        bench.make_due()
    row = job_row(bench.database, job.id)
    assert (row.status, row.error["code"], row.attempts) == ("failed", "backend_unavailable", 3)


def test_a_job_that_always_fails_does_not_keep_the_breaker_open(bench: Bench, clock: Clock) -> None:
    bad = submit(bench.database)

    def answer() -> Picture | Failure:
        return OUTAGE if backend.seen[-1].job_id == bad.id else PICTURE

    backend = ScriptedBackend(answer)
    generation = bench.generation(backend, breaker=breaker_of(clock))
    for _ in range(10):
        generation.work()
        bench.make_due()
    other = submit(bench.database)
    clock.now += 5
    generation.work()  # the bad one is due too, and the first
    assert job_row(bench.database, other.id).status == Status.queued
    clock.now += 5
    generation.work()
    assert job_row(bench.database, other.id).status == Status.succeeded


def test_a_probe_that_finds_no_job_or_no_database_makes_room_for_the_next(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(bench.database)
    backend = ScriptedBackend(Failure(Kind.auth_failed, Billed.no, "HTTP 401"), PICTURE)
    generation = bench.generation(backend, breaker=breaker_of(clock))
    generation.work()
    clock.now += 60
    generation.work()  # its job still waits
    bench.make_due()
    claim = jobs.claim

    def away(*_: Any, **__: Any) -> None:
        raise AWAY

    monkeypatch.setattr(jobs, "claim", away)
    generation.work()
    monkeypatch.setattr(jobs, "claim", claim)
    generation.work()
    assert queued(bench) == [] and len(backend.seen) == 2


def test_a_probe_that_is_given_back_unsent_makes_room_for_the_next(bench: Bench, clock: Clock) -> None:
    submit(bench.database)
    breaker = breaker_of(clock)
    breaker.ended(breaker.admit(1, 0), Failure(Kind.auth_failed, Billed.no, "HTTP 401"), "job_1")
    clock.now += 60
    generation = bench.generation(ScriptedBackend(PICTURE), breaker=breaker)
    [claim] = generation._take(1)
    assert breaker.admit(1, 0).calls == 0
    bench.stopping.set()
    generation.run_attempt(claim)
    assert breaker.admit(1, 0).probe is not None


@pytest.mark.parametrize("what", ["refused by the backend's own code", "its image is gone"])
def test_a_probe_that_asked_nobody_closes_nothing_and_makes_room_for_the_next(
    bench: Bench, clock: Clock, what: str
) -> None:
    gone = what == "its image is gone"
    submit(bench.database, **({"input": ALTERING} if gone else {}))
    breaker = breaker_of(clock)
    breaker.ended(breaker.admit(1, 0), Failure(Kind.auth_failed, Billed.no, "HTTP 401"), "job_1")
    clock.now += 60
    unasked = Failure(Kind.rejected, Billed.no, "there is no such model", asked=False)
    bench.generation(ScriptedBackend(PICTURE if gone else unasked), breaker=breaker).work()
    assert queued(bench) == [], "the job has failed"
    permit = breaker.admit(1, 0)
    assert permit.probe is not None, "it is open, and the next probe goes at once"
    breaker.ended(permit, Failure(Kind.rejected, Billed.no, "HTTP 400"), "job_1")
    assert breaker.admit(1, 0).probe is None, "a verdict of the vendor's own closes it"


def test_a_failure_is_the_same_after_it_went_to_another_process() -> None:
    there = pickle.loads(pickle.dumps(Failure(Kind.rejected, Billed.no, "no such model", 7.0, asked=False)))  # noqa: S301
    assert (there.kind, there.billed, there.message, there.retry_after, there.asked) == (
        *(Kind.rejected, Billed.no, "no such model", 7.0),
        False,
    )


def test_a_probe_whose_picture_nobody_can_judge_closes_the_breaker(bench: Bench, clock: Clock) -> None:
    submit(bench.database)
    breaker = breaker_of(clock)
    breaker.ended(breaker.admit(1, 0), Failure(Kind.auth_failed, Billed.no, "HTTP 401"), "job_1")
    clock.now += 60
    backend = ScriptedBackend(UNJUDGED)
    backend.judgements = [Failure(Kind.bad_output, Billed.yes, "cut short")]
    bench.generation(backend, breaker=breaker).work()
    assert breaker.admit(1, 0) == Permit(1, 2)


# The spool.


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool")
    yield spool
    spool.close()


def spooled(tmp_path: Path) -> list[bytes]:
    return [path.read_bytes() for path in (tmp_path / "spool").rglob("*.picture")]


def test_a_picture_is_on_the_disk_from_its_arrival_until_its_job_has_it(
    bench: Bench, spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(bench.database)
    there: list[list[bytes]] = []

    def judging() -> Picture:
        backend.receive()
        there.append(spooled(tmp_path))
        return PICTURE

    put = bench.images.put

    def putting(*args: Any) -> None:
        there.append(spooled(tmp_path))
        put(*args)

    def committed(moved: list[str]) -> None:
        if job_row(bench.database, job.id).status == Status.succeeded:
            there.append(spooled(tmp_path))

    monkeypatch.setattr(bench.images, "put", putting)
    bench.database.after_commit = committed
    backend = ScriptedBackend(judging)
    bench.generation(backend, spool).work()
    assert there == [[DATA]] * 3, "while it is judged, while it is put, and when the job points at it"
    assert spooled(tmp_path) == []


def test_a_picture_that_is_not_whole_leaves_the_spool_when_that_is_written_down(
    bench: Bench, spool: Spool, tmp_path: Path
) -> None:
    job = submit(bench.database)
    there: list[list[bytes]] = []

    def requeued(moved: list[str]) -> None:
        if job_row(bench.database, job.id).failures:
            there.append(spooled(tmp_path))

    bench.database.after_commit = requeued
    bench.generation(ScriptedBackend(Failure(Kind.bad_output, Billed.yes, "cut short")), spool).work()
    assert there == [[DATA]] and spooled(tmp_path) == []
    assert bench.attempt(job.id) == ("failed", "yes")


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_picture_that_nobody_can_judge_is_held_until_somebody_can(
    bench: Bench, spool: Spool, tmp_path: Path, on_disk: bool
) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(UNJUDGED)
    backend.judgements = [UNJUDGED, UNJUDGED, PICTURE]
    bench.generation(backend, spool if on_disk else None).work()
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert backend.judged == [DATA] * 3
    assert len(backend.seen) == 1, "paid once"
    assert spooled(tmp_path) == []


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "returned"])
def test_a_fault_between_a_picture_and_its_judgement_costs_no_second_payment(
    bench: Bench, spool: Spool, tmp_path: Path, raised: bool
) -> None:
    job = submit(bench.database)

    def receive_and_break() -> Failure:
        backend.receive()
        if raised:
            raise OSError("too many open files")
        return Failure(Kind.internal, Billed.unknown, "the backend failed; the fault is ours")

    backend = ScriptedBackend(receive_and_break)
    bench.generation(backend, spool).work()
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert len(backend.seen) == 1 and backend.judged == [DATA] and spooled(tmp_path) == []


def test_a_picture_that_is_judged_late_may_still_be_bad(bench: Bench, spool: Spool, tmp_path: Path) -> None:
    job = submit(bench.database)
    backend = ScriptedBackend(UNJUDGED)
    backend.judgements = [UNJUDGED, Failure(Kind.bad_output, Billed.yes, "cut short")]
    bench.generation(backend, spool).work()
    row = job_row(bench.database, job.id)
    assert (row.status, row.failures) == ("queued", 1)
    assert bench.attempt(job.id) == ("failed", "yes") and spooled(tmp_path) == []


@pytest.mark.parametrize("what", ["picture", "unjudged", "bad output"])
def test_a_worker_that_is_to_stop_leaves_a_picture_that_it_cannot_store_on_the_spool(
    bench: Bench, spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    job = submit(bench.database)
    asked: list[None] = []

    def stop_and_fail(*_: Any) -> Any:
        asked.append(None)
        bench.stopping.set()
        raise UNJUDGED if what == "unjudged" else AWAY

    bad = Failure(Kind.bad_output, Billed.yes, "cut short")
    answers: dict[str, Picture | Failure] = {"picture": PICTURE, "unjudged": UNJUDGED, "bad output": bad}
    backend = ScriptedBackend(answers[what])
    generation = bench.generation(backend, spool)
    monkeypatch.setattr(generation._closing, "with_picture", stop_and_fail)
    monkeypatch.setattr(generation._closing, "with_failure", stop_and_fail)
    if what == "unjudged":
        monkeypatch.setattr(backend, "judge", stop_and_fail)
    generation.work()
    assert len(asked) == 1
    assert spooled(tmp_path) == [DATA]
    assert job_row(bench.database, job.id).status == Status.running, "until the next worker offers it, or the rescue"


def test_a_picture_that_the_disk_does_not_give_back_is_left_for_the_next_look(
    bench: Bench, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(bench.database)

    def broken(_: Entry) -> bytes:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as disk:
        disk.setattr(Entry, "read", broken)
        with pytest.raises(OSError, match="input/output error"):
            bench.generation(ScriptedBackend(PICTURE), spool).work()
    [left] = spool.left_behind()
    assert (left.job_id, left.attempt, left.read()) == (job.id, 1, DATA)
    assert job_row(bench.database, job.id).status == Status.running, "until it is offered, or the rescue"


def test_a_worker_that_is_to_stop_holds_on_to_a_picture_that_is_not_on_the_disk(
    bench: Bench, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(bench.database)
    generation = bench.generation(ScriptedBackend(PICTURE), spool)
    monkeypatch.setattr(generation, "_keep", Entry)  # what the spool gives when the disk is full
    generation.STOPPING_SECONDS = 0.0  # for what is no picture
    put, failures = bench.images.put, 3

    def away(*args: Any) -> None:
        nonlocal failures
        bench.stopping.set()
        if failures:
            failures -= 1
            raise AWAY
        put(*args)

    monkeypatch.setattr(bench.images, "put", away)
    generation.work()
    assert failures == 0
    assert job_row(bench.database, job.id).status == Status.succeeded


@pytest.mark.parametrize("what", ["a failure", "a bad picture in memory", "a claim", "an image to start from"])
def test_a_worker_that_is_to_stop_tells_a_database_that_is_away_of_nothing_but_pictures_for_long(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The lease gives the job back, and the sweep closes the attempt."""
    monkeypatch.setattr("worker.generation.time", SimpleNamespace(monotonic=clock, sleep=lambda seconds: None))
    job = submit(bench.database, input=ALTERING, starts_from=(PIXELS, WHITE))
    bad = Failure(Kind.bad_output, Billed.yes, "cut short")
    backend = ScriptedBackend(bad if what == "a bad picture in memory" else OUTAGE)
    generation = bench.generation(backend)
    claim = claim_one(bench.database)
    tries = 0

    def away(*_: Any, **__: Any) -> Any:
        nonlocal tries
        tries += 1
        clock.now += generation.STOPPING_SECONDS / 3
        assert tries < 1000, "it goes on for ever"
        if tries == 3:
            bench.stopping.set()
        raise AWAY

    if what == "a claim":
        bench.stopping.set()
        monkeypatch.setattr(jobs, "release", away)
    elif what == "an image to start from":
        monkeypatch.setattr(inputs, "read", away)
    else:
        monkeypatch.setattr(generation._closing, "with_failure", away)
    generation.run_attempt(claim)
    assert tries > 3, "and not at the first try"
    assert job_row(bench.database, job.id).status == Status.running
    assert bench.attempt(job.id) == ("running", "unknown")


def test_a_full_disk_costs_no_picture(bench: Bench, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    job = submit(bench.database)
    backend = ScriptedBackend(PICTURE)
    bench.generation(backend, spool).work()
    assert job_row(bench.database, job.id).status == Status.succeeded
    assert bench.images.get(job.id, 1) == DATA and len(backend.seen) == 1


def test_a_picture_that_cannot_be_stored_for_a_fault_of_ours_is_offered_again_by_its_own_worker(
    bench: Bench, spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would look at it for as long as its worker lives, and its job would be paid again."""
    job = submit(bench.database)
    backend = ScriptedBackend(PICTURE)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(bench.images, "put", broken)
        with pytest.raises(ZeroDivisionError):
            bench.generation(backend, spool).work()
    assert spooled(tmp_path) == [DATA] and bench.attempt(job.id) == ("running", "unknown")
    Recovery(bench.database, Closing(bench.database, bench.images), backend, spool, bench.stopping).round()
    assert job_row(bench.database, job.id).status == Status.succeeded and bench.attempt(job.id) == ("succeeded", "yes")
    assert spooled(tmp_path) == [] and len(backend.seen) == 1


def test_a_picture_waits_for_a_database_that_only_reads(spool: Spool, postgresql_url: str) -> None:
    """As after a failover to a standby. It has one connection here, and the next one leads to who may write."""
    database = Database(postgresql_url, connections=1)
    bench = Bench(database)
    job = submit(database)
    given_up: list[None] = []

    def look() -> Picture:
        backend.receive(DATA)
        with database.read() as connection:
            connection.execute(text("SET default_transaction_read_only = on"))
        event.listen(database.engine, "invalidate", lambda *_: given_up.append(None))
        return PICTURE

    backend = ScriptedBackend(look)
    bench.generation(backend, spool).work()
    assert job_row(database, job.id).status == Status.succeeded and len(backend.seen) == 1
    assert given_up == [None]
    bench.leases._database.close()
    database.close()


def test_nothing_is_claimed_before_it_may_be(bench: Bench) -> None:
    job = submit(bench.database)
    answers = iter([False, True, True])
    generation = bench.generation(ScriptedBackend(PICTURE), may_claim=lambda: next(answers))
    generation.work()
    assert job_row(bench.database, job.id).status == Status.queued
    generation.work()
    assert job_row(bench.database, job.id).status == Status.succeeded


class SharingBackend(ScriptedBackend):
    """One whose jobs share its room: two at once, and what is in hand counts."""

    capabilities = Capabilities(256, 2048, 8, 20, True, True, True, False, 2)

    def __init__(self, *answers: Answer) -> None:
        super().__init__(*answers)
        self.in_hand: list[int] = []
        self.canceled_when_asked: list[bool] = []

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool] | None:
        self.in_hand.append(len(in_hand))
        places = 2 - len(in_hand)

        def fits(input: Mapping[str, Any]) -> bool:
            nonlocal places
            places -= 1
            return places >= 0

        return fits

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        progress(0, 3, 20, b"jpeg")
        self.canceled_when_asked.append(canceled(0))
        return super().generate(requests, progress, canceled)


def test_jobs_that_share_a_backend_are_claimed_as_it_has_room_for_them(bench: Bench) -> None:
    for _ in range(3):
        submit(bench.database)
    inside: list[int] = []
    rung: list[int] = []

    def one_more_at_a_time() -> Picture:
        if len(inside) < 2:
            inside.append(len(inside))
            generation.work()  # as another thread would: it finds room for one, then for none
        return PICTURE

    backend = SharingBackend(one_more_at_a_time)
    generation = bench.generation(backend, more=rung.append)
    generation.work()
    assert backend.in_hand[:3] == [0, 1, 2], "what is in hand is known before each claim"
    with bench.database.read() as connection:
        assert set(connection.scalars(select(table.c.status))) == {"succeeded"}
    assert len(rung) >= 3, "whenever the backend is done with one, somebody is called who may take another"


def test_how_far_a_job_is_and_whether_it_is_wanted_goes_both_ways(bench: Bench) -> None:
    job = submit(bench.database)
    told: list[tuple[str, Report]] = []
    backend = SharingBackend(PICTURE)
    bench.generation(backend, tell=lambda job_id, report: told.append((job_id, report))).work()
    assert told == [(job.id, Report(1, 3, 20, b"jpeg"))]
    assert backend.canceled_when_asked == [False]


def test_an_attempt_that_was_stopped_counts_as_canceled(bench: Bench) -> None:
    job = submit(bench.database)

    def cancel() -> Failure:
        with bench.database.write() as tx:
            jobs.cancel(tx, job.id)
        return Failure(Kind.canceled, Billed.no, "canceled")

    bench.generation(SharingBackend(cancel)).work()
    assert bench.attempt(job.id) == ("canceled", "no")
    assert job_row(bench.database, job.id).status == "canceled"


@pytest.mark.parametrize(
    ("answered", "told"),
    [
        (PICTURE, {"outcome": "succeeded", "billed": "yes"}),
        (Failure(Kind.rejected, Billed.no, "no"), {"outcome": "failed", "billed": "no", "kind": "rejected"}),
    ],
)
def test_an_attempt_that_ended_is_told_in_one_line(bench: Bench, answered: Any, told: dict[str, str]) -> None:
    job = submit(bench.database, request_id="asked-so")
    with written() as lines:
        bench.generation(ScriptedBackend(answered)).work()
    [line] = lines.as_json(logger="worker.generation")
    its = {"job_id": job.id, "attempt": 1, "backend": "dataoorts", "request_id": "asked-so"}
    assert line.items() >= (its | told).items() and 0 <= line["seconds"] < 60
    assert ("kind" in line) == ("kind" in told)


def test_every_line_of_an_attempt_names_its_job_and_none_the_prompt(bench: Bench) -> None:
    prompt = "a canary that sings"
    job = submit(bench.database, input={"prompt": prompt})

    def break_off() -> Picture:
        raise ValueError(f"can't draw {prompt}")

    with written() as lines:
        bench.generation(ScriptedBackend(break_off)).work()
    said = lines.as_json()
    assert [line["message"] for line in said] == ["the attempt broke off", "the attempt ended"]
    assert {line["job_id"] for line in said} == {job.id}
    assert "ValueError" in said[0]["exception"] and prompt not in lines.getvalue()


PIXELS = Input("image", "image/png", 640, 480, "a" * 64, b"an image")
WHITE = Input("mask", "image/png", 640, 480, "b" * 64, b"a mask")
ALTERING = {"prompt": "x", "strength": 0.5, "image": PIXELS.description(), "mask": WHITE.description()}


def test_what_a_job_starts_from_is_handed_over_as_it_was_sent(bench: Bench) -> None:
    both = submit(bench.database, input=ALTERING, starts_from=(PIXELS, WHITE))
    without_mask = {name: value for name, value in ALTERING.items() if name != "mask"}
    alone = submit(bench.database, input=without_mask, starts_from=(PIXELS,))
    plain = submit(bench.database, input={"prompt": "x"})
    backend = ScriptedBackend(PICTURE)
    bench.generation(backend).work()
    assert [(request.job_id, request.image, request.mask) for request in backend.seen] == [
        (both.id, b"an image", b"a mask"),
        (alone.id, b"an image", None),
        (plain.id, None, None),
    ]
    assert backend.seen[0].input == ALTERING


def test_no_connection_is_held_while_an_image_is_altered(bench: Bench) -> None:
    submit(bench.database, input=ALTERING, starts_from=(PIXELS, WHITE))
    held: list[int] = []

    def look() -> Picture:
        held.append(bench.database.engine.pool.checkedout())  # type: ignore[attr-defined]
        return PICTURE

    bench.generation(ScriptedBackend(look)).work()
    assert held == [0]


class Trouble:
    """What is asked of it fails so many times, and is then done."""

    def __init__(self, times: int, done: Callable[..., Any], meanwhile: Callable[[], object] = lambda: None) -> None:
        self.left, self._done, self._meanwhile = times, done, meanwhile

    def __call__(self, *given: Any) -> Any:
        if self.left:
            self.left -= 1
            self._meanwhile()
            raise AWAY
        return self._done(*given)


def test_a_database_that_is_away_when_the_image_is_wanted_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(bench.database, input=ALTERING, starts_from=(PIXELS, WHITE))
    trouble = Trouble(3, inputs.read)
    monkeypatch.setattr(inputs, "read", trouble)
    backend = ScriptedBackend(PICTURE)
    bench.generation(backend).work()
    assert trouble.left == 0 and [request.image for request in backend.seen] == [b"an image"]
    row = job_row(bench.database, job.id)
    assert (row.status, row.attempts, row.failures, row.refusals) == ("succeeded", 1, 0, 0)


def test_a_worker_that_is_asked_to_stop_while_it_waits_for_the_image_gives_the_job_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(bench.database, input=ALTERING, starts_from=(PIXELS, WHITE))
    monkeypatch.setattr(inputs, "read", Trouble(2, inputs.read, meanwhile=bench.stopping.set))
    backend = ScriptedBackend(PICTURE)
    bench.generation(backend).work()
    row = job_row(bench.database, job.id)
    assert backend.seen == [] and (row.status, row.failures, row.crashes) == ("queued", 0, 0)
    assert bench.attempt(job.id) == ("canceled", "no")


@pytest.mark.parametrize(
    ("kept", "said"), [((), "The image and the mask of"), ((PIXELS,), "The mask of"), ((WHITE,), "The image of")]
)
def test_a_job_whose_image_is_gone_says_so_and_calls_nobody(bench: Bench, kept: tuple[Input, ...], said: str) -> None:
    job = submit(bench.database, input=ALTERING, starts_from=kept)
    backend = ScriptedBackend(PICTURE)
    bench.generation(backend).work()
    row = job_row(bench.database, job.id)
    assert backend.seen == [] and row.status == "failed"
    assert row.error == {
        "code": "rejected",
        "message": f"{said} this job can't be found any more.",
        "retryable": False,
        "billed": "no",
    }
    assert bench.attempt(job.id) == ("failed", "no")
