"""The spool: pictures that were received and are not stored yet, each a file on this machine's disk.

A picture is paid for once its bytes are here, and the vendor gives it no second time. So they are written down as they
came, before anything that can fail is done with them: before they are judged, before the database is asked.

    worker-5f0c…/lock                                 held by the owner for as long as its process lives
    worker-5f0c…/job_….1.9a8b7c6d.picture             the bytes; job, attempt and the bytes' CRC-32
    worker-5f0c…/job_….2.01234567.picture.part        not written to its end yet

Each worker process has a folder of its own. Its lock (`flock`) dies with the process, however that ends; so whoever
gets the lock knows that the owner is dead, and may offer what it left (`worker/recovery.py`).

Not covered: the loss of the machine or of its disk; what was still on its way when the worker died. The folder must be
one machine's: over NFS without locks, or with locks that stay local (`nolock`, `local_lock=flock`), a live worker of
another machine looks dead. On macOS a power cut may take what the drive had not written yet: `fsync` ends at the drive.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import threading
import zlib
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

log = logging.getLogger(__name__)

LOCK = "lock"
_FOLDER = re.compile(r"worker-[0-9a-f]{16}")
_PICTURE = re.compile(r"(job_\w+)\.([0-9]{1,9})\.([0-9a-f]{8})\.picture(\.part)?", re.ASCII)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture that was received for an attempt. `held`: its bytes, if they are in memory; `path`: of its file, None
    if they are there alone."""

    job_id: str
    attempt: int
    held: bytes | None = field(repr=False)
    path: Path | None = None

    def read(self) -> bytes:
        """Its bytes as they came; raises OSError if the disk does not give them."""
        if self.held is not None:
            return self.held
        assert self.path is not None
        return self.path.read_bytes()

    def remove(self) -> None:
        """The commit is made that makes it unnecessary. Not being there is fine."""
        if self.path is not None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:  # it will be offered again, which changes nothing
                its = {"job_id": self.job_id, "attempt": self.attempt}
                log.warning("a picture that is stored can't be removed from the spool (%s)", error, extra=its)


class _Folder:
    """A worker's folder, whose lock is ours."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, root: Path) -> Self:
        while True:
            path = root / f"worker-{secrets.token_hex(8)}"
            path.mkdir(mode=0o700)
            _sync(root)
            # Another worker may have seen the new folder, taken it for a dead one's and removed it: then the next one.
            if folder := cls.take(path):
                return folder

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """None: its owner lives, or it is gone."""
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before us may have removed it: then we hold the lock of nothing.
            if os.fstat(lock).st_ino == (path / LOCK).stat().st_ino:
                return cls(path, lock)
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None

    def write(self, name: str, data: bytes) -> Path:
        """On the disk under this name when it returns; when it raises OSError, nothing is left of it."""
        path, part = self.path / name, self.path / f"{name}.part"
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
            finally:
                os.close(file)
            part.rename(path)
            _sync(self.path)
        except OSError:
            for half in (part, path):
                with suppress(OSError):
                    half.unlink()
            raise
        return path

    def let_go(self) -> None:
        """Remove it if nothing is left in it, and give up its lock."""
        with suppress(OSError):  # what can't be removed is found again, empty
            if [entry.name for entry in self.path.iterdir()] == [LOCK]:
                (self.path / LOCK).unlink()
                self.path.rmdir()
        os.close(self._lock)


class Spool:
    """One worker process's spool within `root`, the folder that the workers of one backend share on this machine.

    Raises OSError if `root` can't be written; but not if the disk is full, since what stands on the spool may be why.
    `keep` is for any number of threads at once, the rest for one.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own: _Folder | None = None
        self._making = threading.Lock()
        self._writable = True
        self._ignored: set[Path] = set()
        self._unreadable: set[Path] = set()
        self._handed_back: set[Path] = set()
        try:
            self._folder()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._tell(error)

    def keep(self, job_id: str, attempt: int, data: bytes) -> Entry:
        """Write a received picture down. Where the disk doesn't take it, it is in memory alone, as the entry says."""
        try:
            path = self._folder().write(f"{job_id}.{attempt}.{zlib.crc32(data):08x}.picture", data)
        except OSError as error:
            self._tell(error)
            return Entry(job_id, attempt, data)
        if not self._writable:
            self._writable = True
            log.info("the spool can be written again")
        return Entry(job_id, attempt, None, path)

    def hand_back(self, entry: Entry) -> None:
        """Whoever received it could not store it and gave up: from now on it is among those that are left behind."""
        if entry.path is not None:
            self._handed_back.add(entry.path)

    def left_behind(self) -> Generator[Entry]:
        """The pictures that dead workers left, and those that were handed back; whole ones alone.

        While one is in the caller's hands, it is no other's. Raises OSError if the spool can't be read.
        """
        self._handed_back -= {path for path in tuple(self._handed_back) if not path.exists()}
        yield from self._entries(self._handed_back)
        for path in sorted(self._root.iterdir()):
            if not _FOLDER.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
                self.ignore(path, "it is not ours")
            elif (self._own is None or path != self._own.path) and (folder := _Folder.take(path)):
                try:
                    yield from self._entries(path.iterdir())
                finally:
                    folder.let_go()

    def ignore(self, path: Path, why: str) -> None:
        """Leave this alone from now on, and say so once."""
        if path not in self._ignored:
            self._ignored.add(path)
            log.warning("%s is left on the spool: %s", path, why)

    def close(self) -> None:
        """What is still in it is for the next worker from now on."""
        if self._own is not None:
            self._own.let_go()

    def _folder(self) -> _Folder:
        """Ours. Made at the start; or later, if the disk was full then."""
        if self._own is None:
            with self._making:
                if self._own is None:
                    _make(self._root)
                    self._own = _Folder.make(self._root)
        return self._own

    def _entries(self, paths: Iterable[Path]) -> Generator[Entry]:
        for path in sorted(paths):
            if path.name == LOCK or path in self._ignored:
                continue
            name = _PICTURE.fullmatch(path.name)
            if name is None or path.is_symlink() or not path.is_file():
                self.ignore(path, "it is not ours")
                continue
            try:
                data = path.read_bytes()
            except OSError as error:  # it may pass: too many files are open, say
                if path not in self._unreadable:
                    self._unreadable.add(path)
                    log.warning("%s can't be read now, and is tried again (%s)", path, error)
                continue
            if zlib.crc32(data) == int(name[3], 16):
                yield Entry(name[1], int(name[2]), data, path)
            elif name[4]:
                log.warning("%s: the worker died while it wrote this picture down: it is lost", path.name)
                with suppress(OSError):
                    path.unlink()
            else:
                self.ignore(path, "it is damaged")

    def _tell(self, error: OSError) -> None:
        if self._writable:
            self._writable = False
            log.warning("the spool can't be written (%s): pictures go straight to the database until it can", error)


def _make(folder: Path) -> None:
    """With all that is above it, on the disk: a file is safe only in a folder that is."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
