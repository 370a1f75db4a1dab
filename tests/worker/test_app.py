"""The worker's start: what it refuses, as the operator sees it."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared import settings
from tests.servers import free_port

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
