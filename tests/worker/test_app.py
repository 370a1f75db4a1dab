"""The start of worker and sweep: what they refuse or wait for, as the operator sees it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

import worker.app
from local import procfile
from local.web import free_port
from shared import logs, settings
from shared.database import Database

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_worker_whose_spool_cannot_be_written_refuses_to_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {
        "DARKROOM_SECRET_KEY": "s" * 32,
        "DARKROOM_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
        "DARKROOM_DATA_DIR": str(tmp_path),
        "DARKROOM_SPOOL": str(tmp_path / "file" / "spool"),
        "DATAOORTS_API_KEY": "key",
    }
    celery = [
        str(Path(sys.executable).parent / "celery"),
        "-q",
        "-A",
        "worker.app",
        "worker",
        "-P",
        "threads",
        "-c",
        "2",
    ]
    done = subprocess.run(
        [*celery, "-Q", "generate.dataoorts"],
        env=settings.child_environ(environ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "darkroom worker can't start:\nDARKROOM_SPOOL: " in done.stderr
    assert f"File exists: '{tmp_path}/file'" in done.stderr


CELERY = [str(Path(sys.executable).parent / "celery"), "-q", "-A", "worker.app", "worker", "-P", "threads", "-c", "2"]
PROCESSES = {
    "worker": [*CELERY, "-Q", "generate.dataoorts"],
    "senders": [*CELERY, "-Q", "deliver"],
    "sweep": [sys.executable, "-m", "worker.sweep"],
}


def environ_of(tmp_path: Path, database_url: str) -> dict[str, str]:
    return settings.child_environ(
        {
            "DARKROOM_SECRET_KEY": "s" * 32,
            "DARKROOM_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
            "DARKROOM_DATA_DIR": str(tmp_path),
            "DARKROOM_DATABASE_URL": database_url,
            "DARKROOM_PUBLIC_URL": "http://127.0.0.1:8000",
            "DATAOORTS_API_KEY": "key",
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("revision", ["0003", "9999"], ids=["behind", "ahead"])
def test_what_works_at_a_database_of_another_version_refuses_to_start(
    tmp_path: Path, database: Database, database_url: str, name: str, revision: str
) -> None:
    with database.write() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})
    done = subprocess.run(
        PROCESSES[name],
        env=environ_of(tmp_path, database_url),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "can't start:\nmigrations: " in done.stderr, done.stderr
    assert ("run `python -m migrations`" in done.stderr) == (revision == "0003")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_a_database_that_is_away_at_the_start_is_waited_for_and_a_signal_ends_that(tmp_path: Path, name: str) -> None:
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    process = subprocess.Popen(
        PROCESSES[name], env=environ_of(tmp_path, url), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert any("waiting for the database: it does not answer" in line for line in process.stderr)
        assert process.poll() is None
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "says"),
    [("", "must be set. Without a key, let the sandbox stand in"), ("two words", "must be of visible ASCII")],
    ids=["none", "one that no header can carry"],
)
def test_without_a_vendors_key_the_worker_refuses_to_start_and_says_so(
    tmp_path: Path, sqlite_url: str, key: str, says: str
) -> None:
    done = subprocess.run(
        PROCESSES["worker"],
        env=environ_of(tmp_path, sqlite_url) | {"DATAOORTS_API_KEY": key},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "darkroom worker can't start:\nDATAOORTS_API_KEY: " in done.stderr, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr and "two words" not in done.stderr


@pytest.mark.slow
def test_a_worker_whose_judges_never_become_ready_ends(tmp_path: Path, sqlite_url: str) -> None:
    """Celery would only log it, and go on without a task: a worker that has no heartbeat, and does nothing."""
    judge_dies = "if 'shared.picture' in sys.orig_argv:\n    os._exit(1)"
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\n{judge_dies}\n")
    lines = {command.name: command.line for command in procfile.read(ROOT / "Procfile")}
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {lines['worker-dataoorts']}"],
        env=environ_of(tmp_path, sqlite_url)
        | {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    says = "the process that judges pictures did not become ready"
    assert f"darkroom worker can't start:\n{says}" in done.stderr


def test_whatever_is_raised_while_a_worker_gets_ready_ends_it_and_is_told_without_its_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a red fox"

    def fails(sender: object) -> None:
        raise KeyError(prompt)

    monkeypatch.setattr(worker.app, "_get_ready", fails)
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as ended:
        worker.app._start(None)
    assert str(ended.value).startswith("darkroom worker can't start:\n")
    lines = [logs.TextFormatter("worker").format(record) for record in caplog.records]
    assert "in fails" in lines[0] and "KeyError" in lines[0] and "fox" not in lines[0] + str(ended.value)


@pytest.mark.slow
@pytest.mark.parametrize("serves", ["_backend('dataoorts', wanted, 1)", "Worker(wanted, {'deliver'}, 1)"])
def test_a_worker_loads_no_library_that_what_it_serves_has_no_use_for(tmp_path: Path, serves: str) -> None:
    code = "import sys; from shared import settings; from worker.app import *; from worker.app import _backend\n"
    code += f"wanted = settings.load(); it = {serves}; print(*sys.modules)"
    environ = settings.child_environ(
        {
            "DARKROOM_SECRET_KEY": "s" * 32,
            "DARKROOM_DATA_DIR": str(tmp_path),
            "DARKROOM_PUBLIC_URL": "http://127.0.0.1:1",
            "DATAOORTS_API_KEY": "k",
        }
    )
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "requests" in loaded, done.stderr
    assert not loaded & {"alembic", "mako", "numpy", "torch"}  # some 25 MB of memory, of each worker
    assert ("cryptography.fernet" in loaded) == ("deliver" in serves)
