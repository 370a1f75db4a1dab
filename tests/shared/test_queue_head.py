"""Where a queue begins: found once a second while it is long, and looked for anew at once where it is short."""

import re
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import func, select, text

from api import job_object
from shared import jobs, moves
from shared.database import Database
from shared.jobs import Claim
from shared.queue_head import BEGINNING, Place, QueueHead
from shared.tables import jobs as table
from tests.lives import TERMS, many, plan, submit


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _claim(database: Database, head: QueueHead, limit: int = 1) -> list[Claim]:
    with database.write() as tx:
        return jobs.claim(tx, "dataoorts", TERMS, limit=limit, head=head)


def _put_off_and_two_more(database: Database) -> tuple[str, str, str]:
    """Three jobs in line, of which the first is not due."""
    first, second, third = (submit(database).id for _ in range(3))
    with database.write() as tx:
        tx.execute(table.update().where(table.c.id == first).values(ready=False))
    return first, second, third


def _ready(database: Database, job_id: str) -> None:
    with database.write() as tx:
        tx.execute(table.update().where(table.c.id == job_id).values(ready=True))


def _ids(claims: list[Claim]) -> list[str]:
    return [claim.job_id for claim in claims]


def test_a_job_that_enters_before_the_known_head_is_claimed_a_second_later(database: Database) -> None:
    clock = _Clock()
    head = QueueHead(clock)
    first, second, third = _put_off_and_two_more(database)
    fourth = submit(database).id
    assert _ids(_claim(database, head)) == [second]
    _ready(database, first)
    assert _ids(_claim(database, head)) == [third]
    clock.now += QueueHead.BELIEVED_SECONDS
    assert _ids(_claim(database, head, limit=2)) == [first, fourth]


def test_it_is_claimed_at_once_if_there_are_not_enough_others(database: Database) -> None:
    head = QueueHead(_Clock())
    first, second, third = _put_off_and_two_more(database)
    assert _ids(_claim(database, head)) == [second]
    _ready(database, first)
    assert _ids(_claim(database, head, limit=2)) == [first, third]


def test_a_job_that_is_given_back_within_the_second_is_first_again(database: Database) -> None:
    head = QueueHead(_Clock())
    for _ in range(3):
        submit(database)
    [claim] = _claim(database, head)
    _claim(database, head)
    with database.write() as tx:
        assert jobs.release(tx, claim, reason="a test")
    assert _ids(_claim(database, head)) == [claim.job_id]


def test_a_place_is_believed_for_its_second_and_not_moved_on_by_what_is_found_meanwhile() -> None:
    clock, asked_from = _Clock(), list[Place]()
    head = QueueHead(clock)

    def find(place: Place) -> list[Any]:
        asked_from.append(place)
        return [SimpleNamespace(rank=len(asked_from), id="job_a")]

    for _ in range(3):
        head.look(find, 1)
    clock.now += QueueHead.BELIEVED_SECONDS
    head.look(find, 1)
    assert asked_from == [BEGINNING, (1, "job_a"), (1, "job_a"), BEGINNING]


def _next_from(place: Place) -> Any:
    given = {"of_backend": "dataoorts", "of_models": list(TERMS.prices), "by_worker": "w", "max_crashes": 3}
    return moves.NEXT.params(given | {"at_most": 1, "from_rank": place[0], "from_id": place[1]})


def _pages(database: Database, query: Any) -> int:
    """How many pages PostgreSQL looks at, each as often as it does."""
    found = plan(database, query, "ANALYZE, BUFFERS")
    pages = re.search(r"Buffers: shared hit=(\d+)(?: read=(\d+))?", found)
    assert pages, found
    return sum(int(number or 0) for number in pages.groups())


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_beside_an_old_snapshot_nobody_walks_over_what_was_claimed_since(database: Database) -> None:
    many(database, 4000)
    with closing(Database(database.url, connections=1)) as elsewhere, elsewhere.engine.connect() as old:
        old.execution_options(isolation_level="REPEATABLE READ")
        old.execute(text("SET idle_in_transaction_session_timeout = 0"))
        seen = old.scalar(select(func.count()).select_from(table))
        assert len(_claim(database, QueueHead(), limit=2500)) == 2500
        with database.read() as connection:
            connection.execute(text("VACUUM jobs"))  # in vain
            head = select(table.c.rank, table.c.id).where(table.c.status == "queued").order_by(table.c.rank, table.c.id)
            place, *_, last = connection.execute(head).all()
        from_the_start = _pages(database, _next_from(BEGINNING))
        from_the_head = _pages(database, _next_from((place.rank, place.id)))
        its = {"of_backend": "dataoorts", "its_rank": last.rank, "its_id": last.id}
        to_the_last = _pages(database, job_object._AHEAD.params(its))
        assert old.scalar(select(func.count()).select_from(table)) == seen
        old.rollback()
    assert from_the_head * 10 < from_the_start
    assert to_the_last < from_the_start  # it counts a thousand that wait, and comes to none of those
