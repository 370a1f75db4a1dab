"""A house on either database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.house import House, Names
from worker import spool


@pytest.fixture
def house(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(spool, "secrets", Names())
    house = House(database_url, tmp_path)
    yield house
    house.ends()
    house.close()
