"""What jobs start from: kept, copied and removed with them, on both databases."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from shared import inputs, jobs
from shared.database import Database
from shared.inputs import Input
from shared.routing import RoutingReason
from shared.tables import inputs as table
from shared.tables import jobs as jobs_table
from tests.lives import claim_one, ended, submit

IMAGE = Input("image", "image/jpeg", 640, 480, "a" * 64, bytes(range(256)) * 100)
MASK = Input("mask", "image/png", 640, 480, "b" * 64, b"\x89PNG\0")


def kept(database: Database, job_id: str) -> dict[str, bytes]:
    with database.read() as connection:
        return inputs.read(connection, job_id)


def canceled(database: Database, job_id: str) -> None:
    with database.write() as tx:
        assert jobs.cancel(tx, job_id)


def test_they_are_kept_as_they_came_with_what_is_known_of_them(database: Database) -> None:
    job = submit(database, starts_from=(IMAGE, MASK))
    assert kept(database, job.id) == {"image": IMAGE.data, "mask": MASK.data}
    with database.read() as connection:
        row = connection.execute(select(table).where(table.c.name == "image")).one()
    known = (row.job_id, row.content_type, row.width, row.height, row.bytes, row.sha256)
    assert known == (job.id, "image/jpeg", 640, 480, 25600, "a" * 64) and row.created_at is not None
    assert kept(database, submit(database).id) == {}


AGAIN: Any = {"backend": "dataoorts", "sandbox": True, "max_wait_seconds": 60}


def test_no_job_no_inputs(database: Database) -> None:
    """They are the job's own transaction."""
    broken = replace(MASK, content_type=None)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError):
        submit(database, starts_from=(IMAGE, broken))
    with database.read() as connection:
        assert [connection.execute(select(each)).all() for each in (table, jobs_table)] == [[], []]


def test_a_job_that_is_submitted_again_has_its_own(database: Database) -> None:
    first, other = submit(database, starts_from=(IMAGE, MASK)), submit(database, starts_from=(MASK,))
    canceled(database, first.id)
    with database.write() as tx:
        again = jobs.retry(tx, first.id, reason=RoutingReason.first, **AGAIN)
    assert again is not None and again.is_new
    with database.write() as tx:
        twice = jobs.retry(tx, first.id, reason=RoutingReason.first, **AGAIN)
    assert twice is not None and twice.job.id == again.job.id
    with database.write() as tx:
        assert jobs.remove_data(tx, first.id)
    assert kept(database, first.id) == {}
    assert kept(database, again.job.id) == {"image": IMAGE.data, "mask": MASK.data}
    assert kept(database, other.id) == {"mask": MASK.data}


def test_they_are_removed_with_an_ended_job_alone_and_twice_is_fine(database: Database) -> None:
    job = submit(database, starts_from=(IMAGE,))
    with database.write() as tx:
        assert not jobs.remove_data(tx, job.id)
    assert kept(database, job.id) == {"image": IMAGE.data}
    ended(database, claim_one(database))
    for _ in range(2):
        with database.write() as tx:
            assert jobs.remove_data(tx, job.id)
        assert kept(database, job.id) == {}
    with database.read() as connection:
        assert connection.scalar(select(jobs_table.c.data_removed).where(jobs_table.c.id == job.id)) is True
