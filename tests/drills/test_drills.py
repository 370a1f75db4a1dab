"""Every drill, short. `./dev drill` holds them long."""

from pathlib import Path

import psutil
import pytest

from bench.databases import Databases
from tests.drills.__main__ import APART, SHORTEST_LEASE_SECONDS, main
from tests.drills.all_drills import DRILLS
from tests.drills.count import Count, table
from tests.drills.drill import Drill
from tests.drills.systems import Books, DrilledDarkroom


class OneDatabase(Databases):
    """The one that the test has."""

    def __init__(self, url: str) -> None:
        self._url = url

    def make(self, folder: Path) -> str:
        return self._url

    def drop(self, url: str) -> None:
        """The test does."""

    def close(self) -> None:
        """The test does."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drill", "database"),
    [
        pytest.param(drill, database, id=f"{drill.name}-{database}")
        for drill in DRILLS.values()
        for database in drill.databases
    ],
)
def test_what_it_promises_holds(drill: Drill, database: str, request: pytest.FixtureRequest) -> None:
    if why := drill.hindrance():
        pytest.skip(why)
    databases = OneDatabase(request.getfixturevalue(f"{database}_url"))
    before = set(psutil.Process().children())
    system = DrilledDarkroom(databases, SHORTEST_LEASE_SECONDS)
    count = drill.hold(system, drill.short, seed=1, quiet_seconds=45)
    assert count.broken_promises() == [], table([system.title], [count])
    assert count.accepted >= drill.short.jobs and count.faults >= drill.short.faults
    assert set(psutil.Process().children()) <= before  # nothing is left running


def count(**changes: object) -> Count:
    """Ten jobs and two kills, as they should be, but for these changes."""
    well: dict[str, object] = {
        "accepted": 10,
        "refused": 0,
        "ended": 10,
        "succeeded": 10,
        "lost": 0,
        "ended_twice": 0,
        "images": 10,
        "calls": 12,
        "in_flight": 3,
        "books": Books(unknown=3, payable=13),
        "faults": 2,
        "recovery": 20.0,
        "answers": (0.1, 0.2),
        "broken": (),
        "notes": (),
    }
    return Count(**{**well, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"lost": 1, "ended": 9, "succeeded": 9, "images": 9, "calls": 11},
        {"succeeded": 9, "images": 9, "calls": 11},
        {"images": 9, "calls": 11},
        {"ended_twice": 1},
        {"refused": 1},
        {"calls": 14, "books": Books(unknown=3, payable=14)},
        {"unbooked": 1},
        {"books": Books(unknown=4, payable=14)},
        {"broken": ("it is fast",)},
    ],
    ids=str,
)
def test_every_promise_can_be_broken(wrong: dict[str, object]) -> None:
    assert count().broken_promises() == []
    assert len(count(**wrong).broken_promises()) == 1


def test_the_table_shows_both_and_says_what_is_broken() -> None:
    shown = table(["ours", "theirs"], [count(), count(lost=1, books=None, recovery=float("inf"), notes=("a pity",))])
    cells = {line[:30].strip(): line[30:].split() for line in shown.splitlines()}
    assert cells["lost"] == ["0", "1"] and cells["attempts `unknown`"] == ["3", "-"]
    assert cells["seconds to recover, worst"] == ["20.0", "never"] and cells["beyond images"] == ["2", "2"]
    assert "theirs, broken: every job that was accepted ends\n" in shown and shown.endswith("theirs: a pity")


def test_the_list_names_every_drill(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*DRILLS, *APART]
    assert all(line.endswith(("(sqlite, postgresql)", "(postgresql)")) for line in lines)


def test_a_drill_that_a_database_cannot_hold_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["killed_database", "--database", "sqlite"]) == 0
    assert "killed_database: not held, it can be on postgresql alone" in capsys.readouterr().out


def test_a_drill_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dance"])
    assert "no drill called dance" in capsys.readouterr().err
