"""A worker is killed in the middle of its calls every few seconds, and started at once, as a supervisor would.

A few kills in a row, then what they left is waited for: so no job is in the hands of more than two workers that are
killed, and none fails as `worker_crashed`, which is another drill (poison_job).
"""

from tests.drills.drill import Drill
from tests.drills.run import Fault, Run, Size

#: What the service promises with a lease of 20 s, and how long a drill waits before it kills again.
RECOVERED_WITHIN = 45.0
#: Kills in a row, in seconds: within the shortest lease, so before any of the jobs is given out again.
IN_A_ROW = 9.0


def killed_workers(run: Run) -> None:
    system, row = run.system, list[Fault]()
    for share in run.shares():
        run.submit(share)
        run.pause(0.2 * run.size.submitting, 0.9 * run.size.submitting)
        run.until("a call is in flight", lambda: system.vendor.book()["in_flight"])
        fault = run.fault()
        run.kill_worker(fault)
        fault.waits_for = fault.in_hand
        row.append(fault)
        if run.now() > row[0].at + IN_A_ROW:
            run.all_submitted()
            for fault in row:
                run.recovered(fault, RECOVERED_WITHIN)
            row = []
    run.settle()
    in_hand = [fault.in_hand_recovery(run.ended_at) or 0 for fault in run.faults]
    run.expect(
        not run.size.timed or max(in_hand) <= RECOVERED_WITHIN,
        f"what was in its hands has ended {RECOVERED_WITHIN:g} s after a kill (it took {max(in_hand):.1f} s)",
    )
    count = run.count()
    in_books = count.books.unknown if count.books else 0
    run.expect(count.beyond <= in_books, "each call beyond images stands in the system's own books as unknown")
    calls = system.vendor.book()["by_prompt"]
    for job_id, its in system.books_by_job(run.accepted).items():
        beyond = calls.get(run.accepted[job_id], 0) - 1
        run.expect(beyond <= its.unknown, f"and at its own job ({job_id}: {beyond}, {its})")


DRILL = Drill(
    "killed_workers",
    "A killed worker loses no job, and each call whose end nobody saw is shown",
    killed_workers,
    long=Size(2000, faults=50, submitting=2),
    short=Size(50, faults=1, submitting=1, delay=1, timed=False),
    databases=("sqlite", "postgresql"),
)
