"""Promise: a picture that was received is never paid for again. The real processes, and a PostgreSQL that goes away."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import migrations
from shared.database import Database
from tests.servers import PostgresServer
from tests.service import Service, eventually, service

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL of the drill's own, which it may stop; with its fsyncs, since it is crashed."""
    server = PostgresServer()
    try:
        server.start(durable=True)
        server.execute("CREATE DATABASE darkroom TEMPLATE template0")
        database = Database(server.url("darkroom"), connections=1)
        migrations.upgrade(database)
        database.close()
        yield server
    finally:
        server.close()


@pytest.fixture
def running(tmp_path: Path, server: PostgresServer) -> Iterator[Service]:
    with service(tmp_path, server.url("darkroom"), DARKROOM_SPOOL=str(tmp_path / "spool")) as running:
        running.start()
        yield running


def pictures(running: Service) -> list[Path]:
    return list((running.folder / "spool").rglob("*.picture"))


def received_while_the_database_is_away(running: Service, server: PostgresServer, jobs: int) -> list[str]:
    """So many jobs whose vendor answered when PostgreSQL had crashed."""
    running.sandbox.trouble(delay=2)
    ids = [running.submit(f"picture {number}") for number in range(jobs)]
    running.sandbox.wait_until(lambda calls: bool(calls["in_flight"] == jobs), 30)
    server.stop(signal.SIGQUIT)
    eventually("every picture is on the spool", lambda: len(pictures(running)) == jobs)
    running.sandbox.clear()
    return ids


def all_is_well(running: Service, ids: list[str]) -> None:
    assert running.all_ended(len(ids)) == {"succeeded": len(ids)}
    assert running.images() == dict.fromkeys(ids, 1)
    assert running.outcomes() == {"succeeded": len(ids)}
    assert running.sandbox.calls()["calls"] == len(ids), "each was paid once"
    assert all(running.image(job_id).startswith(b"\x89PNG") for job_id in ids)
    assert all(running.job(job_id)["cost_usd"] == "0.008" for job_id in ids)
    eventually("nothing is left on the spool", lambda: not pictures(running))


def test_a_killed_workers_pictures_are_offered_by_the_next_one_though_the_database_is_away_at_its_start(
    running: Service, server: PostgresServer
) -> None:
    ids = received_while_the_database_is_away(running, server, 5)
    running.kill("worker-dataoorts")
    running.start("worker-dataoorts")
    eventually("it tries to offer them", lambda: "can't be offered yet" in running.log("worker-dataoorts"))
    server.start(durable=True)
    all_is_well(running, ids)


def test_a_worker_holds_its_pictures_until_the_database_is_back(running: Service, server: PostgresServer) -> None:
    ids = received_while_the_database_is_away(running, server, 5)
    server.start(durable=True)
    all_is_well(running, ids)


def test_a_worker_that_is_stopped_while_the_database_is_away_exits_and_leaves_its_pictures_to_the_next_one(
    running: Service, server: PostgresServer
) -> None:
    ids = received_while_the_database_is_away(running, server, 5)
    assert running.terminate("worker-dataoorts") == 0
    assert len(pictures(running)) == 5
    server.start(durable=True)
    running.start("worker-dataoorts")
    all_is_well(running, ids)
