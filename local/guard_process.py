"""The guard's own program; `guard.py` says what it is for. Standard library only: it runs without site-packages.

Its arguments are the folders to remove at the end.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

#: How long killed processes may take to die (one that waits for a dead disk takes for ever).
_PATIENCE = 30.0


def _watch() -> set[int]:
    """Listen until the pipe ends; the groups that are left."""
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line.startswith("+"):
            groups.add(group)
        else:
            groups.discard(group)
    return groups


def _lives(group: int) -> bool:
    """Is anybody of the group there? Zombies aside; they hold neither files nor ports, and some inits keep them."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # macOS: PermissionError, of a group of zombies
        return False
    stats = [_read(path) for path in Path("/proc").glob("[0-9]*/stat")]
    # pid (name) state parent group ...; the name may hold anything.
    fields = [stat.rpartition(")")[2].split() for stat in stats if stat]
    return not fields or any(int(field[2]) == group and field[0] not in "ZX" for field in fields)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # gone in the meantime
        return ""


def _end(groups: set[int]) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + _PATIENCE
    while any(map(_lives, groups)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _end(_watch())
    for folder in sys.argv[1:]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main()
