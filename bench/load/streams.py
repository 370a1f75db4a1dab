"""How soon clients learn that their job has ended, by a stream or by a long-poll, while hundreds of both are open."""

import asyncio
import json
import time

from bench.figures import percentile
from bench.load.connection import Connection, request
from bench.load.dialects import KEY_HEADER, completed_at, job_of
from bench.vendor import HELD

#: Pause after each job that is ended, in seconds: a busy service, not a wave.
PAUSE = 0.02
LONGEST_WAIT = 60
#: For those who wait by long-poll, of whom nothing is heard before the end, to have settled, in seconds.
SETTLING = 1.5
#: Questions by somebody who does not wait, while the others do.
QUESTIONS = 50


async def streams(port: int, dialect: str, control: int, clients: int) -> dict[str, float]:
    """At `port`, so many clients each wait for a job of their own by stream, and as many by long-poll, for the same.

    Through `control`, another process of the same service, the jobs are submitted and, one after the other, canceled.
    Times from the end that the job names to its client, in seconds. `places` have found one of either sort; `memory`
    and `questions` are asked for while all of them wait.
    """
    first = await Connection.open(control)
    jobs = [job_of(await first.ask(_submit(number)), 202)["id"] for number in range(clients)]
    first.close()
    opened: asyncio.Queue[None] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        streamed = [group.create_task(_stream(port, job_id, opened)) for job_id in jobs]
        polled = [group.create_task(_poll(port, job_id)) for job_id in jobs]
        for _ in jobs:
            await opened.get()
        await asyncio.sleep(SETTLING)
        asked = await _ask(port, jobs[0])
        second = await Connection.open(control)  # the first would have been hung up on meanwhile
        for job_id in jobs:
            job_of(await second.ask(request("POST", f"/v1/jobs/{job_id}/cancel", headers=KEY_HEADER)), 200)
            await asyncio.sleep(PAUSE)
        second.close()
    late = [task.result() for task in streamed]
    waited = [seconds for task in polled if (seconds := task.result()) is not None]
    return {
        "stream_p50": percentile(late, 50),
        "stream_p99": percentile(late, 99),
        "wait_p50": percentile(waited, 50),
        "wait_p99": percentile(waited, 99),
        "asked_p99": percentile(asked, 99),
        "places": len(late) + len(waited),
    }


def _submit(number: int) -> bytes:
    wish = {"prompt": f"{HELD} {number}", "width": 256, "height": 256}
    return request("POST", "/v1/jobs", json.dumps({"input": wish}).encode(), KEY_HEADER)


async def _stream(port: int, job_id: str, opened: asyncio.Queue[None]) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    accept = f"{KEY_HEADER}Accept: text/event-stream\r\n"
    writer.write(request("GET", f"/v1/jobs/{job_id}/events", headers=accept))
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"no stream: {head[:60]!r}")
        while True:
            line = await reader.readuntil(b"\n")
            now = time.time()
            if line.startswith(b"event: snapshot"):
                opened.put_nowait(None)
            elif line.startswith(b"data: ") and b'"type":"job.canceled"' in line:
                return now - completed_at(json.loads(line[6:])["data"])
    finally:
        writer.close()


async def _poll(port: int, job_id: str) -> float | None:
    """None if there was no place to wait."""
    connection = await Connection.open(port)
    waiting = f"{KEY_HEADER}Prefer: wait={LONGEST_WAIT}\r\n"
    answer = await connection.ask(request("GET", f"/v1/jobs/{job_id}", headers=waiting))
    now = time.time()
    connection.close()
    job = job_of(answer, 200)
    return now - completed_at(job) if b"\r\npreference-applied:" in answer.head else None


async def _ask(port: int, job_id: str) -> list[float]:
    connection = await Connection.open(port)
    took = []
    for _ in range(QUESTIONS):
        begin = time.perf_counter()
        job_of(await connection.ask(request("GET", f"/v1/jobs/{job_id}", headers=KEY_HEADER)), 200)
        took.append(time.perf_counter() - begin)
    connection.close()
    return took
