"""Programs that the tests run: started, listened to line by line, and ended with everything that they started."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from shared import settings

ROOT = Path(__file__).parent.parent.parent
#: Nothing here takes so long; a test that waits for it has failed.
PATIENCE = 60.0


class Program:
    """A Python module of this checkout that runs, both its outputs in one."""

    def __init__(self, module: str, *arguments: object, environ: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=settings.child_environ(environ or {}),
            start_new_session=True,
        )
        self.seen: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def until(self, pattern: str) -> re.Match[str]:
        """Read on until a line holds the pattern. pytest's time limit ends a wait that has no end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(line.rstrip("\n"))
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"never said {pattern!r}, but:\n" + "\n".join(self.seen))

    def said(self, pattern: str) -> re.Match[str]:
        """The same where the line may have been read already: what several processes say comes in any order."""
        found = (re.search(pattern, line) for line in self.seen)
        return next((match for match in found if match), None) or self.until(pattern)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Read to the end; the exit code."""
        assert self._process.stdout is not None
        self.seen += self._process.stdout.read().splitlines()
        return self._process.wait(PATIENCE)

    def stop_reading(self) -> None:
        """As `| head` does."""
        assert self._process.stdout is not None
        self._process.stdout.close()

    def family(self) -> list[psutil.Process]:
        """All that it has started: children, theirs, and the guard."""
        return psutil.Process(self.pid).children(recursive=True)

    def close(self) -> None:
        """SIGTERM, and SIGKILL for a supervisor that does not listen; its guard does the rest."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self.stop_reading()
        self._process.wait()


@contextmanager
def running(module: str, *arguments: object, environ: Mapping[str, str] | None = None) -> Iterator[Program]:
    """A program for the length of a block."""
    program = Program(module, *arguments, environ=environ)
    try:
        yield program
    finally:
        program.close()


def lives(process: psutil.Process) -> bool:
    """Zombies are dead: some inits take their time to bury them."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def living_with(text: str) -> list[psutil.Process]:
    """The processes of this machine that live and have this in their command line."""
    return having(text, psutil.process_iter())


def having(text: str, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of them that live and have this in their command line; one that ends meanwhile is none of them."""
    found = []
    for process in processes:
        try:
            if any(text in word for word in process.cmdline()) and lives(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


def eventually(what: str, is_so: Callable[[], bool]) -> None:
    """Wait for something that nobody tells of."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
