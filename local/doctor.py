"""`./dev doctor`: what may stand in the way of `./dev up` on this machine, and of what runs here already.

It makes nothing and locks nothing: it works out the settings that `./dev up` would use (its keys live in the data
folder) and lets `python -m worker.doctor` look. What is not there because `./dev up` has not made it yet is no fault.
"""

import argparse
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from local import web
from local.embedded_redis import EmbeddedRedis, server_binary
from local.service import CHECKOUT, Absent
from local.supervisor import Failure
from shared import settings


class Prospect:
    """What `./dev up` would run with on this data folder: its settings, and of what is not there yet what becomes."""

    def __init__(self, folder: Path, given: Mapping[str, str]) -> None:
        self.not_yet: dict[str, str] = {}
        self.environ = dict(given) | {"DARKROOM_DATA_DIR": str(folder)}
        self._keys(folder)
        self.environ.setdefault("DARKROOM_PUBLIC_URL", f"http://{web.LOOPBACK}:8000")
        absent = Absent(given)
        self.environ |= absent.settings(port=9)
        if absent.vendor:
            self.not_yet["dataoorts"] = "DATAOORTS_API_KEY is not set: `./dev up` starts a sandbox that stands in"
        if absent.server:
            missing = "DARKROOM_AUTOMATIC1111_URL is not set"
            self.not_yet["automatic1111"] = f"{missing}: `./dev up` starts a sandbox that stands in"
        if not given.get("DATAOORTS_API_KEY"):
            self.environ["DATAOORTS_API_KEY"] = "sandbox"
        if not given.get("DARKROOM_DATABASE_URL") and not (folder / "darkroom.db").exists():
            for name in ("database", "migrations"):
                self.not_yet[name] = f"there is none in {folder} yet: `./dev up` makes it"
        self._redis(folder, given)
        if {"database", "redis"} & self.not_yet.keys():
            self.not_yet["workers"] = "nothing runs here: `./dev up` starts everything"

    def _keys(self, folder: Path) -> None:
        fresh = {"secret_key": secrets.token_hex(32), "api_key": "dk_" + secrets.token_hex(24)}
        for name, key in fresh.items():
            if not self.environ.get(settings.variable(name)):
                kept = folder / name
                if not kept.exists():
                    self.not_yet[name.replace("_", " ")] = f"there is none in {folder} yet: `./dev up` makes it"
                self.environ[settings.variable(name)] = kept.read_text().strip() if kept.exists() else key

    def _redis(self, folder: Path, given: Mapping[str, str]) -> None:
        if given.get("DARKROOM_REDIS_URL"):
            return
        embedded = EmbeddedRedis(folder / "redis", folder / "redis" / "redis.sock", None)
        if embedded.missing() is None:
            self.environ["DARKROOM_REDIS_URL"] = embedded.url
            return
        try:
            self.not_yet["redis"] = f"`./dev up` starts its own ({Path(server_binary()).name})"
        except Failure as error:
            self.environ["DARKROOM_REDIS_URL"] = f"redis://{web.LOOPBACK}:6379/0"
            print(f"{error}\n", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and look; the exit code, 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="./dev doctor", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="the data folder (as of ./dev up)")
    parser.add_argument("--caller", type=Path, default=Path(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    data = options.data or settings.given().get("DARKROOM_DATA_DIR")
    folder = (options.caller / data if data else CHECKOUT / "data").resolve()
    prospect = Prospect(folder, settings.given())
    words = [word for name, why in prospect.not_yet.items() for word in ("--not-yet", f"{name}={why}")]
    print(f"What `./dev up` would run with on {folder}:\n", flush=True)
    command = [sys.executable, "-m", "worker.doctor", *words]
    return subprocess.run(command, cwd=CHECKOUT, env=settings.child_environ(prospect.environ), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
