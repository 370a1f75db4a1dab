"""How soon a client learns that its job has ended, while many others wait for theirs.

Where there is `Prefer: wait`, everybody waits with it; elsewhere, and where no place to wait was free, everybody asks
twice a second, as such clients do.
"""

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.figures import percentile
from bench.load.connection import Connection
from bench.load.dialects import DIALECTS, Dialect, completed_at, is_done, job_of
from bench.vendor import HELD

#: Between two questions of a client that cannot wait, in seconds.
POLL_EVERY = 0.5
#: What a client that can wait asks for, in seconds.
LONGEST_WAIT = 30
#: At once, the jobs whose end is timed.
PROBES_AT_ONCE = 4
#: For those who wait to have settled, in seconds.
SETTLING = 1.5


async def waits(port: int, dialect: str, waiting: int, held: int, probes: int) -> dict[str, Any]:
    """`waiting` clients wait for `held` jobs that do not end; meanwhile `probes` others end and are timed.

    `p50`, `p99`: from the end that the job names to the answer, in seconds. `let_wait`: how many of the waiting had
    found a place when the timing began. The held jobs are for the caller to have released.
    """
    spoken = DIALECTS[dialect]
    first = await Connection.open(port)
    ids = [job_of(await first.ask(spoken.submit(f"{HELD} {number}")), 202)["id"] for number in range(held)]
    first.close()
    refused: set[int] = set()
    async with asyncio.TaskGroup() as group:
        waiters = [
            group.create_task(_told(port, spoken, ids[number % held], partial(refused.add, number)))
            for number in range(waiting)
        ]
        await asyncio.sleep(SETTLING)
        let_wait = waiting - len(refused) if spoken.waits else 0
        late = await _probe(port, spoken, probes)
        for waiter in waiters:
            waiter.cancel()
    return {"p50": percentile(late, 50), "p99": percentile(late, 99), "let_wait": let_wait}


async def _probe(port: int, spoken: Dialect, probes: int) -> list[float]:
    numbers = iter(range(probes))
    late: list[float] = []

    async def one_after_the_other() -> None:
        for number in numbers:
            connection = await Connection.open(port)
            job = job_of(await connection.ask(spoken.submit(f"probe {number}")), 202)
            connection.close()
            late.append(await _told(port, spoken, job["id"], lambda: None))

    await asyncio.gather(*(one_after_the_other() for _ in range(PROBES_AT_ONCE)))
    return late


async def _told(port: int, spoken: Dialect, job_id: str, refused: Callable[[], None]) -> float:
    """Wait for the job as this system's clients do; how late the news came. `refused` is called if it may not wait."""
    connection = await Connection.open(port)
    request = spoken.poll(job_id, LONGEST_WAIT if spoken.waits else 0)
    try:
        if not spoken.waits:
            await asyncio.sleep(random.uniform(0, POLL_EVERY))  # a job ends at any moment between two questions
        while True:
            answer = await connection.ask(request)
            now = time.time()
            job = job_of(answer, 200)
            if is_done(spoken, job):
                return now - completed_at(job)
            if spoken.waits and b"\r\npreference-applied:" in answer.head:
                continue
            refused()
            await asyncio.sleep(POLL_EVERY)
    finally:
        connection.close()
