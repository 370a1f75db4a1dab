"""PostgreSQL is killed under load with all its processes, or stopped as for a restart, in turns; and started again."""

from bench.vendor import picture
from tests.drills.drill import PICTURE_BYTES, Drill
from tests.drills.run import Run, Size
from tests.drills.served import expect_served
from worker.claims import Claims


def killed_database(run: Run) -> None:
    system = run.system
    run.submit(run.size.jobs)
    for number in run.moments():
        fault = run.fault()
        # Nobody can tell a worker whether the claim was committed whose answer it waited for.
        fault.uncalled = Claims.AT_MOST
        if number % 2 == 0:
            system.kill_store()
        else:
            system.stop_store()
        run.pause(0, run.size.longest_fault)
        system.start_store()
        fault.at, fault.waits_for = run.now(), run.open()
    run.settle()
    expect_served(run, picture(PICTURE_BYTES))
    run.expect(set(system.refusals) <= {(503, True)}, f"who is refused, is so with 503 ({dict(system.refusals)})")


DRILL = Drill(
    "killed_database",
    "Whenever PostgreSQL dies (the other system's Redis), no accepted job is lost, and no image paid again",
    killed_database,
    long=Size(2000, faults=10, submitting=100, longest_fault=15),
    short=Size(80, faults=2, submitting=4, longest_fault=2, delay=1),
    databases=("postgresql",),
    possible=("postgresql",),
    prepare=lambda system: system.take_own_store(),
)
