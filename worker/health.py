"""Whether the workers of this host are well: one line each, and exit code 0, or 1 if one of them is not.

    python -m worker.health                    those of this host: in a container, its worker
    python -m worker.health worker-webhooks    by its name in the Procfile, or by what it does (`deliver`)
    python -m worker.health host:1234          by the name in its row
    python -m worker.health --silent 1234 ...  for a supervisor: a line for each process that must be killed

It reads the row that a worker writes with every heartbeat. Not well is one whose row is missing, was not renewed for
20 s (it is dead, stopped, or does not reach the database), or says itself that it is stuck (worker/watchdog.py). It
starts no Celery and asks no Redis: an orchestrator calls it every few seconds.

`--silent` names those alone that a restart would mend and that can't end themselves: stopped from outside, or with an
interpreter that stands still. When nobody's row is renewed, it is the database that takes no writes: none is named.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select

from shared import settings
from shared.database import AWAY, Database, now
from shared.present import GONE_SECONDS, SWEEP
from shared.tables import workers

#: What the processes of the Procfile do, where their names don't say it: as their rows spell it.
DOES = {"worker-webhooks": "deliver", "worker-gpu": "diffusers", "worker-sweep": SWEEP}


def rows_of(url: str) -> list[Row[Any]]:
    """Every worker's row, the latest first, with the database's clock."""
    with closing(Database(url, connections=1, wait_seconds=5)) as database, database.read() as connection:
        return list(connection.execute(select(workers, now().label("now")).order_by(workers.c.seen_at.desc())))


def judge(row: Row[Any]) -> tuple[bool, str]:
    """Whether the worker of this row is well, and a line about it."""
    age = _seconds_since(row, row.seen_at)
    what = f"{row.backend} ({row.name})"
    if age > GONE_SECONDS:
        return False, f"{what}: not seen for {age:.0f} s: it is dead, stopped, or does not reach the database"
    if row.trouble:
        return False, f"{what}: {row.trouble}"
    if row.backend == SWEEP:
        return True, f"{what}: swept {age:.0f} s ago"
    quiet = "" if row.progressed_at is None else f", moved {_seconds_since(row, row.progressed_at):.0f} s ago"
    return True, f"{what}: {row.in_hand} of {row.slots} slots in use, {row.done} done{quiet}"


def meant(rows: Sequence[Row[Any]], host: str, name: str | None) -> list[Row[Any]]:
    """Those that are asked for: of each kind of work the latest on this host, and whoever else's process is there.

    A process that was killed leaves a row for a while, and one that was stopped looks like it, but for its process.
    """
    if name is not None and ":" in name:
        return [row for row in rows if row.name == name]
    does = name and DOES.get(name, name.removeprefix("worker-"))
    here = [row for row in rows if row.name.rpartition(":")[0] == host and does in (None, row.backend)]
    latest: dict[str, Row[Any]] = {}
    for row in here:
        latest.setdefault(row.backend, row)
    return [row for row in here if row is latest[row.backend] or _is_there(row.name)]


def _is_there(name: str) -> bool:
    """Whether the process of this row is, on this host. In containers that share a name it may be somebody else's."""
    try:
        os.kill(int(name.rpartition(":")[2]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def silent(rows: Sequence[Row[Any]], host: str, processes: Sequence[int]) -> list[tuple[int, str]]:
    """Of these processes of this host, those that write nothing while others do; each with what is wrong."""
    if not any(_seconds_since(row, row.seen_at) < GONE_SECONDS / 2 for row in rows):
        return []
    asked = {f"{host}:{process}": process for process in processes}
    gone = {row.name: judge(row)[1] for row in rows if _seconds_since(row, row.seen_at) > GONE_SECONDS}
    return [(process, gone[name]) for name, process in asked.items() if name in gone]


def _seconds_since(row: Row[Any], moment: datetime) -> float:
    seconds: float = (row.now - moment).total_seconds()
    return max(seconds, 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.health", description="Are the workers of this host well?")
    parser.add_argument("name", nargs="?", help="a process of the Procfile, what it does, or the name in its row")
    parser.add_argument("--silent", nargs="+", type=int, metavar="PID", help="name those that must be killed")
    options = parser.parse_args(arguments)
    try:
        rows = rows_of(settings.load().database_url)
    except settings.SettingsError as error:
        print(f"settings: {error}".replace("\n", "; "))
        return 1
    except AWAY as error:
        print(f"the database does not answer ({type(error).__name__})", file=sys.stderr if options.silent else None)
        return 0 if options.silent else 1
    host = socket.gethostname()
    if options.silent:
        stopped = silent(rows, host, options.silent)
        for process, why in stopped:
            print(process, why)
        return 1 if stopped else 0
    verdicts = [judge(row) for row in meant(rows, host, options.name)]
    for _, line in verdicts or [(False, f"{options.name or 'worker'}: no such worker has shown itself on {host}")]:
        print(line)
    return 0 if verdicts and all(well for well, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
