"""Redis stops to answer without hanging up: it is frozen, and then the network to it swallows everything."""

from tests.drills.drill import Drill
from tests.drills.run import Run, Size
from tests.fault_proxy import BLACK_HOLE

#: What a submission may take, p99, whatever Redis does.
ACCEPTED_WITHIN = 2.0


def frozen_redis(run: Run) -> None:
    system, proxy = run.system, run.system.proxy
    assert proxy is not None
    run.submit(run.size.jobs)
    for number in run.moments():
        fault = run.fault()
        if number % 2 == 0:
            system.freeze("redis")
        else:
            proxy.disturb(to_server=BLACK_HOLE, to_client=BLACK_HOLE)
        run.pause(run.size.longest_fault, run.size.longest_fault)
        if number % 2 == 0:
            system.thaw("redis")
        else:
            proxy.heal()
        fault.at, fault.waits_for = run.now(), run.open()
        run.recovered(fault, run.quiet_seconds)
    run.all_submitted()
    run.accepts_within(ACCEPTED_WITHIN)


DRILL = Drill(
    "frozen_redis",
    "While Redis answers nothing, submissions are accepted all the same; afterwards every job is made",
    frozen_redis,
    long=Size(2000, faults=2, submitting=180, longest_fault=60),
    short=Size(60, faults=2, submitting=16, longest_fault=4, delay=0.2, timed=False),
    redis_behind_proxy=True,
)
