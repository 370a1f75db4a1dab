"""Redis is emptied while jobs come in and are made, and at last when nobody has begun with what waits."""

from tests.drills.drill import Drill
from tests.drills.run import Run, Size

#: What was open when Redis was emptied has ended so soon, in seconds.
RECOVERED_WITHIN = 60.0


def emptied_redis(run: Run) -> None:
    system = run.system
    piled_up = run.size.jobs // 10
    run.submit(run.size.jobs - piled_up)
    for _ in run.moments():
        _empty(run)
    run.settle()
    run.pile_up(piled_up)
    _empty(run)
    system.start(system.worker)
    run.settle()
    run.recovers_within(RECOVERED_WITHIN)


def _empty(run: Run) -> None:
    run.fault()
    with run.system.redis() as client:
        client.flushall()


DRILL = Drill(
    "emptied_redis",
    "FLUSHALL in the middle of the work loses no job",
    emptied_redis,
    long=Size(2000, faults=9, submitting=60),
    short=Size(500, faults=5, submitting=3, delay=1, timed=False),
    databases=("sqlite", "postgresql"),
)
