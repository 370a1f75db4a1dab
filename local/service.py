"""The whole service on this machine: what it consists of, its settings, and its start in order."""

import http.client
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from local import procfile, web
from local.data_folder import DataFolder
from local.embedded_redis import EmbeddedRedis
from local.supervisor import Command, Failure, Question, Supervisor
from shared import settings
from shared.settings import Settings

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class House:
    """Where the code is, and the commands that are not in its Procfile."""

    root: Path = CHECKOUT
    migrations: str = "python -m migrations"
    sandbox: str = "python -m sandbox --host 127.0.0.1 --port {port}"
    #: Asked about the workers; see Question.
    health: str = "python -m worker.health --silent"
    #: How long its parts may take to answer after their start.
    patience: float = 60.0
    #: How much longer that of a local model may take: gigabytes are read, at the first use perhaps fetched.
    loading: float = 1800.0

    def processes(self, wanted: Settings) -> tuple[Command, ...]:
        """The processes of the Procfile, which are those of production, but for workers of backends not in use.

        A worker that draws may take as long to end as its longest attempt.
        """
        commands = procfile.read(self.root / "Procfile", wanted.backends)
        backends = [procfile.backend_of(command) for command in commands]
        return tuple(
            command if backend is None else replace(command, grace=wanted.grace_seconds(backend))
            for command, backend in zip(commands, backends, strict=True)
        )

    def question(self) -> Question:
        """What the supervisor asks about the workers: one that was stopped can't end itself."""
        names = {command.name for command in procfile.read(self.root / "Procfile")}
        return Question(self.health, frozenset(name for name in names if name.startswith("worker-")))


class Service:
    """All that is decided before anything starts: ports, keys, stores, settings."""

    def __init__(self, house: House, folder: DataFolder, port: int, given: Mapping[str, str]) -> None:
        self.house = house
        self.folder = folder
        self.port = port
        self.api_key = given.get("DARKROOM_API_KEY") or folder.api_key()
        self.redis = None if given.get("DARKROOM_REDIS_URL") else EmbeddedRedis.within(folder.path)
        # One port for all its lives: workers go on calling it when it is started again.
        self.absent = Absent(given)
        self.sandbox_port = web.free_port() if self.absent else None
        # Everything that was given stands, also where it says nothing (`NAME=`): the demo blanks what it must not use.
        self._changes = dict(given) | {
            "DARKROOM_DATA_DIR": str(folder.path),
            "DARKROOM_API_KEY": self.api_key,
            "DARKROOM_SECRET_KEY": given.get("DARKROOM_SECRET_KEY") or folder.secret_key(),
            "DARKROOM_PUBLIC_URL": given.get("DARKROOM_PUBLIC_URL") or f"http://{web.LOOPBACK}:{port}",
            "BIND": web.LOOPBACK,
            "PORT": str(port),
            "PYTHONUNBUFFERED": "1",
            # Celery's warning to root is for servers; here it is ten lines on a newcomer's screen.
            "PYTHONWARNINGS": "ignore:You're running the worker with superuser privileges",
        }
        if self.redis is not None:
            self._changes["DARKROOM_REDIS_URL"] = self.redis.url
        if self.sandbox_port is not None:
            self._changes |= self.absent.settings(self.sandbox_port)
        if not given.get("DATAOORTS_API_KEY"):
            self._changes["DATAOORTS_API_KEY"] = "sandbox"
        #: What Darkroom makes of all this; SettingsError when something is wrong with it.
        try:
            self.settings = settings.load(self.environ())
        except settings.SettingsError:
            for empty in self.scratch:
                empty.rmdir()
            raise

    @property
    def url(self) -> str:
        """Where the API answers."""
        return f"http://{web.LOOPBACK}:{self.port}"

    @property
    def scratch(self) -> tuple[Path, ...]:
        """Folders to remove at the end."""
        return (self.redis.scratch,) if self.redis is not None and self.redis.scratch is not None else ()

    def environ(self) -> dict[str, str]:
        """The environment of every process: ours, the settings, and this venv's programs first."""
        environ = settings.child_environ(self._changes)
        programs = str(Path(sys.executable).parent)
        return environ | {"PATH": f"{programs}:{environ['PATH']}" if environ.get("PATH") else programs}

    async def start(self, supervisor: Supervisor) -> None:
        """Start everything, each part when what it needs is there; Failure says what is missing."""
        processes = self.house.processes(self.settings)
        supervisor.make_room("sandbox", "migrations", *(command.name for command in processes))
        if self.redis is not None:
            supervisor.start(self.redis.command())
            await supervisor.wait_for(self.redis.missing, self.house.patience)
        if self.sandbox_port is not None:
            supervisor.start(Command("sandbox", self.house.sandbox.format(port=self.sandbox_port)))
            await supervisor.wait_for(self._missing_sandbox, self.house.patience)
        if await supervisor.run_once(Command("migrations", self.house.migrations)) != 0:
            raise Failure("the database could not be migrated; why stands above")
        supervisor.start(*processes)
        local = "diffusers" in self.settings.backends
        await supervisor.wait_for(self.missing, self.house.patience + (self.house.loading if local else 0))

    def missing(self) -> str | None:
        """What keeps the API and those behind it from serving; None when all of it is ready."""
        try:
            reply = web.ask(self.port, "GET", "/readyz")
        except (OSError, http.client.HTTPException) as error:
            return f"the API does not answer at {self.url} ({error})"
        if reply.status != 200:
            return f"{self.url}/readyz says {reply.status}: {reply.body.decode(errors='replace').strip()}"
        # Ready means that the database answers. What is started here should be all there too.
        not_ok = [name for name, state in reply.json().get("checks", {}).items() if state != "ok"]
        return f"{self.url}/readyz says: {', '.join(not_ok)} degraded" if not_ok else None

    def _missing_sandbox(self) -> str | None:
        assert self.sandbox_port is not None
        try:
            status = web.ask(self.sandbox_port, "GET", "/healthz").status
        except (OSError, http.client.HTTPException) as error:
            return f"the sandbox does not answer on port {self.sandbox_port} ({error})"
        return None if status == 200 else f"the sandbox says {status}"


class Absent:
    """Whom the sandbox must stand in for, with these settings. True if there is anybody.

    `vendor`: without a key there is nobody to call; unless nobody is to be called, or a sandbox runs already. `server`:
    the one of the backend `automatic1111`, if nobody says where it is.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        backends = [name.strip() for name in (given.get("DARKROOM_BACKENDS") or "dataoorts").split(",")]
        runs_already = given.get("DARKROOM_SANDBOX") and given.get("DATAOORTS_URL")
        self.vendor = "dataoorts" in backends and not given.get("DATAOORTS_API_KEY") and not runs_already
        self.server = "automatic1111" in backends and not given.get("DARKROOM_AUTOMATIC1111_URL")

    def __bool__(self) -> bool:
        return self.vendor or self.server

    def settings(self, port: int) -> dict[str, str]:
        """What makes the service use the sandbox on this port in their place."""
        here = f"http://{web.LOOPBACK}:{port}"
        vendor = {"DATAOORTS_URL": f"{here}/api/v1", "DARKROOM_SANDBOX": "1"}
        server = {"DARKROOM_AUTOMATIC1111_URL": here, "DARKROOM_AUTOMATIC1111_SANDBOX": "1"}
        return (vendor if self.vendor else {}) | (server if self.server else {})
