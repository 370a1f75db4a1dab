"""Claims for many threads at once."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from shared import jobs
from shared.database import Database
from tests.lives import TERMS, submit
from worker.claims import Claims


def claims_of(database: Database, more: Callable[[int], None] = lambda count: None) -> Claims[jobs.Claim]:
    def take(limit: int) -> list[jobs.Claim]:
        with database.write() as tx:
            return jobs.claim(tx, "dataoorts", TERMS, limit=limit)

    return Claims(take, more)


def test_threads_that_wait_while_one_claims_are_served_together_and_each_gets_another_job(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = {submit(database).id for _ in range(70)}
    claims, first, go = claims_of(database), threading.Event(), threading.Event()
    transactions: list[int] = []
    real = jobs.claim

    def slow(*arguments: object, limit: int = 1) -> list[jobs.Claim]:
        transactions.append(limit)
        first.set()
        assert go.wait(30)
        return real(*arguments, limit=limit)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "claim", slow)
    with ThreadPoolExecutor(80) as pool:
        one = pool.submit(claims.next)
        assert first.wait(30)
        others = [pool.submit(claims.next) for _ in range(74)]
        while len(claims._waiting) < 74:
            pass
        go.set()
        taken = [future.result() for future in (one, *others)]
    assert sorted(claim.job_id for claim in taken if claim) == sorted(submitted)
    assert taken.count(None) == 5
    assert transactions == [1, 32, 32, 10]


def test_nobody_gets_a_job_while_the_database_is_away_and_nobody_hangs(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(database)
    claims = claims_of(database)

    def away(*_: object, **__: object) -> list[jobs.Claim]:
        raise OperationalError("claim", {}, Exception("away"))

    with monkeypatch.context() as patch, ThreadPoolExecutor(10) as pool:
        patch.setattr(jobs, "claim", away)
        assert [future.result() for future in [pool.submit(claims.next) for _ in range(10)]] == [None] * 10
    assert claims.next() is not None


def test_a_claim_whose_commit_failed_is_nobodys(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed out all the same, it led to a call of the vendor that stood in no book."""
    submit(database)
    claims, write = claims_of(database), database.write

    @contextmanager
    def full() -> Iterator[Connection]:
        with write() as tx:
            yield tx
            raise OperationalError("COMMIT", {}, Exception("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(database, "write", full)
        assert claims.next() is None
    claim = claims.next()
    assert claim is not None and (claim.fence, claim.attempt) == (1, 1)


def test_whoever_finds_more_jobs_than_its_own_says_so_and_whoever_finds_none_is_silent(database: Database) -> None:
    said: list[int] = []
    claims = claims_of(database, said.append)
    submit(database), submit(database)
    assert claims.next() and claims.next() and said == [1, 1]
    assert claims.next() is None and said == [1, 1]
