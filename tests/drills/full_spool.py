"""The disk of the spool has room for a few pictures, and at times for none."""

from bench.vendor import picture
from tests.drills.drill import Drill
from tests.drills.run import Run, Size
from tests.drills.served import expect_served
from tests.drills.small_disk import SmallDisk, no_small_disk
from tests.drills.systems import Drilled

ROOM = 4_000_000
#: More than fit, when all slots have one in their hands.
PICTURE_BYTES = 100_000
#: What the worker says then.
FULL, ROOM_AGAIN = "the spool can't be written", "the spool can be written again"


def put_spool_on_small_disk(system: Drilled) -> None:
    system.disk = SmallDisk(ROOM)
    system.at_end.callback(system.disk.close)
    system.put_spool_on(system.disk.folder)


def full_spool(run: Run) -> None:
    system, disk = run.system, run.system.disk
    system.vendor.wish(run.size.delay, PICTURE_BYTES)
    for share in run.shares():
        run.submit(share // 2)
        run.pause(0.1 * run.size.submitting, 0.3 * run.size.submitting)
        run.until("what came before has room", lambda: said(run, FULL) == said(run, ROOM_AGAIN), run.quiet_seconds)
        run.fault()
        before = said(run, FULL)
        disk.fill()
        run.submit(share - share // 2)  # somebody needs it, however long it took to fill
        if system.spooled() is not None:
            run.until("somebody needs the room", lambda: said(run, FULL) > before)  # noqa: B023
        run.pause(0.5 * run.size.longest_fault, run.size.longest_fault)
        disk.free()
    run.settle()
    if system.spooled() is None:
        run.notes.append("it has no spool: nothing was broken")
    else:
        run.until("nothing is left on the spool", lambda: not system.spooled(), run.quiet_seconds)
    expect_served(run, picture(PICTURE_BYTES))


def said(run: Run, what: str) -> int:
    return run.system.processes.log(run.system.worker).count(what)


DRILL = Drill(
    "full_spool",
    "With a full spool every picture still gets to the database",
    full_spool,
    long=Size(2000, faults=6, submitting=10, longest_fault=8),
    short=Size(60, faults=1, submitting=2, longest_fault=2, delay=1),
    databases=("sqlite", "postgresql"),
    prepare=put_spool_on_small_disk,
    hindrance=no_small_disk,
)
