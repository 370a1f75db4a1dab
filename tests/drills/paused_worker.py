"""A worker is stopped in the middle of its calls, past its lease; another one finishes; then the first goes on."""

from tests.drills.drill import Drill
from tests.drills.run import Run, Size

#: For another worker to finish, in seconds: PostgreSQL may have to end a transaction first in which the first one was
#: stopped, and takes 30 s for that.
FINISHED_WITHIN = 120.0
#: For a worker that goes on to write what it has, in seconds; those that keep books say when it has.
GOES_ON = 3.0


def paused_worker(run: Run) -> None:
    system = run.system
    system.start_second_worker()
    overwritten = 0
    for share in run.shares():
        run.submit(share)
        run.pause(0.5 * run.size.submitting, run.size.submitting)
        run.until("a call is in flight", lambda: system.vendor.book()["in_flight"])
        fault = run.fault()
        system.freeze(system.worker)
        fault.killed_at, fault.in_hand = fault.at, system.taken(run.accepted)
        # What it had claimed and not sent yet it sends when it goes on. Some of them are the other worker's.
        fault.in_flight = max(run.calls_cut_off(), len(fault.in_hand))
        run.all_submitted()
        run.recovered(fault, FINISHED_WITHIN)
        run.expect(fault.recovery(run.ended_at) < float("inf"), "another worker has finished before it goes on")
        before = system.ended(run.accepted)
        system.thaw(system.worker)
        run.pause(GOES_ON, GOES_ON)
        if system.books([]) is not None:
            run.until("the paused worker has closed its attempts", lambda: not _unknown(run), run.quiet_seconds)
        after = system.ended(before)
        overwritten += sum(1 for job_id, end in before.items() if after[job_id] != end)
    run.settle()
    run.expect(overwritten == 0, f"an end is not written again ({overwritten} were)")


def _unknown(run: Run) -> int:
    books = run.system.books(run.accepted)
    return books.unknown if books else 0


DRILL = Drill(
    "paused_worker",
    "A worker that was away past its lease changes nothing when it goes on, except what its calls cost",
    paused_worker,
    long=Size(2000, faults=4, submitting=10, delay=1),
    short=Size(60, faults=1, submitting=1, delay=1),
    databases=("postgresql",),
)
