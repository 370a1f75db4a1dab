"""The whole service as real processes, started by the lines of the Procfile, for the drills to break.

Each process can be signalled, killed and started again by its Procfile name. Everything is on loopback.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
from sqlalchemy import select

from local import procfile
from local.web import free_port
from sandbox.server import Sandbox
from shared import settings
from shared.database import Database
from shared.tables import attempts, images
from shared.tables import jobs as table
from tests.servers import RedisServer

ROOT = Path(__file__).parent.parent
API_KEY = "dk_" + "drill" * 8
PATIENCE = 180.0  # seconds that a drill waits for what must come; never slept through


def eventually(what: str, happens: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait until it is true and return it; fail with `what` if it never is."""
    deadline = time.monotonic() + patience
    while not (value := happens()):
        assert time.monotonic() < deadline, f"{what}: not within {patience} s"
        time.sleep(0.05)
    return value


class Service:
    """One Darkroom on a database and a Redis, with a sandbox that the test can ask and trouble."""

    def __init__(self, folder: Path, database_url: str, redis: RedisServer, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.redis = redis
        self.database = Database(database_url)
        self.sandbox = Sandbox()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = requests.Session()
        self.http.trust_env = False
        self.http.headers["Authorization"] = f"Bearer {API_KEY}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        backends = environ.get("DARKROOM_BACKENDS", "dataoorts").split(",")
        self._lines = {command.name: command.line for command in procfile.read(ROOT / "Procfile", backends)}
        self._settings = {
            "DARKROOM_DATA_DIR": str(folder),
            "DARKROOM_DATABASE_URL": database_url,
            "DARKROOM_REDIS_URL": redis.url,
            "DARKROOM_SECRET_KEY": "s" * 32,
            "DARKROOM_API_KEY": API_KEY,
            "DARKROOM_SANDBOX": "1",
            "DARKROOM_AUTOMATIC1111_SANDBOX": "1",
            "DARKROOM_LEASE_SECONDS": "10",
            "DARKROOM_PUBLIC_URL": self.url,
            "DARKROOM_WEBHOOK_ALLOW": "127.0.0.0/8",
            "DATAOORTS_API_KEY": "sandbox",
            "PORT": str(self.port),
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            **environ,
        }

    def start(self, *names: str) -> None:
        """Start processes by their Procfile names; all of them when none is named."""
        for name in names or tuple(self._lines):
            with (self.folder / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    ["/bin/sh", "-c", f"exec {self._lines[name]}"],
                    cwd=ROOT,
                    env=settings.child_environ({**self._settings, **self._sandboxes()}),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        if "api" in (names or self._lines):
            eventually("the API is ready", self._is_ready)

    def _sandboxes(self) -> dict[str, str]:
        return {"DATAOORTS_URL": self.sandbox.url, "DARKROOM_AUTOMATIC1111_URL": self.sandbox.box_url}

    def _is_ready(self) -> bool:
        with suppress(requests.RequestException):  # it listens before it answers
            return self.http.get(f"{self.url}/readyz", timeout=5).status_code == 200
        return False

    def kill(self, name: str) -> None:
        """SIGKILL to the process and all its children, at once."""
        with suppress(ProcessLookupError):  # it has just ended by itself, and somebody looked
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes.pop(name).wait()

    def terminate(self, name: str, patience: float = 60) -> int:
        """SIGTERM to the process, and its exit code."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(patience)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def submit(self, prompt: str = "a red fox", **body: Any) -> str:
        """Submit a small picture; the job's id. Fails unless it was accepted."""
        inputs = {"prompt": prompt, "width": 256, "height": 256, "seed": 7, **body.pop("input", {})}
        answer = self.http.post(f"{self.url}/v1/jobs", json={"input": inputs, **body}, timeout=30)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"{self.url}/v1/jobs/{job_id}", timeout=30)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def image(self, job_id: str) -> bytes:
        answer = self.http.get(f"{self.url}/v1/jobs/{job_id}/image", timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.content

    def count(self) -> Counter[str]:
        """The jobs by status."""
        with self.database.read() as connection:
            return Counter(connection.scalars(select(table.c.status)))

    def outcomes(self) -> Counter[str]:
        """The attempts by outcome."""
        with self.database.read() as connection:
            return Counter(connection.scalars(select(attempts.c.outcome)))

    def images(self) -> Counter[str]:
        """The stored pictures by job."""
        with self.database.read() as connection:
            return Counter(connection.scalars(select(images.c.job_id)))

    def all_ended(self, count: int, patience: float = PATIENCE) -> Counter[str]:
        """Wait until so many jobs have ended, and count them by status."""
        open_ones = ("queued", "running")
        eventually(
            f"{count} jobs end (so far {dict(self.count())})",
            lambda: sum(number for status, number in self.count().items() if status not in open_ones) >= count,
            patience,
        )
        return self.count()

    def close(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.sandbox.stop()
        self.http.close()
        self.database.close()


@contextmanager
def service(folder: Path, database_url: str, **environ: str) -> Iterator[Service]:
    """A service whose Redis and sandbox run, with none of its processes started yet."""
    redis = RedisServer()
    redis.start()
    running = Service(folder, database_url, redis, environ)
    running.sandbox.start()
    try:
        yield running
    finally:
        running.close()
        redis.close()
