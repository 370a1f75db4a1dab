"""The two systems, each as real processes on loopback: Darkroom by its Procfile, the baseline by its own.

Each comes with a Redis and a stand-in of the vendor of its own, in a temporary folder that goes with it.
"""

import contextlib
import json
import shlex
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from bench.databases import Databases
from bench.load.dialects import API_KEY, DIALECTS
from bench.outside import Vendor, eventually, run_load
from bench.processes import ROOT, Processes
from local import procfile
from local.embedded_redis import server_binary
from local.web import free_port


class System(ABC):
    """A system that runs from `with` to the end of its block. `name` is that of its dialect."""

    name: str
    title: str
    #: How many calls of the vendor it makes at once.
    slots: int
    #: The process that makes them.
    drawing: str
    #: Whether Redis writes an append-only file, as this system's own set-up has it.
    redis_appends: bool
    _procfile: Path
    _ready_path: str

    @property
    def waits(self) -> bool:
        """Whether its clients can wait for a job in place of asking again and again."""
        return DIALECTS[self.name].waits

    def __init__(self) -> None:
        self.port = free_port()
        self.processes = Processes(Path(tempfile.mkdtemp(prefix="darkroom-bench-")))
        self.folder = self.processes.folder
        self.redis_port = free_port()
        #: Where the system looks for Redis.
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        #: The lines of its processes by name.
        self.lines = {command.name: command.line for command in procfile.read(self._procfile, ("dataoorts",))}

    @abstractmethod
    def _environ(self) -> Mapping[str, str]:
        """What its processes find in their environment."""

    @abstractmethod
    def _home(self) -> Path:
        """The folder that its processes are started in, with what they look for there."""

    def start(self, name: str) -> None:
        """Start one of its processes, for the first time or again."""
        self.processes.start(name, self.lines[name], self._environ(), cwd=self._home())

    def start_beside(self, name: str, called: str, **changes: str) -> None:
        """Start one of its processes once more, by another name and with these changes of its environment."""
        self.processes.start(called, self.lines[name], {**self._environ(), **changes}, cwd=self._home())

    def start_redis(self) -> None:
        redis = [server_binary(), "--port", str(self.redis_port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        redis += ["--appendonly", "yes" if self.redis_appends else "no", "--save", ""]
        self.processes.start("redis", shlex.join([*redis, "--maxmemory-policy", "noeviction"]), {})

    def measured(self) -> list[subprocess.Popen[bytes]]:
        """The processes of the system, without its database's, if that has any, and without the vendor."""
        return [process for name, process in self.processes.running.items() if name != "vendor"]

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        self.start_redis()
        self.vendor = Vendor(self.processes)
        for name in self.lines:
            self.start(name)
        eventually("the web side", self.processes, self.answers)
        self.vendor.wish(delay=0, size=20_000)
        self.load("batch", jobs=16, connections=4)  # the workers are there, and every route has been used once

    def answers(self, port: int | None = None) -> bool:
        """Whether its web side does, or what listens at another port."""
        with contextlib.suppress(requests.RequestException), requests.Session() as http:  # it listens before it answers
            http.trust_env = False
            return http.get(f"http://127.0.0.1:{port or self.port}{self._ready_path}", timeout=5).status_code < 500
        return False

    def load(self, program: str, **arguments: Any) -> dict[str, Any]:
        """Run a program of `bench/load` against this system; see `run_load`."""
        found = run_load(program, **{"port": self.port, "dialect": self.name, **arguments})
        self.processes.check()
        return found

    def close(self) -> None:
        self.processes.close()


class Darkroom(System):
    """`settings`: more variables of its environment."""

    name = "darkroom"
    title = "Darkroom"
    slots = 200
    drawing = "worker-dataoorts"
    redis_appends = True
    _procfile = ROOT / "Procfile"
    _ready_path = "/readyz"

    def __init__(self, databases: Databases, **settings: str) -> None:
        super().__init__()
        self._databases = databases
        self._settings = settings
        self.database_url = databases.make(self.folder)

    def _environ(self) -> Mapping[str, str]:
        return {
            "DARKROOM_DATA_DIR": str(self.folder),
            "DARKROOM_DATABASE_URL": self.database_url,
            "DARKROOM_REDIS_URL": self.redis_url,
            "DARKROOM_SECRET_KEY": "s" * 32,
            "DARKROOM_API_KEY": API_KEY,
            "DARKROOM_SANDBOX": "1",
            "DARKROOM_PUBLIC_URL": f"http://127.0.0.1:{self.port}",
            "DARKROOM_WEBHOOK_ALLOW": "127.0.0.0/8",
            "DATAOORTS_API_KEY": "bench",
            "DATAOORTS_URL": self.vendor.url,
            "PORT": str(self.port),
            **self._settings,
        }

    def _home(self) -> Path:
        return ROOT

    def close(self) -> None:
        super().close()
        self._databases.drop(self.database_url)


class Baseline(System):
    """`transport`: Celery's `broker_transport_options`, if not its defaults."""

    name = "baseline"
    title = "Flask + Celery"
    slots = 8
    drawing = "worker"
    redis_appends = False
    _procfile = ROOT / "bench" / "baseline" / "Procfile"
    _ready_path = "/"

    def __init__(self, **transport: float) -> None:
        super().__init__()
        self._transport = transport
        self.pictures_folder = self.folder / "pictures"

    def _environ(self) -> Mapping[str, str]:
        return {"PORT": str(self.port), "PYTHONPATH": str(ROOT)}

    def _home(self) -> Path:
        self.pictures_folder.mkdir(exist_ok=True)
        config = {
            "redis_url": self.redis_url,
            "vendor_url": self.vendor.url,
            "vendor_key": "bench",
            "pictures": str(self.pictures_folder),
            "transport": self._transport,
        }
        (self.folder / "baseline.json").write_text(json.dumps(config))
        return self.folder


class ThreadedBaseline(Baseline):
    """The same app with as many slots as Darkroom has, in one process. Celery's default is a process for each."""

    title = "with 200 threads"
    slots = 200

    def __init__(self, **transport: float) -> None:
        super().__init__(**transport)
        self.lines["worker"] = self.lines["worker"].replace("-P prefork -c 8", f"-P threads -c {self.slots}")
