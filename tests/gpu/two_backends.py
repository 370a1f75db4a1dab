"""A vendor and a card side by side, and the vendor goes out of order for good, in the middle of jobs of `auto`.

    python -m tests.gpu.two_backends 200 20

says what became of so many jobs of so many steps.
"""

import json
import math
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from sqlalchemy import select

from migrations import migrate
from shared.catalogue import DEFAULT_MODEL
from shared.database import Database
from shared.tables import workers
from tests.breakers import stored
from tests.gpu.tiny_sdxl import save_tiny_sdxl
from tests.service import PATIENCE, Service, eventually, service
from worker.breaker import PAUSE

VENDOR, CARD = "dataoorts", "diffusers"
#: What the vendor takes over each call, in seconds, so that some are in flight when it goes out of order.
SLOWNESS = 0.5


@contextmanager
def both(folder: Path, database_url: str, model: Path, price: str | None = None) -> Iterator[Service]:
    """The whole service, ready. `price`: the vendor's, in USD an image; None: as the catalogue has it."""
    settings = {
        "DARKROOM_BACKENDS": f"{VENDOR},{CARD}",
        "DARKROOM_GPU_MODEL": str(model),
        "DARKROOM_GPU_DEVICE": "cpu",
    }
    if price is not None:
        settings["DARKROOM_PRICES"] = json.dumps({DEFAULT_MODEL: price})
    with service(folder, database_url, **settings) as running:
        running.start()
        eventually("both are there", lambda: all(queue["workers"] for queue in queues(running).values()))
        yield running


def queues(running: Service) -> dict[str, dict[str, Any]]:
    answer = running.http.get(f"{running.url}/v1/queue", timeout=30).json()
    return {queue["backend"]: queue for queue in answer["data"]}


@dataclass(frozen=True)
class Tally:
    """What was counted, from the first submission to the last end. `calls`: of the vendor; `in_outage`: those of them
    that he refused; `late`: jobs submitted once the breaker was open, and how many of those were tried there.
    """

    jobs: int
    seconds: float
    outage: float
    ends: dict[str, int]
    made_by: Counter[str]
    tried_at: Counter[str]
    chosen: Counter[str]
    calls: int
    in_outage: int
    pictures: int
    cost: Decimal
    late: int
    late_at_vendor: int
    both_shown: int
    last_at_vendor: int
    images: int
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def probes(self) -> int:
        """As many as he may have had."""
        return math.ceil(self.outage / PAUSE) + 1

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.jobs} jobs, {self.seconds:.1f} s, of which the vendor was out of order for {self.outage:.1f} s",
                f"ended: {dict(self.ends)}; made by: {dict(self.made_by)}; first sent to: {dict(self.chosen)}",
                f"routed: {dict(self.reasons)}; attempts: {dict(self.tried_at)}",
                f"vendor: {self.calls} calls, {self.pictures} pictures, {self.in_outage} refused; cost: ${self.cost}",
                f"tried at both: {self.both_shown}; late: {self.late}, of them tried there: {self.late_at_vendor}",
            )
        )


def outage(running: Service, jobs: int, steps: int) -> Tally:
    """Half of the jobs before it begins, some until the breaker is open, and the rest, a quarter at least, after it."""
    sandbox, redis = running.sandbox, running.redis.client()
    sandbox.trouble(delay=SLOWNESS)
    before, images_before, calls_before = running.count(), sum(running.images().values()), sandbox.calls()
    began = time.monotonic()
    submitted = [_submit(running, steps) for _ in range(jobs // 2)]
    made = calls_before["pictures"] + max(jobs // 20, 1)
    sandbox.wait_until(lambda books: books["pictures"] >= made, timeout=PATIENCE)
    sandbox.clear()
    sandbox.trouble(status=503)
    out_of_order = time.monotonic()
    while (found := stored(redis)) is None or not found.is_open:  # each job fails there once, and goes elsewhere
        assert time.monotonic() - out_of_order < PATIENCE, "the breaker stays closed"
        submitted.append(_submit(running, steps))
        threading.Event().wait(0.05)
    while not _is_passed_by(running, submitted, steps):  # an API knows it a second later
        assert time.monotonic() - out_of_order < PATIENCE, "it goes on choosing the vendor"
        threading.Event().wait(0.25)
    late = [_submit(running, steps) for _ in range(max(jobs - len(submitted), jobs // 4))]
    everything = submitted + late
    ends = running.all_ended(len(everything) + before.total(), patience=600) - before
    seconds, dark = time.monotonic() - began, time.monotonic() - out_of_order
    shown = {job_id: running.job(job_id) for job_id in everything}
    tries = {job_id: _attempts(running, job_id) for job_id in everything}
    calls = sandbox.calls()
    pictures = calls["pictures"] - calls_before["pictures"]
    return Tally(
        jobs=len(everything),
        seconds=seconds,
        outage=dark,
        ends=dict(ends),
        made_by=Counter(last["backend"] for *_, last in tries.values() if last["outcome"] == "succeeded"),
        tried_at=Counter(f"{each['backend']} {each['outcome']}" for some in tries.values() for each in some),
        chosen=Counter(job["routing"][0]["backend"] for job in shown.values()),
        reasons=Counter(choice["reason"] for job in shown.values() for choice in job["routing"]),
        calls=calls["calls"] - calls_before["calls"],
        in_outage=calls["calls"] - calls_before["calls"] - pictures,
        pictures=pictures,
        cost=sum((Decimal(job["cost_usd"]) for job in shown.values()), Decimal(0)),
        late=len(late),
        late_at_vendor=sum(any(each["backend"] == VENDOR for each in tries[job_id]) for job_id in late),
        both_shown=sum({each["backend"] for each in some} == {VENDOR, CARD} for some in tries.values()),
        last_at_vendor=sum(some[-1]["backend"] == VENDOR for some in tries.values()),
        images=sum(running.images().values()) - images_before,
    )


def _is_passed_by(running: Service, submitted: list[str], steps: int) -> bool:
    submitted.append(_submit(running, steps))
    first = running.job(submitted[-1])["routing"][0]
    return bool(first["backend"] == CARD)


def _submit(running: Service, steps: int) -> str:
    return running.submit(input={"num_steps": steps})


def _attempts(running: Service, job_id: str) -> list[dict[str, Any]]:
    answer = running.http.get(f"{running.url}/v1/jobs/{job_id}/attempts", timeout=30)
    return list(answer.json()["data"])


def main() -> None:
    jobs, steps = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="darkroom-two-") as name:
        folder = Path(name)
        url = f"sqlite:///{folder / 'darkroom.db'}"
        database = Database(url)
        migrate.upgrade(database)
        database.close()
        model = save_tiny_sdxl(folder / "tiny-sdxl")
        with both(folder, url, model) as running:
            # What the card takes is known before the first choice.
            warm = [running.submit(backend=CARD, input={"num_steps": steps}) for _ in range(16)]
            running.all_ended(len(warm), patience=600)
            eventually("it has said how long it takes", lambda: _seconds(running) is not None)
            print(f"the card: {_seconds(running):.1f} s a picture")  # noqa: T201  it is for a person
            print(outage(running, jobs, steps))  # noqa: T201


def _seconds(running: Service) -> float | None:
    with running.database.read() as connection:
        return connection.scalar(select(workers.c.seconds).where(workers.c.backend == CARD))


if __name__ == "__main__":
    main()
