"""The database goes away while vendor's calls are in flight: their pictures arrive and can't be stored.

Then, in turns: the worker is killed, stays, or is asked to stop. In turns too, the database is cut off or killed.
"""

from bench.vendor import HELD, picture
from tests.drills.drill import PICTURE_BYTES, Drill
from tests.drills.run import Fault, Run, Size
from tests.drills.served import expect_served

#: Seconds for a worker that was asked to stop while the database is away.
STOPS_WITHIN = 60.0


def spooled_pictures(run: Run) -> None:
    system = run.system
    for number, share in enumerate(run.shares()):
        held = min(share, system.slots)
        run.submit(held, HELD)
        run.until("every call is in flight", lambda: in_flight(run) == held, run.quiet_seconds)  # noqa: B023
        fault = run.fault()
        take_away, give_back = (
            (system.cut_off_store, system.reconnect_store)
            if number % 2 == 0
            else (system.kill_store, system.start_store)
        )
        take_away()
        system.vendor.release()
        run.until(
            "every picture has come",
            lambda: not in_flight(run) and system.spooled() in (held, None),  # noqa: B023
            run.quiet_seconds,
        )
        lose_worker(run, number)
        give_back()
        fault.at = run.now()
        run.submit(share - held)
        answered(run, fault)
        run.until("every picture is stored", lambda: not system.spooled(), run.quiet_seconds)
    expect_served(run, picture(PICTURE_BYTES))


def lose_worker(run: Run, number: int) -> None:
    """Or not."""
    system = run.system
    if number % 3 == 0 or system.spooled() is None:
        tried = tries(run)
        system.kill(system.worker)
        system.start(system.worker)
        run.until(
            "the next one tries to store them",
            lambda: tries(run) > tried or system.spooled() is None,
            run.quiet_seconds,
        )
    elif number % 3 == 1:
        process = system.processes.running[system.worker]
        process.terminate()
        run.expect(process.wait(STOPS_WITHIN) == 0, "a worker that is asked to stop while the database is away does")
        system.kill(system.worker)  # it has ended: this only forgets it
        system.start(system.worker)


def tries(run: Run) -> int:
    """How often a new worker found pictures and no database."""
    return run.system.processes.log(run.system.worker).count("can't be offered yet")


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
    prepare=lambda system: system.take_own_store(),
)
