"""Redis is full: in turns it refuses every write, and throws away what was not used for longest; at last the queue."""

from redis import Redis

from tests.drills.drill import Drill
from tests.drills.run import Run, Size

#: Room for some messages, but not for many, in bytes.
LITTLE_ROOM = 100_000
#: What is submitted again and again until Redis has refused somebody.
MORE = 10
#: What somebody else writes meanwhile, in bytes: many times that room.
KEYS, KEY_BYTES = 1000, 1000


def full_redis(run: Run) -> None:
    piled_up = run.size.jobs // 10
    run.submit(run.size.jobs - piled_up)
    refused = evicted = 0
    for number in run.moments():
        with run.system.redis() as client:
            before = refusals(client), evictions(client)
            if number % 2 == 0:
                client.config_set("maxmemory", 1)
            else:
                leave_little_room(client)
                fill(client)
            fault = run.fault()
            run.pause(run.size.longest_fault / 2, run.size.longest_fault)
            if number % 2 == 0:
                run.until("somebody is refused", lambda: refused_since(run, client, before[0]))  # noqa: B023
            has_room_again(client)
            refused += refusals(client) - before[0]
            evicted += evictions(client) - before[1]
        fault.at, fault.waits_for = run.now(), run.open()
    run.settle()
    run.pile_up(piled_up)
    with run.system.redis() as client:
        leave_little_room(client)
        run.until("the queue is thrown away", lambda: not fill(client).exists(run.system.queue))
        fault = run.fault()
        has_room_again(client)
    run.system.start(run.system.worker)
    run.settle()
    run.notes.append(f"Redis refused {refused:,} writes and threw away {evicted:,} keys, and then the queue")
    run.expect(refused > 0, "somebody is refused by a full Redis")
    run.expect(evicted > 0, "a full Redis throws something away")


def refused_since(run: Run, client: Redis, before: int) -> bool:
    """Whether Redis has refused more than those. Somebody writes to it, however long it took to fill it."""
    if not run.submits():
        run.submit(MORE)
    return refusals(client) > before


def leave_little_room(client: Redis) -> None:
    """What was not used for longest goes for what is new."""
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + LITTLE_ROOM)


def fill(client: Redis) -> Redis:
    """Somebody else writes far more than there is room for. Returns the client."""
    with client.pipeline(transaction=False) as pipe:
        for number in range(KEYS):
            pipe.set(f"somebody-elses-{number}", b"-" * KEY_BYTES)
        pipe.execute(raise_on_error=False)
    return client


def has_room_again(client: Redis) -> None:
    client.config_set("maxmemory", 0)
    client.config_set("maxmemory-policy", "noeviction")


def refusals(client: Redis) -> int:
    """Writes that it refused for want of room."""
    return int(client.info("errorstats").get("errorstat_OOM", {}).get("count", 0))


def evictions(client: Redis) -> int:
    return int(client.info("stats")["evicted_keys"])


DRILL = Drill(
    "full_redis",
    "A Redis without room, whether it refuses or evicts, loses no job",
    full_redis,
    long=Size(2000, faults=6, submitting=60, longest_fault=10),
    short=Size(300, faults=2, submitting=4, longest_fault=2, delay=1),
)
