"""A deploy, again and again: the database is migrated, then each process in turn is asked to end, and its successor
started."""

from functools import partial

from bench.outside import eventually
from tests.drills.drill import Drill
from tests.drills.run import Run, Size

#: Below what docker-compose.yml gives each of them: no call of this vendor takes longer than its delay.
GRACE = 30.0
RECOVERED_WITHIN = 45.0


def rolling_restarts(run: Run) -> None:
    system = run.system
    run.submit(run.size.jobs)
    for _ in run.moments():
        fault = run.fault()
        system.migrate_to_next_version()
        for name in list(system.lines):
            code = system.stop(name, GRACE)
            run.expect(code == 0, f"{name} ends by itself within {GRACE:g} s (it ended with {code})")
            system.start(name)
            eventually(f"the new {name}", system.processes, partial(system.is_up, name))
        run.recovered(fault, RECOVERED_WITHIN)
    run.quiet()
    run.expect(run.count().beyond == 0, "no call is made that leads to no image")


DRILL = Drill(
    "rolling_restarts",
    "A deploy, with its migration, loses nothing and pays nothing twice, and each process ends in time",
    rolling_restarts,
    long=Size(2000, faults=20, submitting=300),
    short=Size(60, faults=2, submitting=12, timed=False),
    databases=("sqlite", "postgresql"),
)
