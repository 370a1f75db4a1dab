"""A whole service for each drill, on each database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Service, service


@pytest.fixture
def running(tmp_path: Path, database_url: str) -> Iterator[Service]:
    with service(tmp_path, database_url) as running:
        yield running


@pytest.fixture
def running_on_sqlite(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    """For drills whose question does not touch the database."""
    with service(tmp_path, sqlite_url) as running:
        yield running
