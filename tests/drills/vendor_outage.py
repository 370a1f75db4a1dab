"""The vendor is out of order for a while, in every way in which it can say so, and then well again."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update

from shared.breaker import LONGEST_PAUSE, Reason
from shared.database import now
from shared.tables import jobs
from tests.breakers import pass_time, stored
from tests.service import Service, eventually, service

NAME = "vendor_outage"
PROMISE = "While the vendor is out of order jobs wait, burn no attempt, and cost a call now and then; then all are made"

#: What the vendor takes over each call, in seconds, so that some are in flight when it goes out of order.
SLOWNESS = 0.3
#: What may lie between the end of a pause and the first picture, in seconds, where times are judged: the sweep's ring,
#: a job's own pause, and a busy machine.
PATIENCE = 10.0


@dataclass(frozen=True)
class Weather:
    """One way to be out of order. `pause`: until the next call, in seconds, as promised."""

    name: str
    reason: Reason
    pause: float
    troubles: Callable[[float], dict[str, Any]]  # by the length of the outage

    def __str__(self) -> str:
        return self.name


def _date(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=math.ceil(seconds)), usegmt=True)


def _limited(name: str, pause: float, asked: Callable[[float], str]) -> Weather:
    return Weather(name, Reason.rate_limited, pause, lambda outage: {"status": 429, "retry_after": asked(outage)})


WEATHERS = (
    Weather("503", Reason.failing, 5, lambda outage: {"status": 503}),
    Weather("401", Reason.auth_failed, 60, lambda outage: {"status": 401}),
    _limited("429, 7 s", 7, lambda outage: "7"),
    _limited("429, the date of its end", 1, _date),
    _limited("429, nonsense", 5, lambda outage: "soon"),
    _limited("429, 10^9 s", LONGEST_PAUSE, lambda outage: "1000000000"),
    _limited("429, -5 s", 5, lambda outage: "-5"),
)


@dataclass(frozen=True)
class Size:
    """`jobs` in flight or queued when it begins, and as many during it. `wait`: the longest pause that is waited for,
    in seconds; of longer ones the rest is skipped. `timed`: whether times are judged."""

    seconds: float
    jobs: int
    wait: float
    timed: bool


LONG, SHORT = Size(60, 50, 60, timed=True), Size(2, 12, 6, timed=False)


@dataclass(frozen=True)
class Tally:
    """What was counted. `first`: seconds from the end of the outage to the first picture; of which `skipped` were not
    waited for."""

    weather: Weather
    outage: float
    jobs: int
    calls: int
    burned: int
    first: float
    skipped: float
    shown: tuple[str, str | None, str, int]  # state, reason, readyz' check, its status
    ends: dict[str, int] = field(hash=False)
    pictures: int
    timed: bool

    def broken_promises(self) -> list[str]:
        opening = self.jobs / 2  # what was in flight before it opened
        promises = {
            "no attempt is burned": self.burned == 0,
            "every job succeeds": self.ends == {"succeeded": self.jobs},
            "and is paid once": self.pictures == self.jobs,
            "calls while it is out of order: those in flight at first, and the probes": self.calls
            <= opening + math.ceil(self.outage / self.weather.pause) + 1,
            "the queue says why, and the service is ready": self.shown[1:] == (self.weather.reason, "degraded", 200)
            and self.shown[0] in ("open", "half_open"),
            "the first picture comes with the first probe": not self.timed
            or self.first <= self.weather.pause + PATIENCE,
        }
        return [promise for promise, kept in promises.items() if not kept]


def table(tallies: Sequence[Tally]) -> str:
    lines: list[tuple[str, ...]] = [
        ("the vendor says", "for s", "jobs", "calls then", "burned", "s to the first picture", "succeeded", "paid")
    ]
    for tally in tallies:
        waited = f"{tally.first:.1f}" + (f" (of them {tally.skipped:.0f} skipped)" if tally.skipped else "")
        figures = (tally.jobs, tally.calls, tally.burned, waited, tally.ends.get("succeeded", 0), tally.pictures)
        lines.append((tally.weather.name, f"{tally.outage:.0f}", *map(str, figures)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join(
        shown + [f"{tally.weather}, broken: {promise}" for tally in tallies for promise in tally.broken_promises()]
    )


def vendor_outage(running: Service, weather: Weather, size: Size) -> Tally:
    """Hold it on a service that works, and wait until all its jobs have ended."""
    sandbox, redis = running.sandbox, running.redis.client()
    before = running.count()
    burned_before = _burned(running)
    sandbox.clear()
    sandbox.trouble(delay=SLOWNESS)
    well = sandbox.calls()["pictures"]
    running.submit()
    eventually("it works", lambda: running.sandbox.calls()["pictures"] > well)
    sandbox.trouble(**weather.troubles(size.seconds))
    began, calls, pictures = time.monotonic(), sandbox.calls()["calls"], sandbox.calls()["pictures"]
    _submit(running, size.jobs)
    eventually("the breaker opens", lambda: (found := stored(redis)) is not None and found.is_open)
    _submit(running, size.jobs - 1)
    shown = _shown(running)
    threading.Event().wait(max(0.0, began + size.seconds - time.monotonic()))  # the outage itself
    calls = sandbox.calls()["calls"] - calls  # before it is well: then all that wait are called, as fast as we look
    sandbox.clear()
    sandbox.trouble(delay=SLOWNESS)
    ended = time.monotonic()
    skipped = _skip(running, size.wait)
    sandbox.wait_until(lambda books: books["pictures"] > pictures, timeout=3 * LONGEST_PAUSE)
    first = time.monotonic() - ended + skipped
    eventually(f"all end ({running.count()})", lambda: not set(running.count()) & {"queued", "running"}, 300)
    return Tally(
        weather=weather,
        outage=ended - began,
        jobs=2 * size.jobs,
        calls=calls,
        burned=_burned(running) - burned_before,
        first=first,
        skipped=skipped,
        shown=shown,
        ends=dict(running.count() - before),
        pictures=sandbox.calls()["pictures"] - well,
        timed=size.timed,
    )


def _submit(running: Service, jobs: int) -> None:
    for _ in range(jobs):
        running.submit()


def _shown(running: Service) -> tuple[str, str | None, str, int]:
    def known() -> Any:
        [queue] = running.http.get(f"{running.url}/v1/queue", timeout=30).json()["data"]
        return queue["breaker"]  # None while Redis is slow to answer

    breaker = eventually("it is known how the breaker stands", known)
    ready = running.http.get(f"{running.url}/readyz", timeout=30)
    return breaker["state"], breaker["reason"], ready.json()["checks"]["breakers"], ready.status_code


def _skip(running: Service, wait: float) -> float:
    """Let time pass for the breaker, and for the jobs that were refused, if they would wait for longer."""
    redis = running.redis.client()
    found = stored(redis)
    left = 0.0 if found is None else found.open_for(redis.time()[0])
    assert left <= LONGEST_PAUSE
    if left <= wait:
        return 0.0
    # Who was refused, and has not said so yet, would wait for all of it.
    eventually("every refusal is written down", lambda: not running.count()["running"])
    pass_time(redis, left)
    with running.database.write() as tx:
        tx.execute(update(jobs).where(jobs.c.ready_at.is_not(None)).values(ready_at=now()))
    return left


def _burned(running: Service) -> int:
    with running.database.read() as connection:
        return connection.scalar(select(func.sum(jobs.c.failures))) or 0


def hold(folder: Path, database_url: str, size: Size, tell: Callable[[str], None]) -> list[Tally]:
    """All weathers, one after the other, on one service."""
    with service(folder, database_url) as running:
        running.start()
        tallies = []
        for weather in WEATHERS:
            tell(f"{NAME}, {weather}")
            tallies.append(vendor_outage(running, weather, size))
        return tallies
