"""A worker is killed in the middle of its calls, again and again, and started at once, as a supervisor would."""

from tests.drills.drill import Drill
from tests.drills.run import Run, Size

#: What the service promises with a lease of 20 s, and how long a drill waits before it kills again.
RECOVERED_WITHIN = 45.0


def killed_workers(run: Run) -> None:
    system = run.system
    for share in run.shares():
        run.submit(share)
        run.pause(0.2 * run.size.submitting, 0.9 * run.size.submitting)
        run.until("a call is in flight", lambda: system.vendor.book()["in_flight"])
        fault = run.fault()
        system.kill(system.worker)
        system.start(system.worker)
        fault.waits_for = system.taken(run.accepted)  # no new worker is up so soon
        fault.in_flight = len(fault.waits_for)
        run.all_submitted()
        run.recovered(fault, RECOVERED_WITHIN)
    run.settle()
    run.expect(
        not run.size.timed or all(fault.recovery(run.ended_at) <= RECOVERED_WITHIN for fault in run.faults),
        f"what was in flight has ended {RECOVERED_WITHIN:g} s after a kill",
    )
    count = run.count()
    in_books = count.books.unknown if count.books else 0
    run.expect(count.beyond <= in_books, "each call beyond images stands in the system's own books as unknown")


DRILL = Drill(
    "killed_workers",
    "A killed worker loses no job, and each call whose end nobody saw is shown",
    killed_workers,
    long=Size(2000, faults=8, submitting=12),
    short=Size(50, faults=1, submitting=1, delay=1, timed=False),
    databases=("sqlite", "postgresql"),
)
