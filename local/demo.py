"""`./dev demo`: one picture, on a free port and a throw-away data folder; the last line is the picture's path."""

import argparse
import asyncio
import http.client
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from local import web
from local.data_folder import DataFolder
from local.output import show
from local.service import House, Service
from local.supervisor import Failure, Supervisor
from local.up import how_it_draws
from shared import settings

#: The prompt of the vendor's own sample.
SUBMISSION = {"input": {"prompt": "futuristic spacecraft"}}
#: A demo leaves no trace: it uses no store and no key of the environment, only what says who draws.
_NOT_USED = ("DARKROOM_DATABASE_URL", "DARKROOM_REDIS_URL", "DARKROOM_API_KEY", "DARKROOM_SECRET_KEY", "DARKROOM_SPOOL")
#: Longer than a hosted call with its retries takes.
_LONGEST_WAIT = 300.0
_POLL = 0.05
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_LAST_LINES = 40


class Demo:
    """One job on a service of its own, from the submission to the saved picture."""

    def __init__(self, service: Service, supervisor: Supervisor, destination: Path) -> None:
        self._service = service
        self._supervisor = supervisor
        self._destination = destination
        self._began = 0.0
        self.picture: Path | None = None

    async def run(self) -> int:
        """The supervisor's work."""
        for line in how_it_draws(self._service):
            show(line)
        began = time.monotonic()
        await self._service.start(self._supervisor)
        show(f"Everything runs, after {time.monotonic() - began:.1f} s: API, worker, sweep, Redis, SQLite.")
        job = await self._submit()
        job = await self._follow(job)
        if job["status"] != "succeeded":
            raise Failure(f"the job {job['status']}: {job['error']}")
        reply = await self._ask("GET", job["urls"]["image"])
        self.picture = save(reply.body, reply.content_type, job["id"], self._destination)
        return 0

    async def _ask(self, method: str, address: str, body: object = None) -> web.Reply:
        path = address.removeprefix(self._service.settings.public_url or self._service.url)
        port, key = self._service.port, self._service.api_key
        try:
            reply = await asyncio.to_thread(web.ask, port, method, path, key=key, body=body, timeout=30)
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"{method} {path}: no answer ({error})") from error
        if reply.status >= 400:
            raise Failure(f"{method} {path} -> {reply.status}: {reply.body.decode(errors='replace').strip()}")
        return reply

    async def _submit(self) -> dict[str, Any]:
        self._began = time.monotonic()
        reply = await self._ask("POST", "/v1/jobs", SUBMISSION)
        job: dict[str, Any] = reply.json()
        self._tell(f"POST /v1/jobs -> {reply.status} {job['id']}")
        return job

    async def _follow(self, job: dict[str, Any]) -> dict[str, Any]:
        seen = None
        while True:
            if job["sequence"] != seen:
                seen = job["sequence"]
                self._tell(await self._describe(job))
            if job["status"] not in ("queued", "running"):
                return job
            if time.monotonic() - self._began > _LONGEST_WAIT:
                raise Failure(f"after {_LONGEST_WAIT:g} s the job is still {job['status']}")
            self._supervisor.check()
            await asyncio.sleep(_POLL)
            job = (await self._ask("GET", job["urls"]["self"])).json()

    async def _describe(self, job: dict[str, Any]) -> str:
        if job["status"] == "running":
            attempts = (await self._ask("GET", job["urls"]["self"] + "/attempts")).json()["data"]
            backend = attempts[-1]["backend"] if attempts else job["backend"]
            return f"running    attempt {job['attempts']}, {backend}{' (sandbox)' if job['sandbox'] else ''}"
        if image := job["image"]:
            size = f"{image['width']}x{image['height']}"
            return f"succeeded  {size} {image['content_type']} {image['bytes'] / 1000:.0f} kB, ${job['cost_usd']}"
        return str(job["status"])

    def _tell(self, text: str) -> None:
        show(f"{time.monotonic() - self._began:6.2f} s  {text}")


def save(picture: bytes, content_type: str, job_id: str, folder: Path) -> Path:
    """Write the picture under a name that nothing has yet; its path."""
    extension = _EXTENSIONS.get(content_type.partition(";")[0].strip(), "bin")
    for number in range(1, 1000):
        # The end of an id is random; its beginning is the time, the same for all jobs of a minute.
        again = f"-{number}" if number > 1 else ""
        path = folder / f"darkroom-{job_id[-8:]}{again}.{extension}"
        try:
            with path.open("xb") as file:
                file.write(picture)
        except FileExistsError:
            continue
        except OSError as error:
            raise Failure(f"the picture can't be saved as {path}: {error.strerror}") from error
        return path
    raise Failure(f"{folder} is full of pictures of this job")


async def demo(house: House, destination: Path, log: deque[str]) -> tuple[int, Path | None]:
    """Run the demo; its exit code, and the picture's path if there is one. `log` takes what the processes say."""
    # Removed here, and by the guard if we are killed.
    with tempfile.TemporaryDirectory(prefix="darkroom-demo-", ignore_cleanup_errors=True) as throw_away:
        folder = DataFolder(Path(throw_away))
        service = Service(house, folder, web.free_port(), settings.given() | dict.fromkeys(_NOT_USED, ""))
        remove = [folder.path, *service.scratch]
        supervisor = Supervisor(house.root, service.environ(), log.append, remove=remove, locks=[folder.lock])
        work = Demo(service, supervisor, destination)
        return await supervisor.supervise(work.run), work.picture


def main(arguments: Sequence[str] | None = None, house: House | None = None) -> int:
    """Read the command line and run; the exit code."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--caller", type=Path, default=Path(), help=argparse.SUPPRESS)
    destination = parser.parse_args(arguments).caller.resolve()
    if not os.access(destination, os.W_OK):
        print(f"darkroom: the picture can't be saved here: {destination} is not writable", file=sys.stderr)
        return 1
    log: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        code, picture = asyncio.run(demo(house or House(), destination, log))
    except settings.SettingsError as error:
        print(f"darkroom can't start:\n{error}", file=sys.stderr)
        return 2
    except Failure as error:
        print("The last words of the processes:", *log, f"darkroom: {error}", sep="\n", file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads what we say
        return 1
    except KeyboardInterrupt:
        return 130
    if picture is None:
        return code or 130
    show(str(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
