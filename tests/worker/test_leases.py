"""The heartbeat: it renews what this process holds and nothing else, and finds out what it lost."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from shared import jobs
from shared.database import Database, now
from shared.tables import jobs as table
from tests.lives import SUBMISSION, TERMS, claim_one, job_row, submit
from tests.service import eventually
from worker.leases import Leases


@pytest.fixture
def leases(database: Database) -> Iterator[Leases]:
    """They beat when a test says so: the thread would renew, by chance, between two lines of it."""
    leases = Leases(database, 20)
    yield leases
    leases._database.close()


def test_a_beat_renews_what_is_held_and_only_that(database: Database, leases: Leases) -> None:
    submit(database), submit(database)
    held, other = claim_one(database), claim_one(database)
    with database.write() as tx:
        tx.execute(update(table).values(lease_until=now(1)))
    before = {claim.job_id: job_row(database, claim.job_id).lease_until for claim in (held, other)}
    with leases.holding(held):
        leases.renew()
    assert job_row(database, held.job_id).lease_until > before[held.job_id]
    assert job_row(database, other.job_id).lease_until == before[other.job_id]


def test_what_was_let_go_is_not_renewed(database: Database, leases: Leases) -> None:
    submit(database)
    claim = claim_one(database)
    with leases.holding(claim):
        pass
    before = job_row(database, claim.job_id).lease_until
    leases.renew()
    assert job_row(database, claim.job_id).lease_until == before


def test_a_claim_that_somebody_else_decided_about_is_known_as_lost(database: Database, leases: Leases) -> None:
    submit(database), submit(database)
    kept, taken = claim_one(database), claim_one(database)
    with leases.holding(kept), leases.holding(taken):
        with database.write() as tx:
            tx.execute(update(table).where(table.c.id == taken.job_id).values(lease_until=now(-1)))
            jobs.rescue(tx, taken.job_id, taken.fence, max_crashes=3)
        leases.renew()
        assert leases.lost(taken) and not leases.lost(kept)
    assert not leases.lost(taken), "forgotten once it is let go"


def test_a_claim_that_was_taken_away_is_found_out_as_soon_as_somebody_says_so(database: Database) -> None:
    submit(database), submit(database)
    taken, other = claim_one(database), claim_one(database)
    beats: list[object] = []
    leases = Leases(database, 20, beats.append)
    leases.LONGEST_BEAT_SECONDS = leases._lease_seconds = 14400  # a beat an hour
    leases.start()
    eventually("the first beat", lambda: beats)
    with leases.holding(taken):
        with database.write() as tx:
            assert jobs.cancel(tx, taken.job_id)
        leases.look_again(other.job_id)
        assert not leases._hurry.is_set() and len(beats) == 1, "not held here"
        leases.look_again(taken.job_id)
        eventually("it is known as lost", lambda: leases.lost(taken))
    leases.close()


def test_the_heartbeat_beats_by_itself(database: Database) -> None:
    submit(database)
    claim = claim_one(database)
    before = job_row(database, claim.job_id).lease_until
    leases = Leases(database, 0.2)  # a beat every 50 ms
    leases.start()
    with leases.holding(claim):
        eventually("a beat", lambda: job_row(database, claim.job_id).lease_until != before)
    leases.close()


def test_more_claims_than_one_statement_takes_are_all_renewed(database: Database, leases: Leases) -> None:
    with database.write() as tx:
        for _ in range(30):
            jobs.submit(tx, **SUBMISSION)
        claims = jobs.claim(tx, "dataoorts", TERMS, limit=30)
        tx.execute(update(table).values(lease_until=now(1)))
    leases.CHUNK = 7
    with ExitStack() as stack:
        for claim in claims:
            stack.enter_context(leases.holding(claim))
        leases.renew()
    with database.read() as connection:
        lapsing = connection.execute(table.select().where(table.c.lease_until < now(5))).all()
    assert lapsing == []


@pytest.mark.parametrize("error", [OperationalError("INSERT", {}, Exception("disk full")), ZeroDivisionError()])
def test_a_worker_that_cannot_show_itself_renews_what_it_holds_all_the_same(
    database: Database, error: Exception
) -> None:
    def present(tx: object) -> None:
        raise error

    submit(database)
    claim = claim_one(database)
    leases = Leases(database, 60, present)
    with database.write() as tx:
        tx.execute(update(table).values(lease_until=now(1)))
    with leases.holding(claim), pytest.raises(type(error)):
        leases.renew()
    with database.read() as connection:
        assert connection.scalar(select(table.c.id).where(table.c.lease_until > now(10))) == claim.job_id
    leases._database.close()


def test_after_failed_beats_nothing_is_to_be_claimed_until_they_are_well_again_for_a_while(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a picture that waits for room on the database's disk is paid again, when its job was rescued meanwhile."""
    monkeypatch.setattr(Leases, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(Leases, "STEADY_SECONDS", 3600.0)  # it passes below, and not before
    leases, full = Leases(database, 0.04), True
    real = leases.renew

    def renew() -> None:
        if full:
            raise OperationalError("UPDATE", {}, Exception("No space left on device"))
        real()

    monkeypatch.setattr(leases, "renew", renew)
    assert leases.steady(), "before the first beat"
    leases.start()
    try:
        eventually("it knows that its leases are not renewed", lambda: not leases.steady())
        full = False
        eventually("its beats are well again", lambda: leases._steady_at < float("inf"))
        assert not leases.steady(), "what waits to be stored comes first"
        leases._steady_at -= 3600.0
        assert leases.steady(), "and it may claim again"
    finally:
        leases.close()
