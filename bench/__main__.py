"""`./dev bench [--quick] [--only NAME ...] [--runs N] [--database sqlite|postgresql]`: one table, Darkroom beside the
baseline, as it usually is and with as many slots.

Each run starts one system afresh, measures everything with it, and ends it; the systems take turns (A B A B). All
of it, load and vendor included, shares the machine's cores.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.databases import Databases, PostgresDatabases, SqliteDatabases
from bench.figures import number, table
from bench.machine import description
from bench.measurements import FULL, MEASUREMENTS, QUICK, Absent, Sizes, rows
from bench.outside import Vendor, run_load
from bench.processes import Processes
from bench.systems import Baseline, Darkroom, System, ThreadedBaseline

Say = Callable[[str], None]


class Bench:
    """The runs, and what they found. `names`: the measurements; `say`: tells how far it is."""

    def __init__(self, databases: Databases, sizes: Sizes, names: Sequence[str], say: Say) -> None:
        self._starts: tuple[Callable[[], System], ...] = (lambda: Darkroom(databases), Baseline, ThreadedBaseline)
        self._sizes = sizes
        self._names = names
        self._say = say
        self.values: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self.notes: list[str] = []
        self.failures: list[str] = []

    def run(self) -> None:
        for turn in range(self._sizes.runs):
            names = [name for name in self._names if turn < self._sizes.slow_runs or not MEASUREMENTS[name].slow]
            for start in self._starts if names else ():
                self._measure(start, names, f"run {turn + 1} of {self._sizes.runs}")

    def _measure(self, start: Callable[[], System], names: Sequence[str], turn: str) -> None:
        where = f"{turn}, start"
        try:
            with start() as system:
                for name in names:
                    where = f"{turn}, {system.title}, {name}"
                    self._say(where)
                    try:
                        found = MEASUREMENTS[name].measure(system, self._sizes)
                    except Absent as absent:
                        self.notes.append(f"{where}: {absent}")
                        continue
                    for key, value in found.items():
                        self.values[system.title, key].append(value)
        except Exception as error:  # noqa: BLE001  the rest of this turn is lost: what failed is in the way of the next
            self.failures.append(f"{where}: {error}")

    def table(self) -> str:
        titles = [system.title for system in (Darkroom, Baseline, ThreadedBaseline)]
        return table(rows(self._names, self._sizes), titles, self.values)


def load_alone(folder: Path, seconds: float) -> str:
    """What the load generator reaches against a server that does nothing: far above any row, or it is what limits."""
    processes = Processes(folder)
    try:
        port = Vendor(processes).port
        arguments: dict[str, Any] = {"port": port, "dialect": "", "seconds": seconds}
        small = run_load("rate", kind="small", connections=32, **arguments)["per_second"]
        large = run_load("rate", kind="large", connections=4, **arguments)["bytes_per_second"] / 1e6
    finally:
        processes.close()
    return f"The load alone, against a server that does nothing: {number(small)} requests/s, {number(large)} MB/s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./dev bench", description="How fast: Darkroom beside a plain Flask + Celery."
    )
    parser.add_argument("--quick", action="store_true", help="one short run of each")
    parser.add_argument("--only", choices=MEASUREMENTS, nargs="+", help="some measurements")
    parser.add_argument("--runs", type=int, help="of each system, and of each measurement")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite", help="Darkroom's")
    wanted = parser.parse_args(arguments)
    # As with Ctrl-C: everything that was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = [name for name in MEASUREMENTS if name in (wanted.only or MEASUREMENTS)]
    sizes = QUICK if wanted.quick else FULL
    if wanted.runs:
        sizes = replace(sizes, runs=wanted.runs, slow_runs=wanted.runs)
    try:
        return report(sizes, names, wanted.database)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130  # what a shell says of a program that Ctrl-C ended


def report(sizes: Sizes, names: Sequence[str], database: str) -> int:
    """Measure and print. 1 if a figure that should be there is not."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="darkroom-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        databases = SqliteDatabases(folder) if database == "sqlite" else PostgresDatabases()
        stack.callback(databases.close)
        _print(description(databases.description))
        _print(load_alone(Path(tempfile.mkdtemp(prefix="darkroom-bench-")), sizes.seconds))
        bench = Bench(databases, sizes, names, _tell)
        bench.run()
    _print(f"Median (range) of {sizes.runs} runs of each, in turns; of `flight` and `many`, {sizes.slow_runs}.\n")
    _print("\n".join([bench.table(), *bench.notes]))
    sys.stderr.write("".join(f"{failure}\n" for failure in bench.failures))
    return 1 if bench.failures else 0


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _tell(line: str) -> None:
    """A line that the next one overwrites, where somebody looks at it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
