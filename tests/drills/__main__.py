"""`./dev drill [NAME ...]`: hold drills, print what was counted. 1 if Darkroom broke a promise."""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.databases import Databases, PostgresDatabases, SqliteDatabases
from bench.machine import description
from tests.drills import killed_senders, vendor_outage
from tests.drills.all_drills import DRILLS
from tests.drills.count import Count, table
from tests.drills.drill import Drill
from tests.drills.systems import Drilled, DrilledBaseline, DrilledDarkroom

LEASE_SECONDS = 20.0
SHORTEST_LEASE_SECONDS = 10.0
DATABASES = ("sqlite", "postgresql")
#: A job that has not ended when nothing has moved for so long counts as lost. (After half-open connections kombu takes
#: 51 s, by its own defaults.)
LOST_AFTER_SECONDS = 90.0

#: Those with figures of their own, which the plain app has none of.
APART = {killed_senders.NAME: killed_senders.PROMISE, vendor_outage.NAME: vendor_outage.PROMISE}

CONDITIONS = f"""\
A job counts as lost if it has not ended when nothing has moved for {LOST_AFTER_SECONDS:g} s. Submissions are repeated
until they are accepted; Darkroom's carry an Idempotency-Key. What dies by itself is started again, and noted."""
BASELINE = """\
Flask + Celery: acks late, rejects on a lost worker, prefetches one; what was not acked is given out again after a lease
(Celery's default: after an hour), and looked for every 5 s (default: 100 s). Its Redis has an append-only file too."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev drill", description="Break the running service, and count.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="drills to hold (default: all of them)")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--compare", action="store_true", help="the same with a plain Flask + Celery, side by side")
    parser.add_argument("--jobs", type=int, help="jobs a drill (default: 2,000)")
    parser.add_argument("--seed", type=int, default=1, help="of every random moment (default: %(default)s)")
    parser.add_argument("--database", choices=DATABASES, help="Darkroom's (default: the drill's own)")
    parser.add_argument("--quick", action="store_true", help="as short as in the tests, with the shortest lease")
    wanted = parser.parse_args(arguments)
    if unknown := [name for name in wanted.names if name not in DRILLS and name not in APART]:
        parser.error(f"no drill called {', '.join(unknown)}; `./dev drill --list` says which there are")
    if wanted.list:
        possible = {name: drill.possible for name, drill in DRILLS.items()} | dict.fromkeys(APART, DATABASES)
        promises = {name: drill.promise for name, drill in DRILLS.items()} | APART
        _print("\n".join(f"{name:18} {promise} ({', '.join(possible[name])})" for name, promise in promises.items()))
        return 0
    # As with Ctrl-C: everything that was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        names = wanted.names or [*DRILLS, *APART]
        apart = [name for name in APART if name in names]
        return hold([DRILLS[name] for name in names if name in DRILLS], wanted, apart)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130  # what a shell says of a program that Ctrl-C ended


def hold(drills: Sequence[Drill], wanted: argparse.Namespace, apart: Sequence[str]) -> int:
    """Hold these drills and print a table for each. 1 if Darkroom broke a promise in one of them.

    `apart`: which of APART to hold too.
    """
    broken = False
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="darkroom-drill-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        kinds = {wanted.database or drill.databases[0] for drill in drills}
        if apart:
            kinds.add(wanted.database or "sqlite")
        databases: dict[str, Databases] = {}
        for kind in sorted(kinds):
            databases[kind] = SqliteDatabases(folder) if kind == "sqlite" else PostgresDatabases()
            stack.callback(databases[kind].close)
        _print(description(" and ".join(databases[kind].description for kind in databases)))
        _print(CONDITIONS)
        if wanted.compare:
            _print(BASELINE)
        for drill in drills:
            if wanted.database and wanted.database not in drill.possible:
                _print(f"\n{drill.name}: not held, it can be on {', '.join(drill.possible)} alone")
            elif why := drill.hindrance():
                _print(f"\n{drill.name}: not held, {why}")
            else:
                broken = _hold_one(drill, wanted, databases[wanted.database or drill.databases[0]]) or broken
        for name in apart:
            do = {killed_senders.NAME: _kill_senders, vendor_outage.NAME: _break_vendor}[name]
            broken = do(wanted, databases[wanted.database or "sqlite"], folder / name) or broken
    return 1 if broken else 0


def _kill_senders(wanted: argparse.Namespace, databases: Databases, folder: Path) -> bool:
    folder.mkdir()
    events, kills = killed_senders.SHORT if wanted.quick else killed_senders.LONG
    _print(f"\n{killed_senders.NAME}: {killed_senders.PROMISE}\nseed {wanted.seed}, on {databases.description}")
    tally = killed_senders.killed_senders(
        folder, databases.make(folder), events=wanted.jobs or events, kills=kills, seed=wanted.seed, patience=300
    )
    _print(tally.table())
    return bool(tally.broken_promises())


def _break_vendor(wanted: argparse.Namespace, databases: Databases, folder: Path) -> bool:
    folder.mkdir()
    size = vendor_outage.SHORT if wanted.quick else vendor_outage.LONG
    _print(f"\n{vendor_outage.NAME}: {vendor_outage.PROMISE}\n{size.seconds:g} s each, on {databases.description}")
    tallies = vendor_outage.hold(folder, databases.make(folder), size, _tell)
    _print(vendor_outage.table(tallies))
    return any(tally.broken_promises() for tally in tallies)


def _hold_one(drill: Drill, wanted: argparse.Namespace, databases: Databases) -> bool:
    lease = SHORTEST_LEASE_SECONDS if wanted.quick else LEASE_SECONDS
    size = drill.short if wanted.quick else drill.long
    size = replace(size, jobs=wanted.jobs) if wanted.jobs else size
    starts: list[Callable[[], Drilled]] = [lambda: DrilledDarkroom(databases, lease)]
    if wanted.compare:
        starts.append(lambda: DrilledBaseline(lease))
    _print(
        f"\n{drill.name}: {drill.promise}\n"
        f"{size.jobs:,} jobs, seed {wanted.seed}, a lease of {lease:g} s, "
        f"on {databases.description}"
    )
    titles: list[str] = []
    counts: list[Count] = []
    for start in starts:
        system = start()
        titles.append(system.title)
        _tell(f"{drill.name}, {system.title}")
        counts.append(drill.hold(system, size, wanted.seed, LOST_AFTER_SECONDS))
    _print(table(titles, counts))
    return bool(counts[0].broken_promises())


def _tell(line: str) -> None:
    """A line that the next one overwrites, where somebody looks at it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}\r")
        sys.stderr.flush()


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
