"""What receivers answered goes with the data of its job, in whatever order a try and a removal end."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

import shared.database
from shared import deliveries, jobs
from shared.database import Database
from shared.deliveries import Result
from shared.tables import TryOutcome, delivery_tries
from shared.tables import deliveries as table
from tests.lives import claim_one, ended
from tests.shared.test_deliveries import all_of, an_endpoint, claim, happen, settle, the_one

ECHO = Result(TryOutcome.failed, seconds=0.1, status=500, answer="you said: a red fox")


def remove(database: Database, job_id: str) -> None:
    with database.write() as tx:
        assert jobs.remove_data(tx, job_id)


def test_what_receivers_answered_goes_with_the_data_of_their_job(database: Database) -> None:
    an_endpoint(database)
    [event, other] = happen(database, 2)
    for claimed in claim(database):
        settle(database, claimed, ECHO)
    with database.write() as tx:
        jobs.cancel(tx, event.subject_id)
    remove(database, event.subject_id)
    of = {row.id: row.event_id for row in all_of(database, table)}
    answers = {of[one.delivery_id]: (one.status, one.answer) for one in all_of(database, delivery_tries)}
    assert answers == {event.id: (500, None), other.id: (500, ECHO.answer)}


def test_a_try_that_ends_after_the_removal_keeps_no_answer(database: Database) -> None:
    an_endpoint(database)
    [event] = happen(database)
    [claimed] = claim(database)
    with database.write() as tx:
        jobs.cancel(tx, event.subject_id)
    remove(database, event.subject_id)
    settle(database, claimed, ECHO)
    assert (the_one(database, delivery_tries).status, the_one(database, delivery_tries).answer) == (500, None)


@pytest.mark.parametrize("first", ["the try", "the removal"])
def test_nor_does_one_that_ends_while_the_data_are_removed(
    first: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.database, "BUSY_SECONDS", 60)  # whoever waits here waits until the other goes on
    database = Database(database_url)
    an_endpoint(database)
    [event] = happen(database)
    [claimed] = claim(database)
    with database.write() as tx:
        jobs.cancel(tx, event.subject_id)
    with closing(database), ThreadPoolExecutor(1) as pool:
        with database.write() as tx:
            if first == "the try":
                deliveries.settle(tx, claimed, ECHO)
                other: Any = pool.submit(remove, database, event.subject_id)
            else:
                assert jobs.remove_data(tx, event.subject_id)
                other = pool.submit(settle, database, claimed, ECHO)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.5)  # it waits for this transaction
        other.result()
        assert the_one(database, delivery_tries).answer is None


def test_a_try_that_ends_hides_no_job_from_its_claim_and_holds_up_no_move(postgresql_url: str) -> None:
    with closing(Database(postgresql_url)) as database:
        an_endpoint(database)
        [event] = happen(database)
        [claimed] = claim(database)
        with database.write() as tx:
            deliveries.settle(tx, claimed, ECHO)
            job = claim_one(database)
            assert job.job_id == event.subject_id
            ended(database, job)
        assert the_one(database, delivery_tries).answer == ECHO.answer
