"""Tallies: each thing once, whatever is killed, done twice, or done by two at once."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, func, insert, select, text

from shared import deliveries, jobs, tallies
from shared.database import Database, now
from shared.deliveries import Result
from shared.errors import JobErrorCode
from shared.jobs import JobError
from shared.routing import RoutingReason
from shared.tables import Billed, Outcome, Status, TryOutcome, attempts, delivery_tries, projects
from shared.tables import deliveries as delivery_rows
from shared.tables import jobs as table
from shared.tallies import Series
from tests.lives import TERMS, an_image, claim_one, ended, job_row, plan, submit
from worker import tallying
from worker.feed import Feed

BACKENDS = ("dataoorts", "diffusers")
WEBHOOK = {"url": "https://hooks.example/x", "events": ["job.succeeded"]}


@pytest.fixture(autouse=True)
def a_project(database: Database) -> None:
    with database.write() as tx:
        tx.execute(insert(projects).values(id="prj_a", name="a", created_at=now()))


def tallied(database: Database) -> dict[Series, int]:
    with database.read() as connection:
        return {series: amount for series, amount in tallies.read(connection).items() if amount}


def tally(database: Database) -> None:
    feed = Feed(database)
    while feed.round() or tallying.fold(database):
        pass


def moved_on(database: Database, job_id: str) -> None:
    """To the other backend, if it waits."""
    source = job_row(database, job_id).backend
    [target] = set(BACKENDS) - {source}
    with database.write() as tx:
        jobs.reroute(tx, job_id, source=source, target=target, reason=RoutingReason.breaker_open, sandbox=False)


def some_life(database: Database, dice: random.Random) -> None:
    """One job that moves about: any of its moves, in any order that is allowed."""
    job = submit(database, webhook=WEBHOOK)
    for _ in range(dice.randint(0, 4)):
        if dice.random() < 0.4:
            moved_on(database, job.id)
        with database.write() as tx:
            claims = jobs.claim(tx, dice.choice(BACKENDS), TERMS)
            for claim in claims:
                match dice.randrange(6):
                    case 0:
                        jobs.succeed(tx, claim, an_image(claim))
                        jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.succeeded, Billed.yes)
                    case 1:
                        error = JobError(JobErrorCode.rejected, "No.", False, Billed.no)
                        jobs.fail(tx, claim, error)
                        jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.failed, Billed.no)
                    case 2:
                        jobs.requeue(tx, claim, reason="transient", after_seconds=0, counts=True)
                        jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.failed, Billed.unknown)
                    case 3:
                        jobs.release(tx, claim, reason="worker_stopping")
                        jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.canceled, Billed.no)
                    case 4:
                        jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.unknown, Billed.unknown)
                        jobs.adopt(tx, an_image(claim))
                    case _:
                        jobs.cancel(tx, claim.job_id)
        if dice.random() < 0.2:
            with database.write() as tx:
                jobs.cancel(tx, job.id)
        if dice.random() < 0.3:
            with database.write() as tx:
                for sent in deliveries.claim(tx, "w", limit=2, probes=2):
                    outcome = dice.choice([TryOutcome.delivered, TryOutcome.failed])
                    deliveries.settle(tx, sent, Result(outcome, 0.1, 200, final=True))


def as_it_stands(database: Database) -> dict[Series, int]:
    """The same, counted the slow way."""
    with database.read() as connection:

        def by(*columns: Any) -> Counter[Series]:
            query = select(*columns, func.count()).group_by(*columns)
            return Counter({tuple(row[:-1]): row[-1] for row in connection.execute(query)})

        standing, ends = by(table.c.status), by(attempts.c.backend, attempts.c.outcome)
        queued = by(table.c.status, table.c.backend)
        closed = attempts.c.outcome != Outcome.running
        found: Counter[Series] = Counter({("jobs_submitted",): standing.total()})
        for status in ("succeeded", "failed", "canceled", "expired"):
            found["jobs_ended", status] = standing[status,]
        for backend in BACKENDS:
            here = attempts.c.backend == backend, closed
            spend = select(func.sum(attempts.c.price)).where(*here, attempts.c.billed != Billed.no)
            unknown = select(func.count()).where(*here, attempts.c.billed == Billed.unknown)
            found["queued", backend] = queued[Status.queued, backend]
            found["spend", backend] = connection.scalar(spend) or 0
            found["billed_unknown", backend] = connection.scalar(unknown) or 0
            for outcome in ("succeeded", "failed", "unknown", "canceled"):
                found["attempts", backend, outcome] = ends[backend, outcome]
        for (outcome,), count in by(delivery_tries.c.outcome).items():
            found["tries", outcome] = count if outcome != TryOutcome.running else 0
        for (status,), count in by(delivery_rows.c.status).items():
            found["deliveries", status] = count
    return {series: amount for series, amount in found.items() if amount}


def without_times(amounts: dict[Series, int]) -> dict[Series, int]:
    return {series: amount for series, amount in amounts.items() if not series[0].startswith("time_to")}


@pytest.mark.parametrize("often", [True, False])
def test_tallies_are_what_a_count_of_all_rows_would_say(database: Database, *, often: bool) -> None:
    dice = random.Random(7)
    for _ in range(40):
        some_life(database, dice)
        if often:
            tally(database)
    tally(database)
    found = tallied(database)
    assert without_times(found) == as_it_stands(database)
    expected = {"jobs_ended", "attempts", "spend", "billed_unknown", "deliveries", *({"tries"} if often else ())}
    assert {series[0] for series in found} >= expected
    ends = sum(amount for series, amount in found.items() if series[0] == "jobs_ended")
    timed = {series: amount for series, amount in found.items() if series[0] == "time_to_end" and series[2] != "sum"}
    assert sum(timed.values()) == ends


class Killed(Exception):
    pass


def test_a_job_that_was_moved_on_is_counted_where_it_waits_however_late_it_is_tallied(database: Database) -> None:
    for often in (True, False):
        job = submit(database)
        for count in range(3):
            moved_on(database, job.id)
            if often:
                tally(database)
                assert tallied(database)["queued", BACKENDS[(count + 1) % 2]] == 1
        with database.write() as tx:
            [claim] = jobs.claim(tx, "diffusers", TERMS)
        ended(database, claim)
        tally(database)
        assert {series for series in tallied(database) if series[0] == "queued"} == set()
    assert without_times(tallied(database)) == as_it_stands(database)
    assert {series[1] for series in tallied(database) if series[0] == "time_to_start"} == {"diffusers"}


def test_who_is_killed_before_the_commit_has_counted_nothing_and_the_next_counts_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(database, webhook=WEBHOOK)
    ended(database, claim_one(database))
    write = database.write

    @contextmanager
    def dying() -> Iterator[Connection]:
        with write() as tx:
            yield tx
            raise Killed

    monkeypatch.setattr(database, "write", dying)
    with pytest.raises(Killed):
        Feed(database).round()
    with pytest.raises(Killed):
        tallying.fold(database)
    assert tallied(database) == {}
    monkeypatch.undo()
    for _ in range(2):
        tally(database)
    assert without_times(tallied(database)) == as_it_stands(database)


def test_what_is_tallied_again_is_not_counted_again(database: Database) -> None:
    submit(database)
    ended(database, claim_one(database))
    tally(database)
    first = tallied(database)
    tally(database)
    assert tallied(database) == first


@pytest.mark.slow
def test_four_sweeps_at_once_count_each_thing_once(database: Database) -> None:
    dice = random.Random(3)
    over, errors = threading.Event(), []

    def sweep() -> None:
        feed = Feed(database)
        while not over.is_set():
            try:
                feed.round()
                tallying.fold(database)
            except Exception as error:  # noqa: BLE001  it is raised again
                errors.append(error)
                return

    sweeps = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in sweeps:
        thread.start()
    for _ in range(40):
        some_life(database, dice)
    over.set()
    for thread in sweeps:
        thread.join(60)
    assert errors == []
    tally(database)
    assert without_times(tallied(database)) == as_it_stands(database)


def test_where_there_is_nothing_to_tally_nothing_is_locked(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_writing() -> None:
        raise AssertionError("it opened a transaction")

    monkeypatch.setattr(database, "write", no_writing)
    assert tallying.fold(database) is False


def test_a_fold_stops_at_its_limit_and_says_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallying, "AT_MOST", 2)
    for _ in range(3):
        submit(database)
        ended(database, claim_one(database))
    assert [tallying.fold(database) for _ in range(3)] == [True, False, False]
    assert tallied(database)["attempts", "dataoorts", "succeeded"] == 3


def test_what_is_to_be_tallied_is_found_by_its_index(database: Database) -> None:
    """Enough attempts that a plan without the index would be the worse one."""
    job = submit(database)
    row = {"job_id": job.id, "backend": "dataoorts", "worker": "w", "price": 1, "billed": "yes", "outcome": "succeeded"}
    with database.write() as tx:
        given = insert(attempts).values(started_at=now(), deadline_at=now(), completed_at=now(), tallied="succeeded")
        tx.execute(given, [{**row, "number": number} for number in range(1, 1001)])
        tx.execute(text("ANALYZE"))
    some = tallying.changed(attempts, attempts.c.outcome, attempts.c.completed_at)
    assert "ix_attempts_not_tallied" in plan(database, some)


def test_a_clock_that_was_set_back_makes_no_negative_time(database: Database) -> None:
    job = submit(database)
    counted = tallies.took(("time_to_end", "failed"), job.queue_until, job.created_at)
    assert counted == {("time_to_end", "failed", "0.1"): 1, ("time_to_end", "failed", "sum"): 0}
