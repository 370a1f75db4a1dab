"""Redis is full: in turns it refuses every write, and throws away what was not used for longest."""

from tests.drills.drill import Drill
from tests.drills.run import Run, Size

#: Room for some messages, but not for many, in bytes.
LITTLE_ROOM = 100_000


def full_redis(run: Run) -> None:
    run.submit(run.size.jobs)
    for number in run.moments():
        with run.system.redis() as client:
            used = int(client.info("memory")["used_memory"])
            if number % 2 == 0:
                client.config_set("maxmemory", 1)
            else:
                client.config_set("maxmemory-policy", "allkeys-lru")
                client.config_set("maxmemory", used + LITTLE_ROOM)
            fault = run.fault()
            run.pause(run.size.longest_fault / 2, run.size.longest_fault)
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
        fault.at, fault.waits_for = run.now(), run.open()


DRILL = Drill(
    "full_redis",
    "A Redis without room, whether it refuses or evicts, loses no job",
    full_redis,
    long=Size(2000, faults=6, submitting=60, longest_fault=10),
    short=Size(300, faults=2, submitting=4, longest_fault=2, delay=1),
)
