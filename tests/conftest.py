"""Fixtures that every room uses: both databases, migrated and empty, and a real Redis."""

import gc
import os
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path

import pytest
from hypothesis import settings

import shared.database
from migrations import migrate
from shared.database import Database
from tests.migrated import TEMPLATE, MigratedDatabases
from tests.servers import PostgresServer, RedisServer

#: Without torch there is nothing to collect; `./dev test gpu` has a venv with it.
collect_ignore = [] if find_spec("torch") else ["gpu"]

# What the tests do with a database themselves they do once: a machine that stands still for five seconds fails none.
shared.database.CONNECT_SECONDS = 60

# An example has no deadline: a busy machine is not a fault of ours.
settings.register_profile("ours", deadline=None, derandomize=True, database=None)
settings.load_profile("ours")
#: `--hypothesis-profile=long`: other examples each time, and many of them.
settings.register_profile("long", max_examples=2000, stateful_step_count=60, deadline=None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs a server counts as slow: `./dev test fast` runs the rest, in seconds."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if fixtures & {"postgres", "redis_server"} or "postgresql" in parameters.values():
            item.add_marker(pytest.mark.slow)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if processes:
        items[:] = _shared_out(items, processes)


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def _shared_out(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """In the order in which each of several processes has something to do to the end, and both cores too.

    Each process gets a part of equal length. The long tests stand first in each: last of all, the whole run would wait
    for them. Drills wait for most of their time and the others work, so they follow one another, between two files.
    """
    long = [item for item in items if item.get_closest_marker("long")]
    rest = [item for item in items if not item.get_closest_marker("long")]
    drills = [item for item in rest if item.path.parent.name == "drills"]
    others = [item for item in rest if item.path.parent.name != "drills"]
    by_drill = groupby(drills, lambda item: item.path if item.get_closest_marker("together") else item.nodeid)
    spread = [*_spread(by_drill), *_spread(groupby(others, lambda item: item.path))]
    mixed = [item for _, block in sorted(spread, key=itemgetter(0)) for item in block]
    parts = [mixed[len(mixed) * turn // processes : len(mixed) * (turn + 1) // processes] for turn in range(processes)]
    return [item for turn, part in enumerate(parts) for item in long[turn::processes] + part]


def _spread(blocks: Iterable[tuple[object, Iterable[pytest.Item]]]) -> list[tuple[float, list[pytest.Item]]]:
    """Each with its place among them, between 0 for the first test and 1 for the last one."""
    listed = [list(block) for _, block in blocks]
    ends = list(accumulate(map(len, listed)))
    return [((end - len(block) / 2) / ends[-1], block) for end, block in zip(ends, listed, strict=True)]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole run, with a migrated template to copy."""
    server = PostgresServer()
    try:
        server.start("autovacuum=off")  # in the middle of a test it changes how queries are planned
        server.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE template0")
        database = Database(server.url(TEMPLATE), connections=1)
        migrate.upgrade(database)
        database.close()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    database = Database(f"sqlite:///{path}")
    migrate.upgrade(database)
    with database.read() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """A migrated, empty SQLite database of the test's own."""
    return f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path / 'darkroom.db')}"


@pytest.fixture(scope="session")
def migrated_postgresql(postgres: PostgresServer) -> MigratedDatabases:
    return MigratedDatabases(postgres)


@pytest.fixture
def postgresql_url(postgres: PostgresServer, migrated_postgresql: MigratedDatabases) -> Iterator[str]:
    """A migrated, empty PostgreSQL database of the test's own."""
    name = migrated_postgresql.take()
    yield postgres.url(name)
    migrated_postgresql.give_back(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each test that asks for it runs on both databases."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for the whole run; `redis_url` empties it for each test. A test that breaks it starts its own."""
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    redis_server.client().flushall()
    return redis_server.url
