"""`python -m worker.doctor`: the guards as a table, in a process of its own."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from sqlalchemy import text

from local.web import free_port
from shared.database import Database
from tests.drills import wrong_clock
from tests.servers import RedisServer
from tests.service import ROOT
from worker import presence

KEY = "0f4b8a77c1d2e3965aa1b2c3d4e5f607"


def doctor(environ: Mapping[str, str], *arguments: str, before: str = "") -> tuple[int, dict[str, str], str]:
    """Its exit code, its lines by name, and all that it says."""
    command = f"{before} exec {sys.executable} -m worker.doctor {' '.join(arguments)}"
    done = subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    lines = re.findall(r"^(ok|warning|wrong) +(\S.*?)  ", done.stdout, re.MULTILINE)
    return done.returncode, {name: level for level, name in lines}, " ".join(done.stdout.split())


@pytest.fixture
def environ(sqlite_url: str, redis_server: RedisServer, tmp_path: Path) -> dict[str, str]:
    tmp_path.chmod(0o700)
    return {
        "DARKROOM_DATA_DIR": str(tmp_path),
        "DARKROOM_DATABASE_URL": sqlite_url,
        # A Redis that stands still for a few seconds is not away.
        "DARKROOM_REDIS_URL": f"{redis_server.url}?socket_timeout=60&socket_connect_timeout=60",
        "DARKROOM_SECRET_KEY": KEY,
        "DARKROOM_API_KEY": f"dk_{KEY}",
        "DARKROOM_PUBLIC_URL": "https://images.example",
        "DATAOORTS_API_KEY": "key",
    }


pytestmark = pytest.mark.slow


def test_where_all_is_well_every_line_is_ok(environ: dict[str, str], sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.write() as tx:
        for work in ("dataoorts", "deliver", "sweep"):
            presence.show(tx, f"here:{work}", work, 1, None)
    database.close()
    code, lines, said = doctor(environ)
    assert code == 0 and set(lines.values()) == {"ok"} and "1 for dataoorts, 1 for deliver, 1 for sweep" in said
    assert len(lines) >= 19 and said.endswith("all is well")


def test_what_is_wrong_is_an_exit_code_and_what_is_doubtful_is_none(environ: dict[str, str], sqlite_url: str) -> None:
    code, lines, said = doctor(environ | {"DARKROOM_SECRET_KEY": "s" * 32})
    assert code == 0 and (lines["secret key"], lines["workers"]) == ("warning", "warning")
    assert "openssl rand -hex 32" in said and "none is there; nobody for dataoorts, deliver, sweep" in said
    database = Database(sqlite_url)
    with database.write() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    database.close()
    code, lines, said = doctor(environ)
    assert code == 1 and lines["migrations"] == "wrong" and "-> run `python -m migrations`" in said
    assert "1 wrong, 1 warnings" in said


def test_what_a_process_needs_to_start_is_looked_for(environ: dict[str, str]) -> None:
    code, lines, said = doctor(environ | {"DATAOORTS_API_KEY": "", "DARKROOM_PUBLIC_URL": ""})
    assert code == 1 and lines["dataoorts"] == lines["public url"] == "wrong"
    assert "DATAOORTS_API_KEY is not set" in said and KEY not in said


def test_a_local_backend_tells_what_it_found_or_why_it_would_not_start(environ: dict[str, str]) -> None:
    """What it finds with torch: tests/gpu/test_loading.py."""
    code, lines, said = doctor(environ | {"DARKROOM_BACKENDS": "diffusers", "DARKROOM_GPU_MODEL": "/nowhere"})
    assert code == 1 and lines["gpu"] == "wrong" and "dataoorts" not in lines
    assert "its worker refuses to start: " in said and "docs/gpu.md" in said


def test_without_settings_it_says_what_is_missing() -> None:
    code, lines, said = doctor({})
    assert code == 1 and lines == {"settings": "wrong"}
    assert "DARKROOM_SECRET_KEY: must be set; `openssl rand -hex 32` makes one" in said


def test_a_clock_that_is_wrong_is_found_against_the_database_s(environ: dict[str, str], database_url: str) -> None:
    """A real process whose clock is wrong."""
    folder = Path(wrong_clock.__path__[0])
    skewed = {"CLOCK_FAST_SECONDS": "-600", "PYTHONPATH": f"{folder}:{ROOT}", "DARKROOM_DATABASE_URL": database_url}
    _, lines, said = doctor(environ | skewed)
    assert lines["clock"] == "warning" and "s behind the database's" in said


def test_the_limit_of_open_files_is_that_of_its_own_process(environ: dict[str, str]) -> None:
    _, lines, said = doctor(environ, before="ulimit -n 256;")
    assert lines["open files"] == "warning" and "256 files may be open at once" in said


def test_stores_that_are_away_are_a_line_each_and_no_traceback(environ: dict[str, str]) -> None:
    away = {
        "DARKROOM_DATABASE_URL": f"postgresql://nobody@127.0.0.1:{free_port()}/none",
        "DARKROOM_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
    }
    code, lines, said = doctor(environ | away)
    assert code == 1 and lines["database"] == "wrong" and lines["redis"] == "warning"
    assert "Traceback" not in said and "processes wait for it" in said
