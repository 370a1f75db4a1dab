"""A database whose clock is turned by hand, a vendor who counts, workers, sweeps and requests: all of it real code,
whose every effect is a step (stepping.py)."""

import errno
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import Connection, event, insert, text
from sqlalchemy.exc import OperationalError

from shared import jobs, tickets
from shared.database import AWAY, Database, now
from shared.image_store import DatabaseImageStore
from shared.jobs import Claim
from shared.queue_head import QueueHead
from shared.routing import RoutingReason
from shared.tables import Billed, metadata, projects
from tests.lives import AGAIN, PRICES, SUBMISSION
from tests.machine.promises import BACKEND, Promises
from tests.machine.stepping import Answer, Died, Fate, Hand, Turn, step
from tests.machine.stepping import hand as who_goes_on
from worker.backends.base import Canceled, Capabilities, Failure, Kind, Picture, Progress, Request, Unjudged
from worker.breaker import Permit, Verdict
from worker.closing import Closing
from worker.feed import Feed
from worker.generation import Generation
from worker.generation import _dice as dice_of_generations
from worker.leases import Leases
from worker.recovery import Recovery
from worker.shared_breaker import SharedBreaker
from worker.spool import Entry, Spool
from worker.sweep import Sweep

LEASE_SECONDS = 20.0
ATTEMPT_SECONDS = 60.0
#: Two, not three: what can go wrong at the limit does so in fewer steps.
MAX_ATTEMPTS = MAX_CRASHES = 2
#: Nobody works for it: who is moved there waits until he is moved back.
ELSEWHERE = "diffusers"


class Clock:
    """`now`: the database's clock, which may be set. `own`: what no machine can set, its monotonic clock."""

    def __init__(self) -> None:
        self.begins()

    def begins(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self.own = 0.0


class SteppedDatabase(Database):
    """Every transaction is a step, and what `now()` says is what our clock says, in the database itself."""

    def __init__(self, url: str, clock: Clock) -> None:
        super().__init__(url, connections=4)
        self.clock = clock
        self.committed: Callable[[], None] = lambda: None
        if self._writer is not None:
            for engine in (self.engine, self._writer._engine):
                event.listen(engine, "connect", self._turn_sqlite_clock)
        else:
            self._turn_postgresql_clock()
        self.tell_the_time()

    def _turn_sqlite_clock(self, connection: Any, _record: object) -> None:
        def strftime(_format: str, _now: str, *modifiers: str | None) -> str | None:
            if None in modifiers:
                return None
            seconds = sum(float(str(modifier).removesuffix(" seconds")) for modifier in modifiers)
            return f"{self.clock.now + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S.%f}"[:23]

        connection.create_function("strftime", -1, strftime)
        connection.create_function("julianday", 1, lambda _now: self.clock.now.timestamp() / 86400 + 2440587.5)
        connection.execute("PRAGMA synchronous=OFF")  # no power cut here

    def _turn_postgresql_clock(self) -> None:
        """A clock_timestamp() of ours stands before PostgreSQL's own in the search path."""
        with self.engine.begin() as connection:
            for statement in (
                "CREATE SCHEMA machine",
                "CREATE TABLE machine.clock AS SELECT pg_catalog.clock_timestamp() AS now",
                "CREATE FUNCTION machine.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'TABLE machine.clock'",
                f'ALTER DATABASE "{self.engine.url.database}" SET search_path = machine, pg_catalog, public',
            ):
                connection.execute(text(statement))
            for table in metadata.sorted_tables:  # rows stay in their order, in which equal ones are found
                connection.execute(text(f"ALTER TABLE {table.name} SET (autovacuum_enabled = off)"))
        self.engine.dispose()

    def tell_the_time(self) -> None:
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                connection.execute(text("UPDATE machine.clock SET now = :now"), {"now": self.clock.now})

    def empty(self) -> None:
        tables = [table.name for table in reversed(metadata.sorted_tables)]
        with super().write() as tx:
            if self.is_sqlite:
                for table in tables:
                    tx.execute(text(f"DELETE FROM {table}"))  # noqa: S608 - our own names
            else:
                tx.execute(text(f"TRUNCATE {', '.join(tables)}"))

    @contextmanager
    def read(self) -> Iterator[Connection]:
        fate, _ = step("reads")
        if fate in (Fate.fails, Fate.is_rolled_back, Fate.answer_is_lost):
            raise _away()
        with super().read() as connection:
            yield connection
        if fate is Fate.dies_after:
            raise Died

    @contextmanager
    def write(self) -> Iterator[Connection]:
        fate, _ = step("writes")
        if fate is Fate.fails:
            raise _away()
        with super().write() as tx:
            yield tx
            if fate is Fate.is_rolled_back:
                raise _away()
        self.committed()
        if fate is Fate.answer_is_lost:
            raise _away()
        if fate is Fate.dies_after:
            raise Died

    def dedicated(self) -> Database:
        return self


def _away() -> OperationalError:
    return OperationalError("COMMIT", None, Exception("the database is away"))


class Tickets(tickets.Bell):
    """The queue in Redis: no more than a number."""

    ENOUGH = 4

    def __init__(self) -> None:
        super().__init__(Celery(set_as_current=False))
        self.waiting = 0

    def ring(self, backend: str, jobs: int = 1) -> None:
        self.waiting = min(self.waiting + jobs, self.ENOUGH)


class Vendor:
    """A hosted backend, and the vendor behind it: the calls that he took money for are counted here."""

    name = BACKEND
    attempt_seconds = ATTEMPT_SECONDS
    capabilities = Capabilities(256, 2048, 8, 20, True, False, False, False, 1)

    def __init__(self, promises: Promises) -> None:
        self._promises = promises
        self._at_work = threading.local()

    def load(self) -> None: ...

    def health(self) -> str | None:
        return None

    def close(self) -> None: ...

    def works_at(self, claim: Claim) -> None:
        self._at_work.claim = claim

    def compatible(self, in_hand: Sequence[Mapping[str, Any]]) -> None:
        return None

    def generate(self, requests: Sequence[Request], progress: Progress, canceled: Canceled) -> list[Picture | Failure]:
        [request] = requests
        claim: Claim = self._at_work.claim
        _, answer = step("calls the vendor")
        self._promises.a_call_is_made(claim.job_id, claim.attempt, answer.paid)
        fate, _ = step("waits for the vendor's answer")
        if fate is Fate.fails:
            return [Failure(Kind.transient, Billed.unknown, "the connection broke")]
        if answer.failure is not None:
            return [answer.failure]
        if answer is Answer.our_fault:
            raise ZeroDivisionError
        data = f"{answer.data} {claim.job_id} {claim.attempt}".encode()
        request.received(data)
        try:
            return [self.judge(request, data)]
        except Failure as failure:
            return [failure]

    def judge(self, request: Request, data: bytes) -> Picture:
        fate, _ = step("judges")
        if fate is Fate.fails:
            raise Unjudged(Kind.transient, Billed.yes, "nobody can judge")
        if data.startswith(b"spoilt"):
            raise Failure(Kind.bad_output, Billed.yes, "unfit")
        return Picture.of(data, "image/png", 512, 512)


class SteppedEntry(Entry):
    """An entry whose removal is a step, at which what made it unnecessary must stand in the database."""

    __slots__ = ("promises",)
    promises: Promises

    def remove(self) -> None:
        fate, _ = step("removes what it spooled")
        if self.path is not None:
            self.promises.an_entry_is_removed(self.job_id, self.attempt)
        super().remove()
        if fate is Fate.dies_after:
            raise Died


class SteppedSpool(Spool):
    """A real one, on a disk that may be full and under a process that may die."""

    def __init__(self, root: Path, promises: Promises) -> None:
        self._promises = promises
        self._full = False
        super().__init__(root)
        promises.folders_in_use.add(self._folder().path)

    def keep(self, job_id: str, attempt: int, data: bytes) -> Entry:
        fate, _ = step("writes a picture down")
        self._full = fate is Fate.fails
        entry = super().keep(job_id, attempt, data)
        self._full = False
        if entry.path is not None and fate is Fate.is_rolled_back:
            entry.path.with_name(f"{entry.path.name}.part").write_bytes(data[: len(data) // 2])
            entry.path.unlink()
            raise Died
        if entry.path is not None:
            self._promises.a_picture_is_safe(job_id, attempt, data)
        if fate is Fate.dies_after:
            raise Died
        return self._stepped(entry)

    def left_behind(self) -> Generator[Entry]:
        with closing(super().left_behind()) as entries:
            for entry in entries:
                assert entry.path is not None
                if entry.path not in self._handed_back:
                    self._promises.what_a_dead_worker_left(entry.path)
                yield self._stepped(entry)

    def close(self) -> None:
        self._promises.folders_in_use.discard(self._folder().path)
        super().close()

    def lock_dies(self) -> None:
        """With its process; its folder stays as it is."""
        if self._own is not None:
            self._promises.folders_in_use.discard(self._own.path)
            os.close(self._own._lock)

    def _folder(self) -> Any:
        if self._full:
            raise OSError(errno.ENOSPC, "no space left on device")
        return super()._folder()

    def _stepped(self, entry: Entry) -> Entry:
        stepped = SteppedEntry(entry.job_id, entry.attempt, entry.held, entry.path)
        object.__setattr__(stepped, "promises", self._promises)
        return stepped


class Names:
    """In the place of `secrets`: names that come in the same order each time."""

    def __init__(self) -> None:
        self._given = 0

    def token_hex(self, size: int) -> str:
        self._given += 1
        return f"{self._given:0{2 * size}x}"


class ClosedBreaker(SharedBreaker):
    """Always closed: an open one waits by the real clock, which stands still here. Its rules have their own tests."""

    def admit(self, wanted: int, in_hand: int) -> Permit:
        return Permit(wanted)

    def ended(self, permit: Permit, failure: Failure | None, job_id: str) -> Verdict:
        return Verdict()

    def withdraw(self, permit: Permit) -> None: ...


class SteppedGeneration(Generation):
    """So that the vendor can count by attempt, and that the real clock decides nothing: steps take no time."""

    AWAY_PAUSE_SECONDS = 0.0
    STOPPING_SECONDS = math.inf

    def _why_not_send(self, taken_at: float) -> str | None:
        return super()._why_not_send(math.inf)

    def run_attempt(self, claim: Claim) -> None:
        assert isinstance(self._backend, Vendor)
        self._backend.works_at(claim)
        super().run_attempt(claim)


class Worker:
    """A worker process: threads that generate, one that recovers, and one that renews leases when it is told to."""

    SLOTS = 3

    def __init__(self, house: "House", name: str) -> None:
        self.name = name
        self.lives = True
        self.stopping = threading.Event()
        self.spool = SteppedSpool(house.spool, house.promises)
        self.leases = Leases(house.database, LEASE_SECONDS)
        self.slots: list[Hand] = []
        self.others: list[Hand] = []
        self.generation = SteppedGeneration(
            database=house.database,
            images=house.images,
            backend=house.vendor,
            leases=self.leases,
            worker=name,
            prices=PRICES,
            max_attempts=MAX_ATTEMPTS,
            max_crashes=MAX_CRASHES,
            lease_seconds=LEASE_SECONDS,
            stopping=self.stopping,
            spool=self.spool,
            breaker=ClosedBreaker(BACKEND),
            more=lambda jobs: house.tickets.ring(BACKEND, jobs),
        )
        self.generation._head = QueueHead(lambda: house.clock.own)
        self._turn = Turn()
        self.generation._claims._turn = self._turn  # type: ignore[assignment]
        self.recovery = Recovery(
            house.database, Closing(house.database, house.images), house.vendor, self.spool, self.stopping
        )

    @property
    def hands(self) -> list[Hand]:
        return [*self.slots, *self.others]

    def takes_a_ticket(self) -> Hand:
        [hand] = self.takes_tickets(1)
        return hand

    def takes_tickets(self, count: int) -> list[Hand]:
        """All of them while somebody else has his turn to claim: the first one then claims for all."""
        busy = self._turn.taken
        self._turn.taken = busy or count > 1
        hands = [Hand(self._work) for _ in range(count)]
        self._turn.taken = busy
        self.slots += hands
        return hands

    def _work(self) -> None:
        try:
            self.generation.work()
        except AWAY as away:
            raise AssertionError("a thread ended because the database was away") from away

    def recovers(self) -> None:
        self.others.append(Hand(self._recover))

    def _recover(self) -> None:
        with suppress(*AWAY, Unjudged):  # as its own loop does
            self.recovery.round()

    def renews(self, fate: Fate = Fate.goes_well) -> None:
        """The heartbeat, at once; the fate is that of the leases' own statement."""
        beat = Hand(self.leases.renew)
        beat.go_on(fate)
        while not beat.ended:
            beat.go_on()

    def tidies_up(self) -> None:
        """Forget threads that have ended; all of it ends if one died, or if it was asked to stop and all is done."""
        if not self.lives:
            return
        died = any(hand.died for hand in self.hands)
        self.slots = [hand for hand in self.slots if not hand.ended]
        self.others = [hand for hand in self.others if not hand.ended]
        if died:
            self.dies()
        elif self.stopping.is_set() and not self.hands:
            self.lives = False
            self.spool.close()

    def dies(self) -> None:
        for hand in self.hands:
            if not hand.ended:
                hand.go_on(Fate.dies_before)
        self.slots, self.others, self.lives = [], [], False
        self.spool.lock_dies()


class Sweeper:
    """A process of the sweep, with a monotonic clock of its own."""

    REPAIRS = (
        "rescue_lapsed",
        "expire_too_old",
        "ready_what_is_due",
        "close_abandoned_attempts",
        "forget_unpointed_images",
        "number_events",
        "ring",
    )

    def __init__(self, house: "House") -> None:
        self._house = house
        self.off = 0.0  # seconds
        self.hand: Hand | None = None
        self._starts()

    def _starts(self) -> None:
        house = self._house
        #: At what has lapsed, the one that goes on included, since it last found the database away.
        self.looks = 0
        self.sweep = Sweep(
            house.database,
            house.images,
            house.tickets,
            [BACKEND],
            Feed(house.database),
            max_crashes=MAX_CRASHES,
            clock=lambda: house.clock.own + self.off,
        )

    def repairs(self, name: str) -> None:
        """Begin this repair, once it is done with the last one."""
        if self.hand is None:
            self.looks += name == "rescue_lapsed"
            self.hand = Hand(getattr(self.sweep, name))

    def finishes(self) -> None:
        while self.hand is not None:
            if not self.hand.ended:
                self.hand.go_on()
            self.tidies_up()

    def tidies_up(self) -> None:
        if self.hand is not None and self.hand.ended:
            if self.hand.died:
                self._starts()
            elif self.hand.error is not None:
                self.looks = 0
            self.hand = None


class House(logging.Handler):
    """All of it, on one database, for one example after the other."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(logging.ERROR)
        self.clock = Clock()
        self.database = SteppedDatabase(url, self.clock)
        self.images = DatabaseImageStore(self.database)
        #: Who only looks on, and takes no steps.
        self._onlooker = Database(url, connections=2)
        self._folder = folder
        self._examples = 0
        self.tickets = Tickets()
        self.begins()
        log = logging.getLogger("worker")
        log.addHandler(self)
        log.setLevel(logging.ERROR)

    def begins(self) -> None:
        """An empty house."""
        self._examples += 1
        self.clock.begins()
        dice_of_generations.seed(0)
        self.database.committed = lambda: None
        self.database.empty()
        self.database.tell_the_time()
        with self.database.write() as tx:
            tx.execute(insert(projects).values(id=SUBMISSION["project_id"], name="a", created_at=now()))
        self.spool = self._folder / f"spool{self._examples}"
        self.promises = Promises(
            self._onlooker,
            DatabaseImageStore(self._onlooker),
            self.clock,
            self.spool,
            MAX_ATTEMPTS,
            MAX_CRASHES,
            self._looks,
        )
        self.database.committed = self.promises.after_a_commit
        self.vendor = Vendor(self.promises)
        self.tickets.waiting = 0
        self.workers: list[Worker] = []
        self.sweepers = [Sweeper(self), Sweeper(self)]
        self.requests: list[Hand] = []

    def ends(self) -> None:
        """Whatever still stands somewhere is gone."""
        for worker in self.workers:
            if worker.lives:
                worker.dies()
        for sweeper in self.sweepers:
            if sweeper.hand is not None and not sweeper.hand.ended:
                sweeper.hand.go_on(Fate.dies_before)
        for request in self.requests:
            if not request.ended:
                request.go_on(Fate.dies_before)
        shutil.rmtree(self.spool, ignore_errors=True)

    def close(self) -> None:
        log = logging.getLogger("worker")
        log.removeHandler(self)
        log.setLevel(logging.NOTSET)
        self._onlooker.close()
        self.database.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Whatever the workers call an error is one, but for the fault that we made: nothing else fails here."""
        if record.exc_info and record.exc_info[0] is ZeroDivisionError:
            return
        self.promises.broken.append(f"a worker's error: {record.getMessage()} {record.exc_info}")

    def _looks(self) -> int:
        """Of the sweep that goes on here and now."""
        [sweeper] = [sweeper for sweeper in self.sweepers if sweeper.hand is who_goes_on()]
        return sweeper.looks

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.lives]

    def hands(self) -> list[Hand]:
        working = [hand for worker in self.alive for hand in worker.hands]
        sweeping = [sweeper.hand for sweeper in self.sweepers if sweeper.hand is not None]
        return [hand for hand in (*working, *sweeping, *self.requests) if not hand.ended]

    def goes_on(self, hand: Hand, steps: int = 1, fate: Fate = Fate.goes_well, answer: Answer = Answer.picture) -> None:
        """So many steps of one hand; the last one's fate is `fate`."""
        for left in reversed(range(steps)):
            if not hand.ended:
                hand.go_on(fate if left == 0 else Fate.goes_well, answer)
        self.tidies_up()

    def tidies_up(self) -> None:
        for worker in self.workers:
            worker.tidies_up()
        for sweeper in self.sweepers:
            sweeper.tidies_up()
        self.requests = [request for request in self.requests if not request.ended]

    def a_worker_starts(self, name: str) -> None:
        self.workers.append(Worker(self, name))

    def a_request(self, work: Callable[[], object]) -> None:
        self.requests.append(Hand(work))
        self.tidies_up()

    def submits(self, deadline_seconds: float | None) -> None:
        self.time_passes(0.001)
        with self.database.write() as tx:
            jobs.submit(tx, **{**SUBMISSION, "deadline_seconds": deadline_seconds})

    def cancels(self, job_id: str) -> None:
        with self.database.write() as tx:
            jobs.cancel(tx, job_id)
        self.promises.a_job_is_canceled(job_id)

    def deletes(self, job_id: str) -> None:
        """As api/jobs.py does."""
        with self.database.write() as tx:
            removed = jobs.remove_data(tx, job_id)
        if removed:
            for image in self.images.of_job(job_id):
                self.images.remove(job_id, image.attempt)

    def submits_again(self, job_id: str) -> None:
        self.time_passes(0.001)
        with self.database.write() as tx:
            jobs.retry(tx, job_id, **{name: SUBMISSION[name] for name in AGAIN})

    def moves_on(self, job_id: str, source: str) -> None:
        """As the sweep does where there are two backends: a job that waits for the one waits for the other."""
        target = ELSEWHERE if source == BACKEND else BACKEND
        with self.database.write() as tx:
            jobs.reroute(
                tx, job_id, source=source, target=target, reason=RoutingReason.breaker_open, sandbox=source != BACKEND
            )

    def time_passes(self, seconds: float) -> None:
        self.clock.own += seconds
        self.clock_is_set(seconds)

    def clock_is_set(self, seconds: float) -> None:
        """The database's clock alone, forward or back."""
        self.clock.now += timedelta(seconds=seconds)
        self.database.tell_the_time()

    def settles(self) -> None:
        """Nothing goes wrong any more: whoever lives goes on, and a worker more, and a sweep, and time."""
        for hours in range(1, 21):
            self._everybody_finishes()
            for job_id in self.promises.jobs():
                self.moves_on(job_id, ELSEWHERE)
            if not any(not worker.stopping.is_set() for worker in self.alive):
                self.a_worker_starts(f"late{hours}")
            for worker in self.alive:
                worker.recovers()
                worker.renews()
            self._everybody_finishes()
            for sweeper in self.sweepers:
                for _ in range(2):
                    for repair in Sweeper.REPAIRS:
                        sweeper.repairs(repair)
                        sweeper.finishes()
                    self.time_passes(3.0)
            while self.tickets.waiting:
                self.tickets.waiting -= 1
                self.alive[-1].takes_a_ticket()
            self._everybody_finishes()
            self.promises.nobody_waits()
            if self.promises.all_has_ended():
                break
            self.time_passes(15.0 if hours < 8 else 1800.0)
        for sweeper in self.sweepers:
            for repair in ("forget_unpointed_images", "number_events"):
                sweeper.repairs(repair)
                sweeper.finishes()
        self.promises.in_the_end()

    def _everybody_finishes(self) -> None:
        self.tidies_up()
        for _ in range(10_000):
            standing = self.hands()
            if not standing:
                return
            for hand in standing:
                self.goes_on(hand)
        raise AssertionError("somebody never finishes")
