"""The sweep: everything that a crash or a lost message left behind is found here and moved on.

A plain loop, every second (`python -m worker.sweep`). It needs the database and not Redis. Two of them at once do no
harm: each repair is one of the guarded moves of shared/jobs.py, one job a transaction, and safe to run twice.
"""

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, func, select, tuple_

from shared import deliveries, guards, jobs, logs, receivers, settings, tickets
from shared.announcements import Announcer, Listener, client
from shared.breaker import BreakerBoard
from shared.database import AWAY, Database, now
from shared.image_store import ImageStore, open_image_store
from shared.present import SWEEP
from shared.receivers import SENDING
from shared.standing import ATTEMPT_RUNS, CLAIMABLE, NEVER_TRIED, TERMINAL, is_status
from shared.tables import KEYS_KEPT_SECONDS, Billed, Outcome, Status, attempts
from shared.tables import deliveries as sent
from shared.tables import idempotency_keys as keys
from shared.tables import jobs as table
from worker import presence, tallying
from worker.breaker_log import BreakerLog
from worker.feed import AT_MOST, Feed, FeedClerk
from worker.lapses import Lapses
from worker.rerouting import Rerouting
from worker.stop import Stop
from worker.watchdog import Watchdog

log = logging.getLogger("worker.sweep")


def queued_and_due(due: ColumnElement[datetime | None], *conditions: ColumnElement[bool]) -> Select[tuple[str, str]]:
    """Queued jobs whose time has come, the longest due first: in the order of the index, or none is used."""
    never_null = due.is_not(None)  # as the index says it
    due_now = is_status(Status.queued), never_null, due < now(), *conditions
    return select(table.c.id, table.c.request_id).where(*due_now).order_by(due)


def _expire(tx: Connection, job_id: str) -> bool:
    status = jobs.expire(tx, job_id)
    if status is not None:
        log.info("it waited for longer than it may, now %s", status)
    return status is not None


class Sweep:
    """The repairs. `round()` runs each of them once."""

    #: Jobs that one repair touches in a round. Where more are left, the next round begins at once.
    LIMIT = 200
    #: How long after its hard deadline an attempt that nobody closed counts as abandoned.
    ABANDONED_SECONDS = 60.0
    #: How often the sweep writes its own row.
    SHOWN_SECONDS = 2.0

    def __init__(
        self,
        database: Database,
        images: ImageStore,
        bell: tickets.Bell,
        backends: Sequence[str],
        feed: Feed,
        *,
        max_crashes: int,
        breakers: BreakerBoard | None = None,
        rerouting: Rerouting | None = None,
        clock: Callable[[], float] = time.monotonic,
        present: Callable[[Connection], None] | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        """`rerouting`: moves jobs on to other backends; None: there is one. `present`: writes that the sweep is there.

        `stopping`: once it is set no further repair begins. `turns` says how often it went on.
        """
        self._database = database
        self._images = images
        self._bell = bell
        self._backends = backends
        self._max_crashes = max_crashes
        self._clock = clock
        self._feed = feed
        self._present = present
        self._stopping = stopping or threading.Event()
        self._shown_at = -math.inf
        self.turns = 0
        self._breaker_log = BreakerLog(breakers, backends) if breakers is not None else None
        self._rerouting = rerouting
        self._lapsed_jobs = Lapses(clock)
        self._lapsed_deliveries = Lapses(clock)
        self._walked_to = ("", 0)
        self._repaired = 0  # by the repair that runs now; what is a sweep's daily work counts for nothing

    def round(self) -> bool:
        """Every repair once. Returns whether one of them stopped at its limit, so that more is left to do.

        Where the database is away each of them waits for it: so it ends between two, once it is asked to stop.
        """
        repairs = (
            self.rescue_lapsed,
            self.expire_too_old,
            self.reroute,
            self.ready_what_is_due,
            self.close_abandoned_attempts,
            self.forget_unpointed_images,
            self.forget_old_keys,
            self.forget_dead_workers,
            self.number_events,
            self.tally,
            self.rescue_deliveries,
            self.ring,
            self.ring_for_deliveries,
            self.watch_breakers,
        )
        more = [not self._stopping.is_set() and self._run(repair) for repair in repairs]  # before any() stops at one
        return any(more)

    def _run(self, repair: Callable[[], bool]) -> bool:
        self._go_on()
        self._repaired = 0
        try:
            more = repair()
            if self._repaired:
                log.info("repaired", extra={"repair": repair.__name__, "count": self._repaired})
            return more
        except AWAY as error:
            log.warning("%s: the database is away (%s)", repair.__name__, type(error).__name__)
        except Exception:
            # One repair that fails must not keep the others from being made.
            log.exception("%s failed", repair.__name__)
        return False

    def _go_on(self) -> None:
        """Between two repairs, and between two jobs of one: a round may take long, and the sweep is there meanwhile."""
        self.turns += 1
        if self._present is None or self._clock() - self._shown_at < self.SHOWN_SECONDS:
            return
        self._shown_at = self._clock()
        try:
            with self._database.write() as tx:
                self._present(tx)
        except AWAY as error:
            log.warning("the sweep can't show itself, the database is away (%s)", type(error).__name__)

    def rescue_lapsed(self) -> bool:
        """Jobs whose worker stopped renewing: their picture if one was stored, else back into the queue."""
        lapsed = (
            select(table.c.id, table.c.fence, table.c.attempts, table.c.lease_until, table.c.request_id)
            .where(is_status(Status.running), table.c.lease_until < now())
            .order_by(table.c.lease_until)
            .limit(10 * self.LIMIT)
        )
        self._lapsed_jobs.rescue(lambda: self._read(lapsed), self._rescue)
        return False  # more than the limit: they are seen in the next round, and rescued after the same pause

    def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        with self._database.read() as connection:
            return connection.execute(query).all()

    def _rescue(self, row: Row[Any]) -> None:
        self._go_on()
        job_id, fence, attempt = row.id, row.fence, row.attempts
        stored = self._images.of_job(job_id)
        its = {"job_id": job_id, "attempt": attempt, "request_id": row.request_id}
        with logs.about(**its), self._database.write() as tx:
            # Its worker died between storing the picture and saying so: it is paid for, and as good as any.
            for image in stored:
                if jobs.adopt(tx, image):
                    self._repaired += 1
                    jobs.close_attempt(tx, job_id, image.attempt, Outcome.succeeded, Billed.yes)
                    log.info("its stored picture adopted")
            status = jobs.rescue(tx, job_id, fence, max_crashes=self._max_crashes)
            if status is not None:
                jobs.close_attempt(tx, job_id, attempt, Outcome.unknown, Billed.unknown)
                self._repaired += 1
                log.info("its worker is gone, now %s", status)

    def expire_too_old(self) -> bool:
        """Jobs that waited longer than they may. Two questions, so that each finds its index."""
        too_long = self._each_queued(table.c.queue_until, _expire)
        return self._each_queued(table.c.deadline_at, _expire, NEVER_TRIED) or too_long

    def reroute(self) -> bool:
        """Jobs of `auto` that wait for a backend which fails, or which nobody works for, while another is well."""
        if self._rerouting is None:
            return False
        moved, more = self._rerouting.round(self._go_on)
        self._repaired += moved
        return more

    def ready_what_is_due(self) -> bool:
        """Jobs whose pause is over."""
        return self._each_queued(table.c.ready_at, jobs.make_ready, ~table.c.ready)

    def _each_queued(
        self, due: ColumnElement[datetime | None], repair: Callable[..., object], *conditions: ColumnElement[bool]
    ) -> bool:
        """Repair the queued jobs whose time, in column `due`, has come. `due` has a partial index over queued jobs."""
        rows = self._read(queued_and_due(due, *conditions).limit(self.LIMIT))
        for row in rows:
            self._go_on()
            with logs.about(job_id=row.id, request_id=row.request_id), self._database.write() as tx:
                self._repaired += bool(repair(tx, row.id))
        return len(rows) == self.LIMIT

    def close_abandoned_attempts(self) -> bool:
        """Attempts that nobody closed although their time is long over: whether they were paid stays unknown."""
        query = (
            select(attempts.c.job_id, attempts.c.number, table.c.request_id)
            .join(table, table.c.id == attempts.c.job_id)
            .where(ATTEMPT_RUNS, attempts.c.deadline_at < now(-self.ABANDONED_SECONDS))
            .limit(self.LIMIT)
        )
        rows = self._read(query)
        for row in rows:
            with self._database.write() as tx:
                closed = jobs.close_attempt(tx, row.job_id, row.number, Outcome.unknown, Billed.unknown)
            self._repaired += closed
            if closed:
                its = {"job_id": row.job_id, "attempt": row.number, "request_id": row.request_id}
                log.info("its attempt, which nobody closed, is unknown", extra=its)
        return len(rows) == self.LIMIT

    def forget_unpointed_images(self) -> bool:
        """A slow walk over all pictures: one whose job has ended and does not point at it is removed."""
        page = self._images.page(self._walked_to, self.LIMIT)
        self._walked_to = page[-1] if len(page) == self.LIMIT else ("", 0)
        if page:
            what = table.c.id, table.c.image_attempt, table.c.status, table.c.request_id
            ended = select(*what).where(table.c.id.in_({job_id for job_id, _ in page}))
            found = {row.id: row for row in self._read(ended)}
            for job_id, attempt in page:
                job = found.get(job_id)
                if job is None or (job.status in TERMINAL and job.image_attempt != attempt):
                    self._images.remove(job_id, attempt)
                    self._repaired += 1
                    its = {"job_id": job_id, "attempt": attempt, "request_id": job and job.request_id}
                    log.info("its picture, which nothing points at, removed", extra=its)
        return False  # no hurry

    def forget_old_keys(self) -> bool:
        """Idempotency keys whose time is over. A key that comes again is judged by its age, not by its being there."""
        old = keys.c.created_at < now(-KEYS_KEPT_SECONDS)
        some = select(keys.c.project_id, keys.c.key).where(old).order_by(keys.c.created_at).limit(self.LIMIT)
        rows = self._read(some)
        if rows:
            place = tuple_(keys.c.project_id, keys.c.key)
            with self._database.write() as tx:
                self._repaired += tx.execute(delete(keys).where(place.in_([tuple(row) for row in rows]), old)).rowcount
        return len(rows) == self.LIMIT

    def forget_dead_workers(self) -> bool:
        """Workers that never said goodbye."""
        with self._database.write() as tx:
            self._repaired += presence.forget_the_dead(tx)
        return False

    def number_events(self) -> bool:
        """Events get their numbers and lead to deliveries, if nobody did it at once (see `main`)."""
        return self._feed.round() >= AT_MOST

    def tally(self) -> bool:
        """What /metrics shows of attempts and deliveries; of jobs, whoever numbers their events tallies."""
        return tallying.fold(self._database)

    def rescue_deliveries(self) -> bool:
        """Deliveries whose sender died: they are due again, with the same id."""
        lapsed = (
            select(sent, table.c.id.label("job_id"), table.c.request_id)
            .outerjoin(table, table.c.id == sent.c.subject_id)
            .where(SENDING, sent.c.lease_until < now())
            .limit(10 * self.LIMIT)
        )
        self._lapsed_deliveries.rescue(lambda: self._read(lapsed), self._rescue_delivery)
        return False

    def _rescue_delivery(self, row: Row[Any]) -> None:
        self._go_on()
        with self._database.write() as tx:
            if deliveries.rescue(tx, row):
                self._repaired += 1
                its = {"event_id": row.event_id, "job_id": row.job_id, "request_id": row.request_id}
                log.info("its sender is gone, it is due again", extra={"delivery_id": row.id, **its})

    def ring_for_deliveries(self) -> bool:
        """Some tickets for what is due now: what was put off, and what a lost ticket did not tell of."""
        with self._database.read() as connection:
            due = receivers.count_due(connection, at_most=tickets.ENOUGH)
        if due:
            self._bell.ring(tickets.DELIVERIES, due)
        return False

    def ring(self) -> bool:
        """Some tickets for the jobs that can be claimed: a lost one, or an emptied Redis, is made up for."""
        for backend in self._backends:
            some = select(table.c.id).where(table.c.backend == backend, CLAIMABLE).limit(tickets.ENOUGH).subquery()
            with self._database.read() as connection:
                waiting = connection.scalar(select(func.count()).select_from(some)) or 0
            if waiting:
                self._bell.ring(backend, waiting)
        return False

    def watch_breakers(self) -> bool:
        """No repair: say once which backend gets no jobs, and why, and when it gets them again."""
        if self._breaker_log is not None:
            self._breaker_log.look()
        return False


def main() -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each look at where the database stands
    try:
        wanted = settings.load()
    except settings.SettingsError as error:
        sys.exit(f"darkroom sweep can't start:\n{error}")
    logs.configure(wanted.log_format, "worker-sweep")
    logs.hide(wanted.secrets)
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = Database(wanted.database_url, connections=2)
    database.patient = True
    place = guards.Place(wanted, database, client(wanted))
    guards.wait_for_database(place, log.warning, stop.wait)
    refusals, warnings = ([], []) if stop.is_set() else guards.at_start(place, guards.SWEEP)
    for line in warnings:
        log.warning(line)
    if refusals:
        sys.exit("\n".join(["darkroom sweep can't start:", *refusals]))
    announcer = Announcer(client(wanted))
    database.after_commit = announcer.tell
    bell = tickets.Bell(tickets.broker(wanted))
    feed = Feed(database, lambda planned: bell.ring(tickets.DELIVERIES, planned))
    images = open_image_store(wanted.image_store, database)
    name = presence.own_name()
    breakers = BreakerBoard(client(wanted))
    rerouting = Rerouting(
        database,
        wanted.backends,
        breakers,
        prices=wanted.prices,
        is_sandbox=wanted.is_sandbox,
        lease_seconds=wanted.lease_seconds,
        clock=time.monotonic,
    )
    sweep = Sweep(
        database,
        images,
        bell,
        wanted.backends,
        feed,
        max_crashes=wanted.max_crashes,
        present=lambda tx: presence.show(tx, name, SWEEP, 0, None),
        breakers=breakers,
        rerouting=rerouting,
        stopping=stop,
    )
    watchdog = Watchdog(turns=lambda: sweep.turns, stopping=stop)
    clerk = FeedClerk(feed, lambda heard: Listener(client(wanted), heard))
    clerk.start()
    watchdog.start()
    log.info("sweeping every second")
    pause = 0.0
    while not stop.wait(pause):
        pause = 0.0 if sweep.round() else 1.0
    watchdog.close()
    clerk.close()
    with suppress(*AWAY), database.write() as tx:
        presence.leave(tx, name)


if __name__ == "__main__":
    main()
