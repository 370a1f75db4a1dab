"""The disk of the database fills up under load, and has room again: SQLite's data folder, or that of PostgreSQL.

(The other system's nearest equivalent is the folder that it writes its pictures to.)
"""

from bench.vendor import picture
from tests.drills.drill import PICTURE_BYTES, Drill
from tests.drills.run import Run, Size
from tests.drills.served import expect_served
from tests.drills.small_disk import SmallDisk, no_small_disk
from tests.drills.systems import Drilled
from worker.claims import Claims

#: Room for an empty PostgreSQL (40 MB) and the pictures of a long drill.
ROOM = 400_000_000
#: What is submitted again and again until somebody is refused, and for how long, in seconds: a database goes on for a
#: while in the room that it has reserved (SQLite's log is written anew from its start: 4 MB, a hundred submissions).
MORE = 50
FULL_WITHIN = 60.0


def put_on_small_disk(system: Drilled) -> None:
    system.disk = SmallDisk(ROOM)
    system.at_end.callback(system.disk.close)
    system.put_store_on(system.disk.folder)


def full_disk(run: Run) -> None:
    system, disk, deaths = run.system, run.system.disk, 0

    def answers() -> bool:
        nonlocal deaths
        if system.store_has_died():
            deaths += 1
        return system.store_answers()

    def refused_since(before: int) -> bool:
        if not run.submits():
            run.submit(MORE)
        return system.refusals.total() > before

    for share in run.shares():
        run.submit(share // 2)
        run.pause(0.1 * run.size.submitting, 0.3 * run.size.submitting)
        fault = run.fault()
        fault.uncalled = Claims.AT_MOST  # PostgreSQL may end of it, at any commit
        before = system.refusals.total()
        disk.fill()
        run.submit(share - share // 2)  # somebody writes, however long it took to fill it
        if system.books([]) is not None:
            run.until("submissions are refused", lambda: refused_since(before), FULL_WITHIN)  # noqa: B023
        run.pause(0.5 * run.size.longest_fault, run.size.longest_fault)
        disk.free()
        run.until("the database answers again", answers, run.quiet_seconds)
        fault.at, fault.waits_for = run.now(), run.open()
    run.settle()
    if deaths:
        run.notes.append(f"the database ended of it {deaths} times, and was started again")
    run.notes.append(f"{system.refusals.total():,} submissions were refused until there was room again")
    run.expect(set(system.refusals) <= {(503, True)}, f"who is refused, is so with 503 ({dict(system.refusals)})")
    expect_served(run, picture(PICTURE_BYTES))


DRILL = Drill(
    "full_disk",
    "A database whose disk is full refuses with 503; with room again every accepted job has its picture",
    full_disk,
    long=Size(2000, faults=3, submitting=25, longest_fault=45),
    short=Size(100, faults=1, submitting=4, longest_fault=4, delay=1),
    databases=("sqlite", "postgresql"),
    prepare=put_on_small_disk,
    hindrance=no_small_disk,
)
