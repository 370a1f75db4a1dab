"""Redis is killed and started again: in turns with its append-only file and with nothing, at last when jobs wait."""

from tests.drills.drill import Drill
from tests.drills.frozen_redis import ACCEPTED_WITHIN
from tests.drills.run import Run, Size

#: What was open when Redis is back has ended so soon, in seconds.
RECOVERED_WITHIN = 30.0


def restarted_redis(run: Run) -> None:
    system = run.system
    piled_up = run.size.jobs // 10
    run.submit(run.size.jobs - piled_up)
    for number in run.moments():
        _restart(run, appends=number % 2 == 0)
    run.settle()
    run.accepts_within(ACCEPTED_WITHIN)
    run.pile_up(piled_up)
    _restart(run, appends=False)
    system.start(system.worker)
    run.settle()
    run.recovers_within(RECOVERED_WITHIN)


def _restart(run: Run, appends: bool) -> None:
    fault = run.fault()
    run.system.kill("redis")
    run.pause(0, run.size.longest_fault)
    run.system.restart_redis(appends)
    run.until("Redis answers", run.system.redis_answers)
    fault.at, fault.waits_for = run.now(), run.open()


DRILL = Drill(
    "restarted_redis",
    "A Redis that is killed and started again, with its file or without, loses no job and stops no worker",
    restarted_redis,
    long=Size(2000, faults=9, submitting=60, longest_fault=2),
    short=Size(300, faults=3, submitting=4, longest_fault=1, timed=False),
)
