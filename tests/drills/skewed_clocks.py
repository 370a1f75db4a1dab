"""The clocks of the web side, the workers and the sweep are ten minutes fast or slow; the database's is right.

Calls take longer than it takes to rescue a job whose lease looks lapsed, and in each round two workers share them
whose clocks are twenty minutes apart.
"""

import os
from pathlib import Path

from bench.processes import ROOT
from tests.drills import wrong_clock
from tests.drills.drill import Drill
from tests.drills.run import Run, Size

FAST = 600.0  # seconds
CLOCK = Path(wrong_clock.__path__[0])


def skewed_clocks(run: Run) -> None:
    system = run.system
    right = dict(system.lines)
    second = ""
    for number, share in enumerate(run.shares()):
        run.fault()
        for name in (*right, *([second] if second else [])):
            system.kill(name)  # nothing is in its hands
        way = FAST if number % 2 == 0 else -FAST
        system.lines = {name: with_clock(line, -way if name == system.web else way) for name, line in right.items()}
        for name in right:
            system.start(name)
        system.lines = {**system.lines, system.worker: with_clock(right[system.worker], -way)}
        second = system.start_second_worker()
        run.until("its web side answers", system.answers)
        run.submit(share)
        run.settle()


def with_clock(line: str, fast: float) -> str:
    """A process's line, with its clock so many seconds fast."""
    return f"env CLOCK_FAST_SECONDS={fast:g} PYTHONPATH={os.pathsep.join((str(CLOCK), str(ROOT)))} {line}"


DRILL = Drill(
    "skewed_clocks",
    "Processes whose clocks are ten minutes wrong steal no lease: each job is made once",
    skewed_clocks,
    long=Size(2000, faults=4, submitting=10, delay=8),
    short=Size(20, faults=1, submitting=0.5, delay=8),
    databases=("postgresql",),
    possible=("postgresql",),
)
