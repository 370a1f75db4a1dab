"""Jobs from their submission to their end, and to the moment that the vendor hears of them."""

import asyncio
import random
import time
from typing import Any

from bench.load.connection import Connection
from bench.load.dialects import DIALECTS, is_done, job_of

#: Between two looks at a job that has not ended, in seconds. Few, since asking is work for what is measured.
LOOK_AGAIN = 0.025
WATCHERS = 4
#: Seconds between the submissions to an idle service: longer than any pickup, and in step with nothing.
PAUSES = (0.02, 0.06)


async def batch(
    port: int, dialect: str, jobs: int, connections: int, alike: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Submit so many jobs at once and see them all end. `seconds`: from the first submission to the last end.

    `alike`: what each of them asks for; else each has a prompt of its own.
    """
    spoken = DIALECTS[dialect]
    prompts = iter(range(jobs))
    submitted: asyncio.Queue[str] = asyncio.Queue()
    begin = time.perf_counter()

    async def submit() -> None:
        connection = await Connection.open(port)
        for number in prompts:
            wish = spoken.submit(**(alike or {"prompt": f"a red fox {number}"}))
            submitted.put_nowait(job_of(await connection.ask(wish), 202)["id"])
        connection.close()

    async def watch() -> None:
        # The oldest first, and each until it has ended: about one request a job, however long it takes.
        connection = await Connection.open(port)
        while (job_id := await submitted.get()) != "":
            while not is_done(spoken, job_of(await connection.ask(spoken.poll(job_id)), 200)):
                await asyncio.sleep(LOOK_AGAIN)
            ended.append(job_id)
        connection.close()

    ended: list[str] = []
    watching = asyncio.gather(*(watch() for _ in range(WATCHERS)))
    await asyncio.gather(*(submit() for _ in range(connections)))
    for _ in range(WATCHERS):
        submitted.put_nowait("")
    await watching
    return {"seconds": time.perf_counter() - begin, "job_id": ended[-1]}


async def pickup(port: int, dialect: str, jobs: int) -> dict[str, float]:
    """Submit one job after the other to an idle service: when each was sent, by time.monotonic() and prompt."""
    spoken = DIALECTS[dialect]
    connection = await Connection.open(port)
    sent = {}
    for number in range(jobs):
        prompt = f"pickup {number}"
        request = spoken.submit(prompt)
        sent[prompt] = time.monotonic()
        job_of(await connection.ask(request), 202)
        await asyncio.sleep(random.uniform(*PAUSES))
    connection.close()
    return sent
