"""What the processes say, line by line, each with the name of its process before it."""

import asyncio
import codecs
import os
import sys
from collections.abc import Callable, Iterable

#: A longer line is shown in pieces: nothing that a process says may fill our memory.
_LONGEST_LINE = 16_384


def show(line: str) -> None:
    """Print a line at once. OSError when nobody reads any more; the next lines are then lost without a word."""
    try:
        print(line, flush=True)
    except OSError:
        # Else the interpreter tries once more to write it, at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class Columns:
    """Lines as `name | text`, the names in a column that is as wide as the longest of them.

    `gone` is called when nobody reads them any more.
    """

    def __init__(self, write: Callable[[str], None], gone: Callable[[], None]) -> None:
        self._write = write
        self._gone = gone
        self._width = len("darkroom")

    def make_room(self, names: Iterable[str]) -> None:
        """Widen the column for these names."""
        self._width = max(self._width, *map(len, names))

    def write(self, name: str, text: str) -> None:
        """Show one line."""
        try:
            self._write(f"{name:<{self._width}} | {text}")
        except OSError:
            self._gone()


async def copy_lines(descriptor: int, name: str, columns: Columns) -> None:
    """Copy what comes out of the pipe until its end, or until cancelled; then close it.

    Reads for itself, not through asyncio's subprocess pipes: on some Python versions those make the wait for a process
    a wait for all its grandchildren that share its output.
    """
    os.set_blocking(descriptor, False)
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    rest = ""
    try:
        while True:
            await readable.wait()
            readable.clear()
            try:
                data = os.read(descriptor, 65_536)
            except BlockingIOError:
                continue
            *lines, rest = (rest + decode(data, not data)).split("\n")
            for line in lines:
                columns.write(name, line.rstrip("\r"))
            while len(rest) > _LONGEST_LINE:
                columns.write(name, rest[:_LONGEST_LINE])
                rest = rest[_LONGEST_LINE:]
            if not data:
                return
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        if rest:
            columns.write(name, rest)
