"""A worker is killed with calls at each point that a call passes; what was called is held against the books.

| its prompts begin with | the worker was killed | so each has cost |
| --- | --- | --- |
| before send | while it connected to the vendor: nothing was sent | one call, and an unknown attempt |
| held after send | when the vendor had the request | two calls, one of them unknown |
| half of the body | in the middle of the picture | two calls, one of them unknown |
| before judging | when the whole picture was there, and not judged | one call |
| before commit | when it was judged, and waited to be stored | one call |
"""

import signal
from contextlib import ExitStack

import psutil

from bench.vendor import HALF, HELD
from tests.drills.closed_door import closed_door, knocking
from tests.drills.drill import Drill
from tests.drills.killed_workers import RECOVERED_WITHIN
from tests.drills.run import Run, Size
from tests.drills.spooled_pictures import answered, in_flight
from tests.fault_proxy import FaultProxy
from worker.deadline import IDLE_SECONDS

BEFORE_SEND, AFTER_SEND = "before send", f"{HELD} after send"
MID_BODY, BEFORE_JUDGING, BEFORE_COMMIT = f"{HALF} of the body", "before judging", "before commit"
#: What a job costs whose worker was killed at this point: calls of the vendor, and unknown attempts.
COST = {BEFORE_SEND: (1, 1), AFTER_SEND: (2, 1), MID_BODY: (2, 1), BEFORE_JUDGING: (1, 0), BEFORE_COMMIT: (1, 0)}
#: More of them would take all the connections of a worker's pool while they wait to be stored.
MOST_AT_A_POINT = 4


def killed_mid_call(run: Run) -> None:
    system = run.system
    with FaultProxy(system.vendor.port) as vendors_door:
        system.vendor.url = f"http://127.0.0.1:{vendors_door.port}/api/v1"
        system.kill(system.worker)
        system.lines[system.worker] = system.lines[system.worker].replace("worker.app", "tests.drills.patient_worker")
        system.start(system.worker)
        for share in run.shares():
            each = max(1, min(share // len(COST), system.slots // len(COST), MOST_AT_A_POINT))
            with ExitStack() as stack:
                bring_to_their_points(run, each, vendors_door, stack)
                fault = run.fault(in_flight=in_flight(run))
                fault.uncalled = each  # those before send
                system.kill(system.worker)
                fault.killed_at, fault.in_hand = run.now(), system.taken(run.accepted)
            system.start(system.worker)
            run.submit(share - each * len(COST))
            answered(run, fault)
    run.settle()
    in_hand = [fault.in_hand_recovery(run.ended_at) or 0 for fault in run.faults]
    run.expect(
        not run.size.timed or max(in_hand) <= RECOVERED_WITHIN,
        f"what was in its hands has ended {RECOVERED_WITHIN:g} s after a kill (it took {max(in_hand):.1f} s)",
    )
    hold_against_the_books(run)


def bring_to_their_points(run: Run, each: int, vendors_door: FaultProxy, stack: ExitStack) -> None:
    """So many jobs to each. `stack` makes way again."""
    system = run.system
    run.submit(each, AFTER_SEND)
    run.submit(each, MID_BODY)
    run.until("these calls are in flight", lambda: in_flight(run) == 2 * each, run.quiet_seconds)

    stack.enter_context(system.storing_held())
    run.submit(each, BEFORE_COMMIT)
    run.until("these wait to be stored", lambda: system.waiting_to_store() in (each, None), run.quiet_seconds)

    freeze_judges(system.processes.running[system.worker].pid)
    run.submit(each, BEFORE_JUDGING)
    run.until("these wait to be judged", lambda: system.spooled() in (2 * each, None), run.quiet_seconds)

    run.pause(IDLE_SECONDS, IDLE_SECONDS)  # what is open to the vendor is not used again then
    vendors_door.refuse()
    stack.callback(vendors_door.accept)
    stack.enter_context(closed_door(vendors_door.port))
    run.submit(each, BEFORE_SEND)
    run.until(
        "these wait at the vendor's door",
        lambda: knocking(system.processes.running[system.worker].pid, vendors_door.port) >= each,
        run.quiet_seconds,
    )


def freeze_judges(worker: int) -> None:
    """The processes that judge pictures, if there are any."""
    for child in psutil.Process(worker).children(recursive=True):
        if "shared.picture" in child.cmdline():
            child.send_signal(signal.SIGSTOP)


def hold_against_the_books(run: Run) -> None:
    calls = run.system.vendor.book()["by_prompt"]
    for point, cost in COST.items():
        for job_id, prompt in run.accepted.items():
            if prompt.startswith(point) and (books := run.system.books([job_id])):
                found = (calls[prompt], books.unknown)
                run.expect(found == cost, f"{prompt}: {cost} calls and unknown attempts (there were {found})")
                run.expect(books.payable >= calls[prompt], f"{prompt}: every call of it stands in the books")


DRILL = Drill(
    "killed_mid_call",
    "Wherever a call is when its worker is killed: the books know of it, and what had arrived is not paid again",
    killed_mid_call,
    long=Size(2000, faults=10, submitting=1),
    short=Size(10, faults=1, submitting=0.2, timed=False),
    databases=("postgresql",),
    possible=("postgresql",),
)
