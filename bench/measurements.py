"""What is measured, and how: each measurement drives one running system and fills some rows of the table."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from sqlalchemy import select

from bench.figures import Row, percentile
from bench.outside import eventually
from bench.processes import watched_memory
from bench.streams import streams
from bench.systems import Darkroom, System
from bench.vendor import LARGE
from bench.webhooks import webhooks
from sandbox.painter import Wish, paint
from shared.database import Database
from shared.tables import events

SMALL = 20_000
#: Of each run, with the sweep and without it.
FEED_TURNS = 3


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Times in seconds."""

    runs: int
    slow_runs: int  # of measurements that take a minute
    seconds: float  # of each rate
    pickups: int
    small_jobs: int
    large_jobs: int
    in_flight: int
    delay: float  # the vendor's, where it is not to answer at once
    waiting: int
    probes: int
    streams: int
    told: int  # jobs that webhooks tell of, twice
    many: int
    many_delay: float


FULL = Sizes(5, 3, 3.0, 100, 400, 200, 200, 3.0, 300, 100, 300, 60, 500, 2.0)
QUICK = Sizes(1, 1, 1.5, 100, 200, 100, 200, 1.0, 300, 40, 300, 20, 500, 0.5)
SMALLEST = Sizes(1, 1, 1.0, 5, 8, 4, 8, 0.2, 8, 4, 4, 2, 10, 0.2)

#: What `many` asks for, again and again. Its first word stands for the picture that the vendor answers with.
ALIKE = {"prompt": "alike fox", "width": 256, "height": 256, "seed": 7}

#: What a measurement gives: values by row's key. A row that is left out has no value on this machine.
Values = Mapping[str, float]


class Unusable(Exception):
    """A measurement that measured something else than was meant; the message says what happened."""


class Absent(Exception):
    """The system does not offer what was to be measured. No failure: a `-` in the table, and a line below it."""


def pickup(system: System, sizes: Sizes) -> Values:
    """From sending a submission to the vendor's seeing the call, one at a time."""
    system.vendor.wish(0, SMALL)
    sent = system.load("pickup", jobs=sizes.pickups)
    deadline = time.monotonic() + 60
    while len(came := system.vendor.book()["arrivals"]) < len(sent):
        if time.monotonic() > deadline:
            raise Unusable(f"the vendor saw {len(came)} of {len(sent)} calls")
        time.sleep(0.05)
    took = [(came[prompt] - at) * 1000 for prompt, at in sent.items()]
    return {"pickup_p50": percentile(took, 50), "pickup_p99": percentile(took, 99)}


def polls(system: System, sizes: Sizes) -> Values:
    system.vendor.wish(0, SMALL)
    job_id = system.load("batch", jobs=1, connections=1)["job_id"]
    return {"polls": _rate(system, "poll", 32, sizes, job_id)["per_second"]}


def downloads(system: System, sizes: Sizes) -> Values:
    system.vendor.wish(0, LARGE)
    job_id = system.load("batch", jobs=1, connections=1)["job_id"]
    return {"download": _rate(system, "download", 4, sizes, job_id)["bytes_per_second"] / 1e6}


def small_jobs(system: System, sizes: Sizes) -> Values:
    system.vendor.wish(0, SMALL)
    return {"small": sizes.small_jobs / system.load("batch", jobs=sizes.small_jobs, connections=8)["seconds"]}


def large_jobs(system: System, sizes: Sizes) -> Values:
    system.vendor.wish(0, LARGE)
    return {"large": sizes.large_jobs / system.load("batch", jobs=sizes.large_jobs, connections=8)["seconds"]}


def in_flight(system: System, sizes: Sizes) -> Values:
    """Many jobs at once, while the vendor takes its time."""
    system.vendor.wish(sizes.delay, LARGE)
    rounds = -(-sizes.in_flight // system.slots)
    with watched_memory(system.measured()) as memory:
        done = system.load("batch", within=rounds * sizes.delay, jobs=sizes.in_flight, connections=8)
    values = {"flight_time": done["seconds"], "flight_most": system.vendor.book()["most_in_flight"]}
    values["flight_rss"] = memory.rss / 1e6
    return values if memory.pss is None else values | {"flight_pss": memory.pss / 1e6}


def many(system: System, sizes: Sizes) -> Values:
    """More jobs than fit at once, all alike: `many_delay` a turn of all slots is what they take at least."""
    picture = paint(Wish("any", str(ALIKE["prompt"]), 7, width=256, height=256))
    system.vendor.answer_with("alike", picture)
    system.vendor.wish(sizes.many_delay, SMALL)
    turns = -(-sizes.many // system.slots)
    with watched_memory([system.processes.running[system.drawing]]) as memory:
        done = system.load("batch", within=turns * sizes.many_delay, jobs=sizes.many, connections=8, alike=ALIKE)
    book = system.vendor.book()
    if book["by_prompt"] != {ALIKE["prompt"]: sizes.many}:
        raise Unusable(f"the vendor was asked for {book['calls']} pictures of {sizes.many}")
    return {"many_time": done["seconds"], "many_most": book["most_in_flight"], "many_rss": memory.rss / 1e6}


def news(system: System, sizes: Sizes) -> Values:
    """From the end of a job to its client's knowing, while many others wait."""
    system.vendor.wish(0.15, SMALL)
    try:
        told = system.load("waits", waiting=sizes.waiting, held=system.slots // 2, probes=sizes.probes)
    finally:
        system.vendor.release()
    eventually("the held calls are over", system.processes, lambda: not system.vendor.book()["in_flight"])
    values = {"news_p50": told["p50"] * 1000, "news_p99": told["p99"] * 1000}
    if not system.waits:
        return values
    if not told["let_wait"]:
        raise Absent("`Prefer: wait` is not applied")
    return values | {"news_places": told["let_wait"]}


def open_streams(system: System, sizes: Sizes) -> Values:
    """Hundreds of clients at one process, who are told as their jobs end."""
    if not system.waits:
        raise Absent("it has no streams")
    system.vendor.wish(0.15, SMALL)
    return streams(system, sizes.streams)


def hostile_receivers(system: System, sizes: Sizes) -> Values:
    """How soon those who take their webhooks get them, alone and with a fifth of hostile endpoints beside them."""
    if not isinstance(system, Darkroom):
        raise Absent("it has no webhooks")
    system.vendor.wish(0, SMALL)
    return webhooks(system, sizes.told)


def submits(system: System, sizes: Sizes) -> Values:
    """Last of all that need the workers: what it leaves in the queue ends with the system."""
    system.vendor.wish(sizes.delay, SMALL)
    found = _rate(system, "submit", 32, sizes)
    return {"submits": found["per_second"], "submit_p99": found["p99"] * 1000}


def feed(system: System, sizes: Sizes) -> Values:
    """What the feed takes from those who submit: with the sweep, which numbers their events, and without it, in turns.

    After `submits`: from here on nothing is drawn, so that nothing else happens meanwhile.
    """
    if not isinstance(system, Darkroom):
        raise Absent("it has no feed")
    system.processes.stop("worker-dataoorts", grace=30)
    fed, unfed = [], []
    database = Database(system.database_url, connections=1)

    def has_numbered_all() -> bool:
        with database.read() as connection:
            return connection.scalar(select(events.c.id).where(events.c.number.is_(None)).limit(1)) is None

    try:
        for _ in range(FEED_TURNS):
            eventually("the feed has numbered every event", system.processes, has_numbered_all)
            fed.append(_rate(system, "submit", 32, sizes)["per_second"])
            system.processes.stop("worker-sweep", grace=30)
            unfed.append(_rate(system, "submit", 32, sizes)["per_second"])
            if has_numbered_all():
                raise Unusable("the sweep was ended, and the events have numbers all the same")
            system.start("worker-sweep")
    finally:
        database.close()
    return {"submits_fed": fmean(fed), "submits_unfed": fmean(unfed)}


def rows(names: Iterable[str], sizes: Sizes) -> list[Row]:
    """The rows of these measurements, as they are shown for these sizes."""
    found = [row for name in names for row in MEASUREMENTS[name].rows]
    return [replace(row, title=row.title.format(**asdict(sizes))) for row in found]


def _rate(system: System, kind: str, connections: int, sizes: Sizes, job_id: str = "") -> dict[str, float]:
    found = system.load("rate", kind=kind, connections=connections, seconds=sizes.seconds, job_id=job_id)
    if found["refused"] or not found["per_second"]:
        raise Unusable(f"{kind}: {found['refused']} answers were refusals, {found['per_second']:.0f} came a second")
    return found


@dataclass(frozen=True)
class Measurement:
    """`slow`: one run takes the baseline more than a minute."""

    measure: Callable[[System, Sizes], Values]
    rows: tuple[Row, ...]
    slow: bool = False


#: In the order in which they are run and shown; submits and feed last, since most of their jobs never end. What stands
#: in braces in a title is filled in from the sizes.
MEASUREMENTS: Mapping[str, Measurement] = {
    "pickup": Measurement(
        pickup,
        (
            Row("pickup_p50", "submit to the vendor's seeing the call, idle, p50", "ms", "down"),
            Row("pickup_p99", "  the same, p99", "ms", "down"),
        ),
    ),
    "polls": Measurement(polls, (Row("polls", "polls of a finished job, 32 connections", "1/s", "up"),)),
    "small": Measurement(small_jobs, (Row("small", "jobs end to end, vendor at 0 s, 20 kB", "1/s", "up"),)),
    "large": Measurement(large_jobs, (Row("large", "jobs end to end, vendor at 0 s, 1.2 MB", "1/s", "up"),)),
    "downloads": Measurement(downloads, (Row("download", "image download, 1.2 MB, 4 connections", "MB/s", "up"),)),
    "flight": Measurement(
        in_flight,
        (
            Row("flight_time", "{in_flight} jobs at once, vendor at {delay:g} s, 1.2 MB: all done after", "s", "down"),
            Row("flight_most", "  most calls in flight", "calls", "up"),
            Row("flight_rss", "  peak memory of all its processes, RSS", "MB", "down"),
            Row("flight_pss", "  peak memory of all its processes, PSS", "MB", "down"),
        ),
        slow=True,
    ),
    "many": Measurement(
        many,
        (
            Row("many_time", "{many} jobs alike at once, vendor at {many_delay:g} s: all done after", "s", "down"),
            Row("many_most", "  most of their calls in flight", "calls", "up"),
            Row("many_rss", "  peak memory of the worker and its children, RSS", "MB", "down"),
        ),
        slow=True,
    ),
    "news": Measurement(
        news,
        (
            Row("news_p50", "end of a job to its client's knowing, {waiting} waiting, p50", "ms", "down"),
            Row("news_p99", "  the same, p99", "ms", "down"),
            Row("news_places", "  of them let wait (the others ask twice a second)", "clients", "up"),
        ),
    ),
    "streams": Measurement(
        open_streams,
        (
            Row(
                "stream_p50",
                "{streams} streams, {streams} long-polls at one process: end of a job to a stream, p50",
                "ms",
                "down",
            ),
            Row("stream_p99", "  the same, p99", "ms", "down"),
            Row("wait_p50", "  long-poll, p50", "ms", "down"),
            Row("wait_p99", "  the same, p99", "ms", "down"),
            Row("asked_p99", "  others ask for a job meanwhile, p99", "ms", "down"),
            Row("stream_places", "  clients that found a place", "clients", "up"),
            Row("stream_rss", "  memory of the process, RSS", "MB", "down"),
            Row("stream_rest", "  the same, before they came", "MB", "down"),
        ),
    ),
    "webhooks": Measurement(
        hostile_receivers,
        (
            Row("webhooks_p50", "webhooks to 28 good endpoints: event to delivered, p50", "ms", "down"),
            Row("webhooks_p95", "  the same, p95", "ms", "down"),
            Row("hostile_p50", "  with 7 hostile endpoints beside them, p50", "ms", "down"),
            Row("hostile_p95", "  the same, p95", "ms", "down"),
        ),
    ),
    "submits": Measurement(
        submits,
        (
            Row("submits", "submits, 32 connections, vendor at {delay:g} s", "1/s", "up"),
            Row("submit_p99", "  one of them, p99", "ms", "down"),
        ),
    ),
    "feed": Measurement(
        feed,
        (
            Row("submits_fed", "submits, 32 connections, no worker, while their events are numbered", "1/s", "up"),
            Row("submits_unfed", "  without the sweep, which does that", "1/s", "up"),
        ),
    ),
}
