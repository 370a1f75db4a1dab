"""Read a Procfile: a line `name: command` each process; empty lines and lines that start with # say nothing."""

import re
from pathlib import Path

from local.supervisor import Command

_LINE = re.compile(r"([A-Za-z0-9_-]+):\s*(\S.*)")


def read(path: Path) -> tuple[Command, ...]:
    """The commands of a Procfile, in its order. ValueError for a line that is none, or a name that comes twice."""
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
    return tuple(commands.values())
