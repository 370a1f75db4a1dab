"""Promise: whatever meets in whatever order, a job ends once, its picture is its own, and no call goes uncounted.

The real worker's steps and the real sweep's, against cancels, retries and removals, from many threads at once. Every
lease is born lapsed, so that the sweep takes jobs from workers that are alive; some workers die in the middle. The
seeds fix who tries what; the threads decide who is first.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest
from sqlalchemy import func, select

from shared import jobs
from shared.database import Database
from shared.image_store import DatabaseImageStore
from shared.standing import TERMINAL
from shared.tables import Billed, Outcome, Status, attempts, events
from shared.tables import jobs as table
from shared.tickets import Bell
from tests.lives import PRICES, SUBMISSION, submit
from worker.backends.base import Backend, Failure, Kind, Picture, Request
from worker.generation import Generation
from worker.leases import Leases
from worker.sweep import Sweep

pytestmark = pytest.mark.slow

#: Of each: one more job, and everybody acts at once.
ROUNDS = 150
DATA = b"picture"


class Died(BaseException):
    """The process is gone, in the middle of a call: not even an `except Exception` runs."""


@dataclass
class Books:
    """What the vendor would say of each job: calls that made a picture, were refused for free, or broke off."""

    made: Counter[str] = field(default_factory=Counter)
    free: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, book: Counter[str], job_id: str) -> None:
        with self.lock:
            book[job_id] += 1


class Vendor:
    """A backend that takes a moment, and then does what chance says."""

    name = "dataoorts"
    attempt_seconds = -120.0  # long over when it begins: the sweep may close it under the worker's hands

    def __init__(self, books: Books, chance: random.Random) -> None:
        self._books = books
        self._chance = chance

    def generate(self, requests: Sequence[Request], progress: object, canceled: object) -> list[Picture | Failure]:
        [request] = requests
        time.sleep(self._chance.random() * 0.003)  # a call takes a moment, so that others come in between
        what = self._chance.choices(("picture", "passing", "final", "death"), (6, 2, 1, 1))[0]
        if what == "picture":
            self._books.note(self._books.made, request.job_id)
            return [Picture(DATA, "image/png", 8, 8, "0" * 64)]
        if what == "death":
            self._books.note(self._books.broken, request.job_id)
            raise Died
        self._books.note(self._books.free, request.job_id)
        kind = Kind.rejected if what == "final" else Kind.not_accepted
        return [Failure(kind, Billed.no, "no", retry_after=0)]


class SilentBell:
    def ring(self, *args: object, **kwargs: object) -> None: ...


class Race:
    """Everybody who wants something of the same jobs."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database = database
        self.images = DatabaseImageStore(database)
        self.books = Books()
        self.leases = Leases(database, 20)  # no heartbeat runs: nothing is renewed
        clock = iter(range(0, 10**9, 10))
        self.sweep = Sweep(
            database,
            self.images,
            cast(Bell, SilentBell()),
            ["dataoorts"],
            max_crashes=3,
            clock=lambda: float(next(clock)),
        )
        self.chance = random.Random(seed)
        self.ids: list[str] = []
        self.errors: list[BaseException] = []

    def some_job(self, chance: random.Random) -> str:
        """Mostly the newest."""
        return self.ids[-1] if chance.random() < 0.7 else chance.choice(self.ids)

    def a_worker(self, chance: random.Random) -> Callable[[], None]:
        generation = Generation(
            database=self.database,
            images=self.images,
            backend=cast(Backend, Vendor(self.books, chance)),
            leases=self.leases,
            worker="w",
            prices=PRICES,
            max_attempts=3,
            max_crashes=3,
            lease_seconds=0,
            stopping=threading.Event(),
        )

        def work() -> None:
            with suppress(Died):
                generation.work()

        return work

    def a_canceler(self, chance: random.Random) -> Callable[[], None]:
        def cancel() -> None:
            time.sleep(chance.random() * 0.004)
            job_id = self.some_job(chance)
            if chance.random() < 0.6:
                with self.database.write() as tx:
                    jobs.cancel(tx, job_id)

        return cancel

    def a_retrier(self, chance: random.Random) -> Callable[[], None]:
        def retry() -> None:
            time.sleep(chance.random() * 0.006)
            job_id = self.some_job(chance)
            with self.database.write() as tx:
                made = jobs.retry(tx, job_id, backend="dataoorts", sandbox=True, max_wait_seconds=3600)
            if made is not None and made.is_new:
                self.ids.append(made.job.id)

        return retry

    def a_remover(self, chance: random.Random) -> Callable[[], None]:
        def remove() -> None:
            if chance.random() < 0.2:
                job_id = self.some_job(chance)
                with self.database.write() as tx:
                    removed = jobs.remove_data(tx, job_id)
                for image in self.images.of_job(job_id) if removed else ():
                    self.images.remove(job_id, image.attempt)

        return remove

    def repair(self) -> None:
        for _ in range(2):  # a lapsed lease must be seen twice
            self.sweep.rescue_lapsed()
        self.sweep.ready_what_is_due()
        self.sweep.close_abandoned_attempts()
        self.sweep.forget_unpointed_images()

    def run(self) -> None:
        people = [
            self.a_worker(random.Random(self.chance.random())),
            self.a_worker(random.Random(self.chance.random())),
            self.a_canceler(random.Random(self.chance.random())),
            self.a_canceler(random.Random(self.chance.random())),
            self.a_retrier(random.Random(self.chance.random())),
            self.a_remover(random.Random(self.chance.random())),
            self.repair,
        ]
        start = threading.Barrier(len(people) + 1)

        def live(act: Callable[[], None]) -> None:
            try:
                for _ in range(ROUNDS):
                    start.wait(60)
                    act()
            except BaseException as error:  # noqa: BLE001  a thread has nobody else to tell
                self.errors.append(error)
                start.abort()

        threads = [threading.Thread(target=live, args=(act,)) for act in people]
        for thread in threads:
            thread.start()
        try:
            for _ in range(ROUNDS):
                self.ids.append(submit(self.database).id)
                start.wait(60)
        except threading.BrokenBarrierError:
            pass
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        self._finish()

    def _finish(self) -> None:
        """What is still open is left to one worker that does not die, and to the sweep."""
        steady = self.a_worker(random.Random(1))
        while True:
            self.repair()
            steady()
            with self.database.read() as connection:
                left = connection.scalar(select(func.count()).select_from(table).where(table.c.status.not_in(TERMINAL)))
            if not left:
                break
        self.repair()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_jobs_end_once_and_every_call_is_counted(database: Database, seed: int) -> None:
    race = Race(database, seed)
    race.run()
    with database.read() as connection:
        rows = {row.id: row for row in connection.execute(select(table))}
        happened: dict[str, list[Any]] = {job_id: [] for job_id in rows}
        for event in connection.execute(select(events).order_by(events.c.job_id, events.c.sequence)):
            happened[event.job_id].append(event)
        tries: dict[str, list[Any]] = {job_id: [] for job_id in rows}
        for attempt in connection.execute(select(attempts).order_by(attempts.c.job_id, attempts.c.number)):
            tries[attempt.job_id].append(attempt)
    stored = {job_id: [image.attempt for image in race.images.of_job(job_id)] for job_id in rows}

    assert set(race.ids) == set(rows)
    for job_id, row in rows.items():
        story = f"{job_id}: {[event.type for event in happened[job_id]]}, {[try_.outcome for try_ in tries[job_id]]}"
        # One end, which is the last thing that happened, and no event is missing.
        assert [event.sequence for event in happened[job_id]] == list(range(1, row.sequence + 1)), story
        ends = [event.type for event in happened[job_id] if event.type.removeprefix("job.") in set(TERMINAL)]
        assert ends == [f"job.{row.status}"] == [happened[job_id][-1].type], story
        assert row.lease_until is row.worker is None and row.completed_at is not None, story
        # An image if and only if it succeeded, and no other picture.
        pointed_at = [] if row.image_attempt is None else [row.image_attempt]
        assert stored[job_id] == pointed_at, story
        assert bool(pointed_at) == (row.status == Status.succeeded and not row.data_removed), story
        assert row.input == ({} if row.data_removed else SUBMISSION["input"]), story
        # Every attempt is closed, and the bill is the vendor's.
        assert [try_.number for try_ in tries[job_id]] == list(range(1, row.attempts + 1)), story
        assert all(try_.outcome != Outcome.running and try_.completed_at for try_ in tries[job_id]), story
        bills = Counter(try_.billed for try_ in tries[job_id])
        books = race.books
        assert bills[Billed.yes] == books.made[job_id], story
        assert bills[Billed.unknown] == books.broken[job_id] and bills[Billed.no] == books.free[job_id], story
    # At no time were two retries of the same job open.
    for job_id in rows:
        again = sorted((row.created_at, row.completed_at) for row in rows.values() if row.retried_from == job_id)
        assert all(one[1] <= next_one[0] for one, next_one in pairwise(again)), job_id
    # The race was one: every way to end was taken, and some pictures came too late.
    ends_taken = Counter(row.status for row in rows.values())
    assert ends_taken[Status.succeeded] and ends_taken[Status.canceled] and ends_taken[Status.failed], ends_taken
    assert race.books.made.total() > ends_taken[Status.succeeded]
    assert any(row.retried_from for row in rows.values()) and any(row.data_removed for row in rows.values())
