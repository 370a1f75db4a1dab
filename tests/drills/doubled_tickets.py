"""Three messages a job are delivered, in no order, and some of them once more when all jobs have long ended."""

from tests.drills.drill import Drill
from tests.drills.run import Run, Size


def doubled_tickets(run: Run) -> None:
    system = run.system
    with system.redis() as client:
        for share in run.shares():
            run.pile_up(share)
            messages = client.lrange(system.queue, 0, -1)
            again = messages * (2 * share // len(messages))  # three a job, however few each of them needs
            run.chance.shuffle(again)
            client.lpush(system.queue, *again)
            fault = run.fault()
            system.start(system.worker)
            run.recovered(fault, run.quiet_seconds)
            run.until("every message is taken", lambda: not client.llen(system.queue))
            run.chance.shuffle(messages)
            client.lpush(system.queue, *messages)
        run.until("every stale message is taken", lambda: not client.llen(system.queue))
    run.quiet()


DRILL = Drill(
    "doubled_tickets",
    "Messages that come three times, shuffled, or late make one call and one end a job",
    doubled_tickets,
    long=Size(2000, faults=4, submitting=0, delay=0.1),
    short=Size(100, faults=1, submitting=0, delay=0.1),
    databases=("sqlite", "postgresql"),
)
