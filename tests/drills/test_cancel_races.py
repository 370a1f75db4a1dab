"""Promise: whatever meets in whatever order, a job ends once, its picture is its own, and no call goes uncounted.

The real worker and the real sweep, against cancels, retries, removals and the time that passes. Every lease is born
lapsed, so that the sweep takes jobs from workers that are alive. Workers die before any of their transactions, are
asked to stop, find the database away, and are not told of commits that were made.

In turns: one thread at a time, and before each transaction the seed says which of them goes on, so that a failure comes
again (on PostgreSQL mostly: it orders ties as it likes). At once: the same threads, as they come.

RACES_SEED=1 and RACES_ROUNDS=1000 in the environment: from that seed on, so many rounds; a failure names its own.
"""

import math
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, Protocol, cast

import pytest
from sqlalchemy import ColumnElement, Connection, Row, Table, delete, select, update
from sqlalchemy.exc import OperationalError

from shared import jobs
from shared.database import AWAY, Database, now
from shared.errors import JobErrorCode
from shared.image_store import DatabaseImageStore, Image
from shared.job_object import SHOWN
from shared.jobs import Claim
from shared.standing import TERMINAL
from shared.tables import Billed, Outcome, Status, attempts, events, images
from shared.tables import jobs as table
from shared.tickets import Bell
from tests.lives import AGAIN, PRICES, SUBMISSION, job_row
from worker.backends.base import Backend, Canceled, Failure, Kind, Picture, Request
from worker.backends.dataoorts import Dataoorts
from worker.feed import Feed
from worker.generation import Generation
from worker.leases import Leases
from worker.sweep import Sweep

pytestmark = pytest.mark.slow

#: Jobs that a round begins with, in an empty database. It ends with the last of them, and of their retries.
JOBS = 24
PRICE = PRICES["m"]
#: A job's id, and the number of an attempt at it.
Key = tuple[str, int]


class Died(BaseException):
    """The process is gone: not even an `except Exception` runs."""


class Turns(Protocol):
    def next(self) -> None:
        """Others may come first."""

    def run(self, acts: Sequence[Callable[[], None]]) -> None:
        """All of them, each in a thread of its own, to the end."""


class AtOnce:
    """Everybody as he comes: the threads and the database decide who is first."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def next(self) -> None:
        time.sleep(self._chance.random() * 0.001)  # there is nothing to wait for: what is done takes a moment

    def run(self, acts: Sequence[Callable[[], None]]) -> None:
        threads = [threading.Thread(target=act) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class InTurns:
    """One at a time: chance says who."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._gates: list[threading.Semaphore] = []
        self._mine = threading.local()

    def next(self) -> None:
        if self._gates:
            self._open_one()
            self._mine.gate.acquire()

    def _open_one(self) -> None:
        self._chance.choice(self._gates).release()

    def run(self, acts: Sequence[Callable[[], None]]) -> None:
        def live(gate: threading.Semaphore, act: Callable[[], None]) -> None:
            self._mine.gate = gate
            gate.acquire()
            try:
                act()
            finally:
                self._gates.remove(gate)
                if self._gates:
                    self._open_one()

        self._gates = [threading.Semaphore(0) for _ in acts]
        threads = [threading.Thread(target=live, args=pair) for pair in zip(self._gates[:], acts, strict=True)]
        for thread in threads:
            thread.start()
        self._open_one()
        for thread in threads:
            thread.join()


def nothing() -> None: ...


class Shaky(Database):
    """Each transaction waits for its turn. What its owner meets with before and after it is handed in."""

    def __init__(
        self, url: str, turns: Turns, before: Callable[[], None] = nothing, after: Callable[[], None] = nothing
    ) -> None:
        super().__init__(url, connections=3)
        self._turns = turns
        self._before = before
        self._after = after

    @contextmanager
    def write(self) -> Iterator[Connection]:
        self._turns.next()
        self._before()
        with super().write() as tx:
            yield tx
        self._after()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        self._turns.next()
        with super().read() as connection:
            yield connection


def away(when: str) -> OperationalError:
    return OperationalError(when, {}, Exception("the connection was lost"))


def lose_the_answer(is_lost: bool) -> None:
    """The commit was made, and whoever made it is not told."""
    if is_lost:
        raise away("COMMIT")


def drawn(key: Key) -> Picture:
    """The picture of an attempt, which is like no other."""
    data = f"{key[0]} {key[1]}".encode()
    return Picture.of(data, "image/png", 8, 8)


@dataclass
class Call:
    """A call at the vendor, and what it answered. None: whoever asked died meanwhile."""

    answer: Picture | Failure | None = None
    #: It raised: what the worker makes of that is its own.
    broke_off: bool = False

    @property
    def billed(self) -> Billed:
        if self.answer is None:
            return Billed.unknown
        return self.answer.billed if isinstance(self.answer, Failure) else Billed.yes


class Books:
    """What really became of the attempts, to be compared with what the database says."""

    def __init__(self) -> None:
        self.calls: dict[Key, Call] = {}
        #: Attempts whose worker lived to see their end: of these the database must know all.
        self.seen_through: set[Key] = set()
        #: The jobs that somebody makes a picture for right now.
        self.in_flight: list[str] = []
        #: What was met with on the way, in all rounds.
        self.met: Counter[str] = Counter()

    def begin(self) -> None:
        """Another round."""
        self.calls.clear()
        self.seen_through.clear()


class Vendor:
    """A backend whose calls take a while, and end as chance wills."""

    name = "dataoorts"
    capabilities = Dataoorts.capabilities
    attempt_seconds = -120.0  # long over when it begins: the sweep may close it under the worker's hands

    def __init__(self, turns: Turns, books: Books, chance: random.Random) -> None:
        self.attempt = 0  # the number of the one that asks
        self._turns = turns
        self._books = books
        self._chance = chance

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> None:
        return None

    def generate(self, requests: Sequence[Request], progress: object, canceled: Canceled) -> list[Picture | Failure]:
        [request] = requests
        key = (request.job_id, self.attempt)
        call = self._books.calls[key] = Call()
        self._books.met["two workers with one job"] += request.job_id in self._books.in_flight
        self._books.in_flight.append(request.job_id)
        try:
            stopped = self._take_a_while(canceled)
        finally:
            self._books.in_flight.remove(request.job_id)
        what = self._chance.random()
        if stopped:
            call.answer = Failure(Kind.canceled, Billed.no, f"attempt {self.attempt} was stopped", retry_after=900)
        elif what < 0.05:
            raise Died
        elif what < 0.1:
            call.answer, call.broke_off = Failure(Kind.transient, Billed.unknown, ""), True
            raise ZeroDivisionError
        elif what < 0.5:
            call.answer = drawn(key)
        else:
            kind = self._chance.choice([kind for kind in Kind if kind != Kind.canceled])  # that one is not its to say
            billed = self._chance.choice(list(Billed))
            # The pause is longer than the test: it ends when _let_time_pass() says so, and at no other moment.
            call.answer = Failure(kind, billed, f"attempt {self.attempt} failed", retry_after=900)
        return [call.answer]

    def _take_a_while(self, canceled: Canceled) -> bool:
        """Some calls can be stopped. Whether this one was."""
        can_stop = self._chance.random() < 0.3
        for _ in range(self._chance.choice((0, 4, 15, 50))):
            self._turns.next()
            if can_stop and canceled(0):
                self._books.met["a call was stopped"] += 1
                return True
        return False


class LastDeeds(DatabaseImageStore):
    """Now and then, storing a picture is the last that its worker does."""

    def __init__(self, database: Database, chance: Callable[[], float]) -> None:
        super().__init__(database)
        self._chance = chance

    def put(self, image: Image, data: bytes) -> None:
        super().put(image, data)
        if self._chance() < 0.1:
            raise Died


class WatchedGeneration(Generation):
    """The worker's steps. Whoever has gone through them all has left everything in order."""

    AWAY_PAUSE_SECONDS = 0.0

    def __init__(self, books: Books, vendor: Vendor, quiet: Database, chance: random.Random, **rest: Any) -> None:
        super().__init__(backend=cast(Backend, vendor), **rest)
        self._chance = chance
        self._books = books
        self._vendor = vendor
        self._quiet = quiet

    def _why_not_send(self, taken_at: float) -> str | None:
        # By the clock everything is late here, since leases are born lapsed; so chance decides.
        return super()._why_not_send(taken_at if self._chance.random() < 0.1 else math.inf)

    def run_attempt(self, claim: Claim) -> None:
        key = (claim.job_id, claim.attempt)
        assert key not in self._books.calls, f"{key}: claimed a second time"
        self._vendor.attempt = claim.attempt
        super().run_attempt(claim)
        self._books.seen_through.add(key)
        if key in self._books.calls and isinstance(self._books.calls[key].answer, Picture):
            job = job_row(self._quiet, claim.job_id)
            stored = [image.attempt for image in DatabaseImageStore(self._quiet).of_job(claim.job_id)]
            assert job.status in TERMINAL, f"{key}: a picture was paid for, and its job goes on"
            if not job.data_removed and job.image_attempt != claim.attempt:
                assert claim.attempt not in stored, f"{key}: a picture that nothing points at was left behind"
                self._books.met["a superfluous picture"] += 1


class Worker:
    """Worker processes, one after the other: each lives until no job is left, or it dies, or is asked to stop."""

    def __init__(self, url: str, turns: Turns, books: Books, chance: random.Random, *, is_lucky: bool = False) -> None:
        self._turns = turns
        self._books = books
        self._chance = chance
        self._is_lucky = is_lucky
        self._quiet = Database(url, connections=1)
        self._shaky = Shaky(url, turns, self._before_a_transaction, self._after_a_transaction)
        self._leases = Leases(self._quiet, -1)  # its thread never starts: see beat()
        self._stopping = threading.Event()
        self._lives = 0

    def live(self, _: object = None) -> None:
        self._lives += 1
        self._stopping = threading.Event()
        generation = WatchedGeneration(
            self._books,
            Vendor(self._turns, self._books, self._chance),
            self._quiet,
            self._chance,
            database=self._shaky,
            images=LastDeeds(self._shaky, self._luck),
            leases=self._leases,
            worker=f"{id(self)}-{self._lives}",
            prices=PRICES,
            max_attempts=2,
            max_crashes=2,
            lease_seconds=-1,
            stopping=self._stopping,
        )
        with suppress(Died):
            generation.work()

    def beat(self) -> None:
        self._leases.renew()

    def close(self) -> None:
        self._leases._database.close()
        self._shaky.close()
        self._quiet.close()

    def _luck(self) -> float:
        return 1.0 if self._is_lucky else self._chance.random()

    def _before_a_transaction(self) -> None:
        what = self._luck()
        if what < 0.03:
            raise Died
        if what < 0.06:
            raise away("BEGIN")
        if what < 0.09:
            self._stopping.set()

    def _after_a_transaction(self) -> None:
        lose_the_answer(self._luck() < 0.04)


class SilentBell:
    def ring(self, *args: object, **kwargs: object) -> None: ...


class Race:
    """Everybody who wants something of the same jobs."""

    def __init__(self, url: str, turns: type[InTurns] | type[AtOnce], seed: int) -> None:
        self._chance = random.Random(seed)
        self._turns: Turns = turns(self._new_chance())
        self._errors: list[BaseException] = []
        self.ids: list[str] = []
        self.books = Books()
        self.quiet = Database(url, connections=2)
        self._clients = Shaky(url, self._turns)
        chance = self._new_chance()
        self._sweeps = Shaky(url, self._turns, after=lambda: lose_the_answer(chance.random() < 0.02))
        clock = iter(range(0, 10**9, 10))
        self._sweep = Sweep(
            self._sweeps,
            DatabaseImageStore(self._sweeps),
            cast(Bell, SilentBell()),
            ["dataoorts"],
            Feed(self._sweeps),
            max_crashes=2,
            clock=lambda: float(next(clock)),
        )
        self._workers = [Worker(url, self._turns, self.books, self._new_chance()) for _ in range(3)]
        self._lucky = Worker(url, self._turns, self.books, self._new_chance(), is_lucky=True)

    def close(self) -> None:
        for worker in (*self._workers, self._lucky):
            worker.close()
        for database in (self.quiet, self._clients, self._sweeps):
            database.close()

    def run(self) -> None:
        """One round."""
        with self.quiet.write() as tx:
            for one in (events, attempts, images, table):
                tx.execute(delete(one))
            self.ids = [jobs.submit(tx, **SUBMISSION).id for _ in range(JOBS)]
        self.books.begin()
        self._turns.run(
            [
                *(self._often(12, worker.live) for worker in self._workers),
                self._often(15, self._repair),
                self._often(20, self._cancel),
                self._often(12, self._retry),
                self._often(12, self._retry),
                self._often(6, self._remove),
                self._often(20, self._let_time_pass),
                self._often(20, self._beat),
            ]
        )
        if self._errors:
            raise self._errors[0]
        self._finish()

    def _finish(self) -> None:
        """What is still open is left to a worker that does not die, and to the sweep."""
        rounds = 0
        while self._is_a_job_open():
            rounds += 1
            assert rounds < 100, "some never end"
            self._let_time_pass(self._chance)
            self._repair(self._chance)
            self._lucky.live()
        for _ in range(5):  # each may break off
            self._repair(self._chance)

    def _is_a_job_open(self) -> bool:
        with self.quiet.read() as connection:
            return connection.scalar(select(table.c.id).where(table.c.status.not_in(TERMINAL)).limit(1)) is not None

    def _new_chance(self) -> random.Random:
        return random.Random(self._chance.random())

    def _often(self, times: int, act: Callable[[random.Random], object]) -> Callable[[], None]:
        chance = self._new_chance()

        def live() -> None:
            try:
                for _ in range(times):
                    if not self._errors:
                        act(chance)
            except BaseException as error:  # noqa: BLE001  a thread has nobody else to tell
                self._errors.append(error)

        return live

    def _some_job(self, chance: random.Random) -> str:
        """Often one that is being worked at."""
        return chance.choice((chance.random() < 0.5 and self.books.in_flight[:]) or self.ids)

    def _cancel(self, chance: random.Random) -> None:
        with self._clients.write() as tx:
            jobs.cancel(tx, self._some_job(chance))

    def _retry(self, chance: random.Random) -> None:
        job_id = self._some_job(chance)
        with self._clients.write() as tx:
            made = jobs.retry(tx, job_id, **{name: SUBMISSION[name] for name in AGAIN})
        if made is not None and made.is_new:
            self.ids.append(made.job.id)

    def _remove(self, chance: random.Random) -> None:
        job_id, images = self._some_job(chance), DatabaseImageStore(self._clients)
        with self._clients.write() as tx:
            removed = jobs.remove_data(tx, job_id)
        for image in images.of_job(job_id) if removed else ():
            images.remove(job_id, image.attempt)

    def _let_time_pass(self, chance: random.Random) -> None:
        """Pauses are over; now and then a job has waited too long."""
        with self._clients.write() as tx:
            tx.execute(update(table).where(table.c.ready_at.is_not(None)).values(ready_at=now(-1)))
            if chance.random() < 0.4:
                too_old = table.c.id == self._some_job(chance)
                tx.execute(update(table).where(too_old).values(queue_until=now(-1)))

    def _repair(self, _: random.Random) -> None:
        sweep = self._sweep
        for repair in (
            sweep.rescue_lapsed,
            sweep.expire_too_old,
            sweep.ready_what_is_due,
            sweep.close_abandoned_attempts,
            sweep.forget_unpointed_images,
        ):
            with suppress(*AWAY):
                repair()

    def _beat(self, chance: random.Random) -> None:
        self._turns.next()
        chance.choice(self._workers).beat()


class End:
    """What the database says of a job in the end, beside what the books say."""

    def __init__(
        self, books: Books, row: Row[Any], happened: list[Row[Any]], tries: list[Row[Any]], stored: list[Row[Any]]
    ) -> None:
        self.row = row
        self.events = happened
        self.tries = tries
        self.stored = {image.attempt: image.sha256 for image in stored}
        self.calls = {number: call for (job_id, number), call in books.calls.items() if job_id == row.id}
        said = [f"{each.number} {each.outcome} {each.billed}" for each in tries]
        self.story = f"{row.id}: {[each.type for each in happened]}, attempts {said}, stored {list(self.stored)}"
        self.seen_through = {number for job_id, number in books.seen_through if job_id == row.id}

    def has_one_end(self) -> None:
        """It is the last thing that happened, and no event is missing."""
        row, types = self.row, [each.type for each in self.events]
        assert [each.sequence for each in self.events] == list(range(1, row.sequence + 1)), self.story
        assert [each for each in types if each.removeprefix("job.") in TERMINAL] == [types[-1]], self.story
        assert types[-1] == f"job.{row.status}", self.story
        assert types[0] == "job.queued" and all(before in MAY_FOLLOW[after] for before, after in pairwise(types)), (
            self.story
        )
        assert row.lease_until is row.worker is row.ready_at is None and row.completed_at is not None, self.story
        assert row.input == ({} if row.data_removed else SUBMISSION["input"]), self.story

    def has_its_own_picture(self) -> None:
        """If and only if it succeeded, and no other."""
        row = self.row
        assert list(self.stored) == ([] if row.image_attempt is None else [row.image_attempt]), self.story
        assert (row.image_attempt is not None) == (row.status == Status.succeeded and not row.data_removed), self.story
        for attempt, sha256 in self.stored.items():
            assert row.image_sha256 == sha256 == drawn((row.id, attempt)).sha256, self.story

    def was_moved_by_whoever_had_it(self) -> None:
        """Where a worker's answer moved the job, it is the answer to the attempt that ran then, and to no older one."""
        for moved in self.events:
            call = self.calls.get(moved.data["attempts"])
            failure = call.answer if call is not None and isinstance(call.answer, Failure) else None
            reason, error = moved.data.get("reason"), moved.data["error"]
            if reason in set(Kind):
                assert call and failure and (failure.kind == reason or call.broke_off), self.story
            if reason in ("worker_stopping", "worker_late"):
                assert call is None, self.story
            if error is not None and error["code"] not in NO_ANSWERS:
                assert call and failure and (failure.message == error["message"] or call.broke_off), self.story

    def is_billed_for_every_call(self) -> None:
        assert [try_.number for try_ in self.tries] == list(range(1, self.row.attempts + 1)), self.story
        for try_ in self.tries:
            call = self.calls.get(try_.number)
            truth = Billed.no if call is None else call.billed
            assert try_.outcome != Outcome.running and try_.completed_at is not None, self.story
            if try_.number in self.seen_through:
                assert (try_.outcome, try_.billed) == (self._outcome(call), truth), self.story
            else:
                assert try_.billed in (truth, Billed.unknown), self.story  # its worker died: it may count in full
            if try_.number == self.row.image_attempt:
                assert (try_.outcome, try_.billed) == (Outcome.succeeded, Billed.yes), self.story
        paid = sum(call.billed == Billed.yes for call in self.calls.values())
        assert self.row.cost == PRICE * sum(try_.billed != Billed.no for try_ in self.tries) >= PRICE * paid, self.story

    def _outcome(self, call: Call | None) -> Outcome:
        if call is None:
            return Outcome.canceled  # given back, and nothing was sent
        if isinstance(call.answer, Failure):
            return Outcome.canceled if call.answer.kind == Kind.canceled else Outcome.failed
        return Outcome.canceled if self.row.status == Status.canceled else Outcome.succeeded

    def what_was_met_with(self) -> Iterator[str]:
        for moved in self.events:
            yield moved.data.get("reason") or (moved.data["error"] or {}).get("code") or moved.type
        if self.row.retried_from is not None:
            yield "a retry"
        if self.row.data_removed:
            yield "a removal"
        if self.row.status == Status.succeeded and self.events[-2].type == "job.queued":
            yield "a late picture"
        if self.row.image_attempt is not None and self.row.image_attempt not in self.seen_through:
            yield "a dead worker's picture"


#: What each event may follow: section 2 of the design.
MAY_FOLLOW = {
    "job.queued": {"job.started"},
    "job.started": {"job.queued"},
    "job.succeeded": {"job.queued", "job.started"},
    "job.failed": {"job.queued", "job.started"},
    "job.canceled": {"job.queued", "job.started"},
    "job.expired": {"job.queued"},
}

#: What ends a job without an answer of a backend.
NO_ANSWERS = {JobErrorCode.worker_crashed, JobErrorCode.gave_up, JobErrorCode.expired}

#: What a race that deserves the name has met with.
MET = {
    *(f"job.{status}" for status in (Status.succeeded, Status.canceled)),
    *(code for code in JobErrorCode if code != JobErrorCode.internal_error),
    *(kind for kind in Kind if kind not in (Kind.rejected, Kind.unsafe, Kind.canceled)),
    *("rescued", "worker_stopping", "worker_late", "two workers with one job", "a call was stopped", "a late picture"),
    *("a superfluous picture", "a dead worker's picture", "a retry", "a removal"),
}


def ends(race: Race) -> list[End]:
    with race.quiet.read() as connection:

        def by_job(rows: Table, order: ColumnElement[int], job: str = "job_id") -> dict[str, list[Row[Any]]]:
            found: dict[str, list[Row[Any]]] = defaultdict(list)
            for row in connection.execute(select(rows).order_by(order)):
                found[row._mapping[job]].append(row)
            return found

        rows = connection.execute(SHOWN).all()
        happened, tries = by_job(events, events.c.sequence, "subject_id"), by_job(attempts, attempts.c.number)
        stored = by_job(images, images.c.attempt)
    assert {row.id for row in rows} == set(race.ids) >= set(happened) | set(tries) | set(stored)
    return [End(race.books, row, happened[row.id], tries[row.id], stored[row.id]) for row in rows]


def one_retry_at_a_time(race: Race, all_ends: Sequence[End]) -> None:
    """At no time were two retries of the same job open."""
    for job_id in race.ids:
        again = sorted((end.row.created_at, end.row.completed_at) for end in all_ends if end.row.retried_from == job_id)
        assert all(one[1] <= next_one[0] for one, next_one in pairwise(again)), job_id


#: With one seed after the other, so many rounds with each.
ROUNDS_A_SEED = 4


def run_a_round(race: Race) -> None:
    race.run()
    all_ends = ends(race)
    for end in all_ends:
        end.has_one_end()
        end.has_its_own_picture()
        end.was_moved_by_whoever_had_it()
        end.is_billed_for_every_call()
        race.books.met.update(end.what_was_met_with())
    one_retry_at_a_time(race, all_ends)


@pytest.mark.timeout(0 if "RACES_ROUNDS" in os.environ else 300)
@pytest.mark.parametrize(("turns", "rounds"), [(InTurns, 24), (AtOnce, 8)])
def test_jobs_end_once_and_every_call_is_counted(
    database_url: str, turns: type[InTurns] | type[AtOnce], rounds: int
) -> None:
    first, left = int(os.environ.get("RACES_SEED", "1")), int(os.environ.get("RACES_ROUNDS", str(rounds)))
    is_whole, met = left >= rounds, set[str]()
    for seed in count(first):
        with closing(Race(database_url, turns, seed)) as race:
            for number in range(1, min(left, ROUNDS_A_SEED) + 1):
                try:
                    run_a_round(race)
                except BaseException as error:
                    error.add_note(f"again with RACES_SEED={seed} RACES_ROUNDS={number}")
                    raise
            met |= set(+race.books.met)
        left -= ROUNDS_A_SEED
        if left <= 0:
            break
    assert turns is AtOnce or not is_whole or not MET - met
