"""As fast as it is answered: how many requests a second a server takes."""

import asyncio
import time
from collections.abc import Callable

from bench.figures import percentile
from bench.load.connection import Connection, request
from bench.load.dialects import DIALECTS

#: Before anything is counted, in seconds: connections are made, and the server has warmed to the route.
WARM_UP = 0.3


def _requests(kind: str, dialect: str, job_id: str, worker: int) -> Callable[[int], bytes]:
    """What to send as the n-th request of a connection."""
    if kind in ("small", "large"):  # to the vendor's stand-in, which answers at once
        ready = request("GET", f"/{kind}")
        return lambda _: ready
    spoken = DIALECTS[dialect]
    if kind == "submit":
        return lambda number: spoken.submit(f"a red fox {worker} {number}")
    ready = spoken.poll(job_id) if kind == "poll" else spoken.download(job_id)
    return lambda _: ready


async def rate(
    port: int, dialect: str, kind: str, connections: int, seconds: float, job_id: str = ""
) -> dict[str, float]:
    """Ask as fast as is answered, for so long. Answers by the second, their bytes, and how long they took.

    For longer where nothing was answered in that time: a machine may stand still for all of it.
    """
    wanted = 202 if kind == "submit" else 200
    begin = time.perf_counter() + WARM_UP
    end = begin + seconds
    took: list[float] = []
    counted_until, size, refused = end, 0, 0

    async def ask_on(worker: int) -> None:
        nonlocal counted_until, size, refused
        connection = await Connection.open(port, keep=False)
        build = _requests(kind, dialect, job_id, worker)
        number, reopened = 0, False
        while (sent := time.perf_counter()) < end or not took:
            try:
                answer = await connection.ask(build(number))
            except ConnectionError:
                # Of a machine that stood still for seconds a server believes that its clients have nothing to ask.
                # Once: one that hangs up again and again is to be seen.
                if reopened:
                    raise
                connection, reopened = await Connection.open(port, keep=False), True
                continue
            number += 1
            now = time.perf_counter()
            if begin <= now and (now < end or not took):
                counted_until = max(end, now)
                took.append(now - sent)
                size += answer.size
                refused += answer.status != wanted
        connection.close()

    await asyncio.gather(*map(ask_on, range(connections)))
    return {
        "per_second": len(took) / (counted_until - begin),
        "bytes_per_second": size / (counted_until - begin),
        "p99": percentile(took, 99),
        "refused": refused,
    }
