"""A whole service for each drill, on each database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Service, service

#: A worker that sends a claim later than half of it gives the job back, and that is an attempt more in the books: more
#: than a busy machine stands still.
LEASE_SECONDS = "20"


@pytest.fixture
def running(tmp_path: Path, database_url: str) -> Iterator[Service]:
    with service(tmp_path, database_url, DARKROOM_LEASE_SECONDS=LEASE_SECONDS) as running:
        yield running


@pytest.fixture
def running_on_sqlite(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    """For drills whose question does not touch the database."""
    with service(tmp_path, sqlite_url, DARKROOM_LEASE_SECONDS=LEASE_SECONDS) as running:
        yield running
