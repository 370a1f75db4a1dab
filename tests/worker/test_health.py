"""`python -m worker.health`: what it reads of a worker's row, and how it ends."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from sqlalchemy import update

from local.web import free_port
from shared import settings
from shared.database import Database, now
from shared.tables import workers
from tests.service import ROOT
from worker import health, presence
from worker.presence import Progress

HOST = socket.gethostname()

Asked = Callable[..., tuple[int, str]]


def show(database: Database, name: str, work: str = "dataoorts", age: float = 0, **progress: object) -> None:
    with database.write() as tx:
        presence.show(tx, name, work, 200, None, Progress(**progress))  # type: ignore[arg-type]
        tx.execute(update(workers).where(workers.c.name == name).values(seen_at=now(-age)))


def ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, *arguments: str
) -> tuple[int, str]:
    monkeypatch.setenv("DARKROOM_DATABASE_URL", url)
    monkeypatch.setenv("DARKROOM_SECRET_KEY", "s" * 32)
    code = health.main(arguments)
    return code, capsys.readouterr().out


@pytest.fixture
def asked(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Asked:
    return lambda *arguments: ask(monkeypatch, capsys, database_url, *arguments)


def test_a_worker_that_works_is_well_and_says_what_it_does(database: Database, asked: Asked) -> None:
    show(database, f"{HOST}:7", in_hand=3, done=1207)
    code, said = asked()
    assert code == 0
    assert re.fullmatch(rf"dataoorts \({HOST}:7\): 3 of 200 slots in use, 1207 done, moved \d+ s ago\n", said)


@pytest.mark.parametrize("name", [(), ("worker-dataoorts",), ("dataoorts",), (f"{HOST}:7",)], ids=str)
def test_one_that_was_not_seen_for_a_while_is_not(database: Database, asked: Asked, name: tuple[str, ...]) -> None:
    show(database, f"{HOST}:7", age=25)
    code, said = asked(*name)
    assert code == 1 and re.match(rf"dataoorts \({HOST}:7\): not seen for (2[5-9]|[3-9]\d) s", said)


def test_one_that_says_that_it_is_stuck_is_not(database: Database, asked: Asked) -> None:
    show(database, f"{HOST}:7", trouble="the heartbeat has stood still for 61 s")
    assert asked() == (1, f"dataoorts ({HOST}:7): the heartbeat has stood still for 61 s\n")


def test_one_that_nobody_has_seen_is_not(database: Database, asked: Asked) -> None:
    show(database, "elsewhere:7")
    assert asked() == (1, f"worker: no such worker has shown itself on {HOST}\n")
    assert asked("worker-gpu")[0] == 1


def test_of_each_kind_the_latest_of_this_host_counts(database: Database, asked: Asked) -> None:
    """A container that is started again keeps its name, and its row of before."""
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    show(database, f"{HOST}:{dead.pid}", age=3600)
    show(database, f"{HOST}:8", age=1)
    show(database, f"{HOST}:9", "deliver", age=1)
    show(database, f"{HOST}:10", "sweep", age=1)
    code, said = asked()
    assert code == 0 and len(said.splitlines()) == 3 and re.search(r"swept \d+ s ago", said)
    show(database, f"{HOST}:9", "deliver", age=30)
    assert asked()[0] == asked("worker-webhooks")[0] == 1
    assert asked("worker-sweep")[0] == asked("worker-dataoorts")[0] == 0


def test_one_that_was_stopped_is_not_hidden_by_another_one_of_its_kind(database: Database, asked: Asked) -> None:
    """Unlike one that is dead, its process is there."""
    with subprocess.Popen(["sleep", "100"]) as stopped:
        show(database, f"{HOST}:{stopped.pid}", age=25)
        show(database, f"{HOST}:8", age=1)
        code, said = asked("worker-dataoorts")
        stopped.kill()
    assert code == 1 and f"dataoorts ({HOST}:{stopped.pid}): not seen for" in said and len(said.splitlines()) == 2
    assert asked("worker-dataoorts")[0] == 0, "now it is dead, and another one does its work"


def test_a_supervisor_is_told_of_those_that_are_silent_while_others_are_not(database: Database, asked: Asked) -> None:
    show(database, f"{HOST}:7", age=25)
    # Seen in a moment to come: however long this test takes, it is not silent.
    show(database, f"{HOST}:8", "deliver", age=-600, trouble="this worker has heard nothing of Redis")
    code, said = asked("--silent", "7", "8", "9")
    assert code == 1 and said.startswith("7 dataoorts") and len(said.splitlines()) == 1
    show(database, f"{HOST}:8", "deliver", age=25)  # nobody writes any more: it is the database
    assert asked("--silent", "7", "8", "9") == (0, "")


def test_a_database_that_is_away_is_no_health_and_no_reason_to_kill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    code, said = ask(monkeypatch, capsys, away)
    assert code == 1 and said.startswith("the database does not answer")
    assert ask(monkeypatch, capsys, away, "--silent", "7") == (0, "")


def test_settings_that_are_wrong_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker.health"], cwd=ROOT, env={"PATH": os.defpath}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout.startswith("settings: DARKROOM_SECRET_KEY: must be set")


def test_it_is_cheap_it_loads_neither_celery_nor_a_client_of_redis() -> None:
    seen = (
        "import sys, worker.health; print(sorted({'celery', 'kombu', 'redis', 'PIL', 'alembic'} & sys.modules.keys()))"
    )
    environ = settings.child_environ({})
    done = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout == "[]\n"
