"""The database goes away while vendor's calls are in flight: their pictures arrive and can't be stored.

The database is killed or cut off; then the worker is killed, asked to stop, or stays: all in turns.
"""

import subprocess

from bench.vendor import HELD, picture
from tests.drills.drill import PICTURE_BYTES, Drill
from tests.drills.run import Fault, Run, Size
from tests.drills.served import expect_served

#: Seconds for a worker that was asked to stop while the database is away.
STOPS_WITHIN = 60.0
#: What becomes of the database, and of the worker. (One that is asked to stop while the network is silent waits for as
#: long as TCP does; and a real network is not as silent as this one, which acknowledges what it swallows.)
ROUNDS = (
    ("cut off", "killed"),
    ("killed", "stopped"),
    ("cut off", "stays"),
    ("killed", "killed"),
    ("killed", "stays"),
)


def spooled_pictures(run: Run) -> None:
    system = run.system
    for number, share in enumerate(run.shares()):
        held = min(share, system.slots)
        run.submit(held, HELD)
        run.until("every call is in flight", lambda: in_flight(run) == held, run.quiet_seconds)  # noqa: B023
        fault = run.fault()
        away, worker = ROUNDS[number % len(ROUNDS)]
        if away == "cut off":
            system.cut_off_store()
        else:
            system.kill_store()
        system.vendor.release()
        run.until(
            "every picture has come",
            lambda: not in_flight(run) and system.spooled() in (held, None),  # noqa: B023
            run.quiet_seconds,
        )
        lose_worker(run, worker)
        if away == "cut off":
            system.reconnect_store()
        else:
            system.start_store()
        fault.at = run.now()
        run.submit(share - held)
        answered(run, fault)
        run.until("every picture is stored", lambda: not system.spooled(), run.quiet_seconds)
    expect_served(run, picture(PICTURE_BYTES))


def lose_worker(run: Run, how: str) -> None:
    """Or not. A system without a spool has nothing to wait for: its worker is killed."""
    system = run.system
    if how == "killed" or system.spooled() is None:
        tried = tries(run)
        system.kill(system.worker)
        system.start(system.worker)
        run.until(
            "the next one waits to store them",
            lambda: tries(run) > tried or system.spooled() is None,
            run.quiet_seconds,
        )
    elif how == "stopped":
        process = system.processes.running[system.worker]
        process.terminate()
        try:
            code: int | None = process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            code = None
        run.expect(code == 0, f"asked to stop while the database is away, a worker does ({code})")
        system.kill(system.worker)  # if it has ended, this only forgets it
        system.start(system.worker)


def tries(run: Run) -> int:
    """How often a new worker found no database: it waits for it before it looks into what a dead one left."""
    return run.system.processes.log(run.system.worker).count("waiting for the database")


def in_flight(run: Run) -> int:
    return int(run.system.vendor.book()["in_flight"])


def answered(run: Run, fault: Fault) -> None:
    """Wait until the fault is recovered from; whatever call the vendor holds meanwhile, it answers."""

    def ended() -> bool:
        run.system.vendor.release()
        return fault.recovery(run.ended_at) < float("inf")

    run.until("what was open at the fault ends", ended, run.quiet_seconds)


DRILL = Drill(
    "spooled_pictures",
    "A picture that was received is stored and never paid again, whatever becomes of database and worker",
    spooled_pictures,
    long=Size(2000, faults=12, submitting=1),
    short=Size(15, faults=3, submitting=0.2),
    databases=("postgresql",),
    possible=("postgresql",),
    prepare=lambda system: system.take_own_store(),
)
