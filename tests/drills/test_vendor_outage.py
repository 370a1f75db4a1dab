"""Promises: an outage of the vendor costs no job an attempt, and few calls; Retry-After pauses the whole backend."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.vendor_outage import SHORT, WEATHERS, Weather, table, vendor_outage
from tests.service import Service, service

pytestmark = [pytest.mark.slow, pytest.mark.together]


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Service]:
    """One service for all: each outage finds it as the last one left it."""
    folder = tmp_path_factory.mktemp("outage")
    database = folder / "darkroom.db"
    database.write_bytes(migrated_sqlite.read_bytes())
    with service(folder, f"sqlite:///{database}") as running:
        running.start()
        yield running


@pytest.mark.parametrize("weather", WEATHERS, ids=str)
def test_an_outage_costs_time_alone(at_work: Service, weather: Weather) -> None:
    tally = vendor_outage(at_work, weather, SHORT)
    assert tally.broken_promises() == [], table([tally])
