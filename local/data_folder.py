"""The data folder: for one Darkroom at a time, for its owner's eyes only, and home of the keys that we make."""

import fcntl
import os
import secrets
from pathlib import Path

from local.supervisor import Failure


class DataFolder:
    """Made when missing, and locked for as long as `lock` is open, here or in any process that inherits it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Failure(f"{path} can't be the data folder: {error.strerror}") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.lock, 20, 0).decode(errors="replace").strip()
            os.close(self.lock)
            who = f"another Darkroom (process {holder or 'unknown'})"
            raise Failure(f"{who} is using {path}; stop it, or give another folder with --data") from None
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, f"{os.getpid()}\n".encode(), 0)

    def secret_key(self) -> str:
        """The key that signs and seals; made at the first use."""
        return self._kept("secret_key", secrets.token_hex(32))

    def api_key(self) -> str:
        """The first caller's key; made at the first use. Hexadecimal, so that a double click selects all of it."""
        return self._kept("api_key", "dk_" + secrets.token_hex(24))

    def _kept(self, name: str, fresh: str) -> str:
        path = self.path / name
        if path.exists():
            return path.read_text().strip()
        # Written aside and renamed: there is never half a key. Our lock keeps others from doing the same.
        aside = self.path / f".{name}"
        aside.unlink(missing_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(fresh + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        return fresh
