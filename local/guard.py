"""The guard: ends everything that the supervisor started, should the supervisor itself be killed.

It is a process of its own (`guard_process.py`), in a session of its own, and holds the read end of a pipe. A process
that is being started writes `+<its group>` into the pipe *before* it becomes the program it is to be, and closes its
end by doing so; the supervisor writes `-<group>` when the group is gone. So whenever the pipe ends (the supervisor was
killed, or is done) every group that lives has been told of, even one that was started just before. The kernel does the
telling: nothing has to be alive on the other side. PR_SET_PDEATHSIG would not do: it is Linux's alone, and
grandchildren do not inherit it.

The guard inherits the lock on the data folder too: nobody gets the folder before its last user is dead. It also removes
the folders that it was told of at the start, so that not even `kill -9` leaves temporary files behind.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

_PROGRAM = Path(__file__).with_name("guard_process.py")


class Guard:
    """The supervisor's side: the process, and the write end of its pipe."""

    def __init__(self, process: asyncio.subprocess.Process, pipe: int) -> None:
        self.process = process
        #: Processes get it as their standard input, to announce themselves; see `announced`.
        self.pipe = pipe

    @classmethod
    async def start(cls, groups: Collection[int], remove: Sequence[Path], locks: Sequence[int]) -> "Guard":
        """Start a guard that knows these groups, removes these folders at the end, and shares these locks."""
        read_end, write_end = os.pipe()
        for group in groups:  # before it lives: we may be killed before anything else that we do
            os.write(write_end, f"+{group}\n".encode())
        try:
            # -I -S: nothing but the standard library, so that it starts in milliseconds and stays small.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(_PROGRAM), *map(str, remove),
                stdin=read_end, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True, pass_fds=tuple(locks), cwd="/",
            )  # fmt: skip
        finally:
            os.close(read_end)
        return cls(process, write_end)

    def forget(self, group: int) -> None:
        """The group is gone; its number may be another's soon."""
        self.tell(f"-{group}\n")

    def tell(self, line: str) -> None:
        """Write one line. A guard that is dead hears nothing: its successor is told of everything at its start."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.pipe, line.encode())

    async def finish(self) -> None:
        """Let the guard end what is left and go."""
        os.close(self.pipe)
        await self.process.wait()


def announced(line: str) -> str:
    """A shell script that tells the guard (at its standard input) of its own group, and then becomes `line`."""
    return f'echo "+$$" >&0; exec </dev/null; exec {line}'
