"""The processes that bench and drills start: each in a group of its own, ended with all its children."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from local import guard_process
from shared.settings import child_environ

ROOT = Path(__file__).parent.parent
#: Programs are those of this Python's own environment.
PATH = f"{Path(sys.executable).parent}:{os.defpath}"
#: Between two looks at the memory, in seconds. A look takes about a millisecond a process.
LOOK_EVERY = 0.25


class Processes:
    """A few processes that live and die together. A guard ends them even when the bench itself is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard_process.__file__, str(folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def start(self, name: str, line: str, environ: Mapping[str, str], cwd: Path = ROOT) -> None:
        """Start a shell line as `name`; what it says goes to NAME.log in the folder."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {line}"],
                cwd=cwd,
                env=child_environ({"PATH": PATH, **environ}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._tell(f"+{process.pid}\n")

    def _tell(self, line: str) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(line.encode())
        self._guard.stdin.flush()

    def check(self) -> None:
        """Raises RuntimeError if one of them has ended."""
        for name, process in self.running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}: {self.log(name)[-2000:]}")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """SIGKILL to the process and all its children, at once."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._tell(f"-{process.pid}\n")  # the number may be another's soon

    def stop(self, name: str, grace: float) -> int | None:
        """SIGTERM, and its exit code; None if it had to be killed after `grace` seconds."""
        process = self.running[name]
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        code = process.poll()
        self.kill(name)  # whatever is left of it
        return code

    def freeze(self, name: str) -> None:
        """SIGSTOP to the process and all its children: they hold what they hold, and answer nothing."""
        os.killpg(self.running[name].pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        os.killpg(self.running[name].pid, signal.SIGCONT)

    def close(self) -> None:
        """End them all, and remove the folder."""
        for name in list(self.running):
            self.kill(name)
        self._guard.communicate()  # the end of its input is its sign to go


@dataclass
class Memory:
    """The most that was seen, in bytes: the sum of all processes' RSS, and of their PSS (Linux; else None)."""

    rss: int = 0
    pss: int | None = None


@contextmanager
def watched_memory(processes: Iterable[subprocess.Popen[bytes]]) -> Iterator[Memory]:
    """Look at these processes and all their children while the block runs."""
    memory, done = Memory(), threading.Event()
    roots = [psutil.Process(process.pid) for process in processes]

    def watch() -> None:
        while True:
            _look(memory, roots)
            if done.wait(LOOK_EVERY):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def _look(memory: Memory, roots: Iterable[psutil.Process]) -> None:
    rss = pss = 0
    for process in [process for root in roots for process in (root, *root.children(recursive=True))]:
        with suppress(psutil.NoSuchProcess):
            used = process.memory_full_info()
            rss += used.rss
            pss += getattr(used, "pss", 0)
    memory.rss = max(memory.rss, rss)
    if pss:
        memory.pss = max(memory.pss or 0, pss)
