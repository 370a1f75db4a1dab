"""Read a Procfile: a line `name: command` each process; empty lines and lines that start with # say nothing."""

import re
from collections.abc import Collection
from pathlib import Path

from local.supervisor import Command

_LINE = re.compile(r"([A-Za-z0-9_-]+):\s*(\S.*)")


#: The queue that tells a worker's backend.
_BACKEND = re.compile(r" -Q generate\.(\S+)")


def read(path: Path, backends: Collection[str] | None = None) -> tuple[Command, ...]:
    """The commands of a Procfile, in its order. ValueError for a line that is none, or a name that comes twice.

    `backends`: those in use; workers of others are left out. None: all of them are wanted.
    """
    commands: dict[str, Command] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{path.name}, line {number}: not of the form `name: command`")
        if match[1] in commands:
            raise ValueError(f"{path.name}, line {number}: a second `{match[1]}`")
        commands[match[1]] = Command(match[1], match[2])
    if backends is not None:
        wanted = {None, *backends}
        commands = {name: command for name, command in commands.items() if backend_of(command) in wanted}
    return tuple(commands.values())


def backend_of(command: Command) -> str | None:
    """The backend that this worker draws with; None: it does not draw."""
    queue = _BACKEND.search(command.line)
    return queue and queue[1]
