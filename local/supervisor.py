"""The supervisor: starts processes, shows what they say, starts again what dies, and stops them all.

Every process leads a session and a process group of its own, so that a Ctrl-C of the terminal reaches the supervisor
alone, and so that its children can be ended with it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local.guard import Guard, announced
from local.output import Columns, copy_lines

#: So many short lives in a row are no accident.
_HOPELESS = 3
#: A second signal that comes so soon is the first one told twice: `timeout` sends it to its child and to the group.
_TOLD_TWICE_SECONDS = 0.3


@dataclass(frozen=True)
class Command:
    """A line of shell under a name.

    `grace` is how long it may take to end after SIGTERM; `log` is where its words go, if not to its output.
    """

    name: str
    line: str
    grace: float = 30.0
    log: Path | None = None


@dataclass(frozen=True)
class Question:
    """A command that is asked now and then about processes, whose ids stand behind it.

    It says a line `ID why` for each that stands still and can't end itself. Said twice in a row, it is killed.
    """

    line: str
    about: frozenset[str]  # names of commands
    every: float = 15.0
    patience: float = 30.0


@dataclass(frozen=True)
class Pauses:
    """How long to wait before a process is started again: twice as long each time, until one lived long enough."""

    first: float = 0.5
    longest: float = 30.0
    good_life: float = 30.0


class Failure(Exception):
    """Something did not start; the message is for the person at the terminal."""


class Kept:
    """One command under supervision, through all its processes."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.leaving = asyncio.Event()
        #: How often in a row it ended after a short life, without being asked to; and how it ended last.
        self.deaths = 0
        self.last_end = ""
        #: Of its process, while there is one.
        self.pid: int | None = None
        self.task: asyncio.Task[None] | None = None


class Supervisor:
    """Runs inside one event loop: `supervise` does some work with processes around it, and stops them at its end.

    `remove` are folders to remove when all is over; `locks` are descriptors whose locks outlive even a killed
    supervisor until its processes are dead. `write` shows a line.
    """

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str],
        write: Callable[[str], None],
        *,
        remove: Sequence[Path] = (),
        locks: Sequence[int] = (),
        pauses: Pauses | None = None,
        question: Question | None = None,
    ) -> None:
        self._folder = folder
        self._environ = dict(environ)
        self._remove = remove
        self._locks = locks
        self._pauses = pauses or Pauses()
        self._question = question
        self._stages: list[list[Kept]] = []
        self._groups: set[int] = set()
        self._stop = asyncio.Event()
        self._columns = Columns(write, gone=self._stop.set)
        self._asked_at = 0.0
        self._hurry = asyncio.Event()
        self._killed_some = False
        self._guard: Guard

    async def supervise(self, work: Callable[[], Coroutine[Any, Any, int]]) -> int:
        """Do the work until it returns its exit code or a signal comes; stop everything; return the exit code.

        0 after a signal that all processes obeyed in time, 1 if one had to be killed.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number)
        self._guard = await Guard.start((), self._remove, self._locks)
        guarding = asyncio.create_task(self._keep_guard())
        asking = asyncio.create_task(self._ask_again_and_again(self._question)) if self._question else None
        working = asyncio.create_task(work())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
        finally:
            stopping.cancel()
            if asking is not None:
                asking.cancel()
            await self._stop_all()
            guarding.cancel()
            await self._guard.finish()
        return 1 if self._killed_some else 0

    def say(self, text: str) -> None:
        """Show a line of the supervisor's own."""
        self._columns.write("darkroom", text)

    def make_room(self, *names: str) -> None:
        """Make the column of names wide enough for all that is to come."""
        self._columns.make_room(names)

    def start(self, *commands: Command) -> None:
        """Keep these running. They stop together, and before everything that was started earlier."""
        stage = [Kept(command) for command in commands]
        self.make_room(*(command.name for command in commands))
        self._stages.append(stage)
        for kept in stage:
            kept.task = asyncio.create_task(self._keep(kept))

    async def run_once(self, command: Command) -> int:
        """Run a command to its end and return its exit code; a signal's is negative."""
        self.make_room(command.name)
        return await self._run(Kept(command))

    async def wait_for(self, missing: Callable[[], str | None], seconds: float) -> None:
        """Wait until `missing` (called in a thread) has nothing to say; Failure with what it said last."""
        deadline = asyncio.get_running_loop().time() + seconds
        while (what := await asyncio.to_thread(missing)) is not None:
            self.check()
            if asyncio.get_running_loop().time() > deadline:
                raise Failure(f"after {seconds:g} s: {what}")
            await asyncio.sleep(0.05)

    def check(self) -> None:
        """Failure when a process dies again and again: waiting for what it should do would be in vain."""
        for kept in (kept for stage in self._stages for kept in stage):
            if kept.deaths >= _HOPELESS:
                where = f"see {kept.command.log}" if kept.command.log else "its last words stand above"
                raise Failure(f"{kept.command.name} does not stay alive ({kept.last_end}); {where}")

    def _signalled(self, number: signal.Signals) -> None:
        now = asyncio.get_running_loop().time()
        if self._stop.is_set():
            if now - self._asked_at > _TOLD_TWICE_SECONDS:
                self._hurry.set()
            return
        self._asked_at = now
        graces = [max(kept.command.grace for kept in stage) for stage in self._stages if stage]  # one after the other
        self.say(
            f"{number.name}: stopping; waiting for {sum(graces):g} s at most for what is in hand (calls are paid); "
            "Ctrl-C again ends it at once"
        )
        self._stop.set()

    async def _stop_all(self) -> None:
        for stage in reversed(self._stages):
            for kept in stage:
                kept.leaving.set()
            await asyncio.gather(*(kept.task for kept in stage if kept.task is not None))

    async def _keep_guard(self) -> None:
        while True:
            await self._guard.process.wait()
            self.say(f"the guard ended ({how_it_ended(self._guard.process.returncode)}); starting it again")
            told = frozenset(self._groups)
            dead, self._guard = self._guard, await Guard.start(told, self._remove, self._locks)
            os.close(dead.pipe)  # not before: what is being started writes into it
            for group in self._groups - told:
                self._guard.tell(f"+{group}\n")
            for group in told - self._groups:
                self._guard.forget(group)

    async def _ask_again_and_again(self, question: Question) -> None:
        suspects: set[int] = set()
        while True:
            await asyncio.sleep(question.every)
            asked = {
                kept.pid: kept
                for kept in (kept for stage in self._stages for kept in stage)
                if kept.command.name in question.about and kept.pid is not None and not kept.leaving.is_set()
            }
            silent = await self._ask(question, list(asked)) if asked else {}
            for pid in suspects & silent.keys() & asked.keys():
                if asked[pid].pid == pid:  # it may have ended meanwhile
                    self.say(f"{asked[pid].command.name} stands still: killing it ({silent[pid]})")
                    _signal_group(pid, signal.SIGKILL)
            suspects = set(silent)

    async def _ask(self, question: Question, pids: Sequence[int]) -> dict[int, str]:
        """What is said of each; nothing where nobody can tell."""
        words = f"exec {question.line} {' '.join(map(str, pids))}"
        try:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", words,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=self._folder, env=self._environ,
            )  # fmt: skip
        except OSError:
            return {}
        try:
            said, _ = await asyncio.wait_for(process.communicate(), question.patience)
        except TimeoutError:
            return {}
        finally:
            if process.returncode is None:
                process.kill()
        lines = (line.partition(" ") for line in said.decode(errors="replace").splitlines())
        return {int(pid): why for pid, _, why in lines if pid.isdigit()}

    async def _keep(self, kept: Kept) -> None:
        pause = self._pauses.first
        loop = asyncio.get_running_loop()
        while not kept.leaving.is_set():
            began = loop.time()
            try:
                kept.last_end = how_it_ended(await self._run(kept))
            except OSError as error:  # no memory or no process left on this machine; perhaps later
                kept.last_end = f"could not start: {error}"
            if kept.leaving.is_set():
                break
            if loop.time() - began >= self._pauses.good_life:
                pause, kept.deaths = self._pauses.first, 0
            kept.deaths += 1
            self.say(f"{kept.command.name} ended ({kept.last_end}); starting it again in {pause:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(kept.leaving.wait(), pause)
            pause = min(2 * pause, self._pauses.longest)

    async def _run(self, kept: Kept) -> int:
        """One process from its start to its end, and its group's. Asked to leave, or cancelled, it is stopped."""
        read_end, write_end = os.pipe()
        copying = asyncio.create_task(copy_lines(read_end, kept.command.name, self._columns))
        try:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", announced(kept.command.line),
                stdin=self._guard.pipe, stdout=write_end, stderr=subprocess.STDOUT,
                start_new_session=True, cwd=self._folder, env=self._environ,
            )  # fmt: skip
        finally:
            os.close(write_end)
        self._groups.add(process.pid)
        kept.pid = process.pid
        self._guard.tell(f"+{process.pid}\n")  # it does so itself, but perhaps to a guard that has just died
        exited = asyncio.create_task(process.wait())
        leaving = asyncio.create_task(kept.leaving.wait())
        try:
            await asyncio.wait({exited, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            kept.pid = None
            leaving.cancel()
            if not exited.done():
                await self._end(kept.command, process, exited)
            # Whoever is left of its group would hold its files, its port and its output.
            _signal_group(process.pid, signal.SIGKILL)
            self._groups.discard(process.pid)
            self._guard.forget(process.pid)
            # A moment for what stands in the pipe; a grandchild in a session of its own may hold it open for ever.
            await asyncio.wait({copying}, timeout=1)
            copying.cancel()
        return exited.result()

    async def _end(self, command: Command, process: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({exited, hurrying}, timeout=command.grace, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not exited.done():
            self.say(f"{command.name} did not end in time: killing it")
            self._killed_some = True
            _signal_group(process.pid, signal.SIGKILL)
            await exited


def how_it_ended(code: int | None) -> str:
    """An exit code in words."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _signal_group(group: int, number: signal.Signals) -> None:
    # PermissionError: macOS says so of a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
