"""Jobs of `auto` that wait for the wrong backend are moved on to another one that is well (shared/routing.py).

Wrong is one whose breaker is open, or that has had no worker for as long as a lease; and one that has just failed the
job, while another has not: the next attempt is made there, and not after the pause. Nothing that runs is touched, and
what has ended (`rejected`, `unsafe`) never waits again, so no verdict is asked for twice.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Row, Select, literal, select, tuple_

from shared import jobs, load, routing
from shared.breaker import BreakerBoard, Standing, State
from shared.database import Database
from shared.load import Present
from shared.routing import AUTO, Candidate, Choice, RoutingReason
from shared.standing import CLAIMABLE, is_status
from shared.tables import Outcome, Status, attempts
from shared.tables import jobs as table

log = logging.getLogger(__name__)

#: Jobs that are looked at in a round, of each part of the queue; and moved.
PAGE, LIMIT = 1000, 200
#: Who has gone through more than a page, and found that most of them are not to be moved, rests before he begins anew.
REST_SECONDS = 10.0
#: A job that was routed so often stays where it is: backends that come and go don't toss it about for ever.
MOST_ROUTED = 8
#: Beyond so many that wait it makes no difference how many more there are.
MOST_COUNTED = 10_000


class Walk:
    """Through a part of the queue, a page a round, to its end and then again: jobs that named their backend stand there
    too, and there may be a million of them."""

    def __init__(self, *conditions: ColumnElement[bool], order: Sequence[Column[Any]], clock: Callable[[], float]):
        self._conditions = conditions
        self._order = order
        self._clock = clock
        self._at: tuple[Any, ...] | None = None
        self._rest_until = -math.inf

    def query(self, after: tuple[Any, ...] | None) -> Select[Any]:
        """A page, in the order of an index, or none is used."""
        what = table.c.id, table.c.backend_asked, *(column.label(f"order{n}") for n, column in enumerate(self._order))
        page = select(*what).where(*self._conditions).order_by(*self._order).limit(PAGE)
        if after is None:
            return page
        place = [literal(value, column.type) for value, column in zip(after, self._order, strict=True)]
        return page.where(tuple_(*self._order) > tuple_(*place))

    def go_on(self, connection: Connection) -> tuple[list[str], bool]:
        """The ids of the next jobs of `auto`, no more than LIMIT; and whether there is more to look at."""
        if self._clock() < self._rest_until:
            return [], False
        found: list[str] = []
        began = self._at is None
        rows = connection.execute(self.query(self._at)).all()
        for row in rows:
            self._at = tuple(row)[2:]
            if row.backend_asked == AUTO:
                found.append(row.id)
            if len(found) == LIMIT:
                return found, True
        if len(rows) == PAGE:
            return found, True
        self._at = None
        if not began:
            self._rest_until = self._clock() + REST_SECONDS
        return found, False


@dataclass(frozen=True)
class Scene:
    """What is known in a round, by backend. `wrong`: those that no job of `auto` should wait for, and why."""

    standings: Mapping[str, Standing | None]
    there: Mapping[str, Present]
    waiting: Mapping[str, int]
    wrong: Mapping[str, RoutingReason]


class Rerouting:
    """One of the sweep's repairs, where there is more than one backend."""

    def __init__(
        self,
        database: Database,
        backends: Sequence[str],
        breakers: BreakerBoard,
        *,
        prices: Mapping[str, Decimal],
        is_sandbox: Callable[[str], bool],
        lease_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._backends = backends
        self._breakers = breakers
        self._prices = prices
        self._is_sandbox = is_sandbox
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._without_worker: dict[str, float] = {}  # since when, by our clock
        in_line = table.c.rank, table.c.id
        self._ready = {
            backend: Walk(table.c.backend == backend, CLAIMABLE, order=in_line, clock=clock) for backend in backends
        }
        pause = is_status(Status.queued), ~table.c.ready, table.c.ready_at.is_not(None)
        self._backing_off = Walk(*pause, order=(table.c.ready_at, table.c.id), clock=clock)

    def round(self, go_on: Callable[[], None]) -> tuple[int, bool]:
        """Returns how many jobs were moved, and whether there is more to look at. `go_on`: called before each."""
        if len(self._backends) < 2:
            return 0, False
        standings = self._breakers.read(self._backends)
        with self._database.read() as connection:
            there = {backend: load.present(connection, backend, self._lease_seconds) for backend in self._backends}
            wrong = self._wrong(standings, there)
            if len(wrong) == len(self._backends):
                return 0, False
            pages = [self._ready[backend].go_on(connection) for backend in wrong]
            pages.append(self._backing_off.go_on(connection))
            ids = [job_id for page, _ in pages for job_id in page]
            more = any(more for _, more in pages)
            if not ids:
                return 0, more
            waiting = {name: load.queued(connection, name, MOST_COUNTED) for name in self._backends}
            rows = {row.id: row for row in connection.execute(select(table).where(table.c.id.in_(ids)))}
            failed = _failed(connection, ids)
        scene = Scene(standings, there, waiting, wrong)
        moved: Counter[tuple[str, Choice]] = Counter()
        for job_id in ids:
            job = rows[job_id]
            choice = self._choose(job, failed[job_id], scene)
            if choice is None:
                continue
            go_on()
            if self._move(job, choice):
                waiting[choice.backend] += 1  # so that one job alone goes to a backend that is to be tried
                moved[job.backend, choice] += 1
        for (source, choice), count in moved.items():
            what = {"from": source, "to": choice.backend, "why": choice.reason, "count": count}
            log.info("jobs moved on", extra=what)
        return moved.total(), more

    def _wrong(
        self, standings: Mapping[str, Standing | None], there: Mapping[str, Present]
    ) -> dict[str, RoutingReason]:
        """Those whose breaker is open, and those without a worker for long."""
        wrong = {}
        for backend in self._backends:
            standing, now = standings[backend], self._clock()
            since = self._without_worker.setdefault(backend, now)
            if there[backend].workers:
                del self._without_worker[backend]
            elif now - since >= self._lease_seconds:  # not at once: it may just be started anew
                wrong[backend] = RoutingReason.no_worker
            if standing is not None and standing.state == State.open:
                wrong[backend] = RoutingReason.breaker_open
        return wrong

    def _choose(self, job: Row[Any], failed: set[str], scene: Scene) -> Choice | None:
        """Where the job should wait, and why not where it does; None: it should stay."""
        if len(job.routing or ()) >= MOST_ROUTED:
            return None
        others = [
            routing.candidate(
                name, job.model, self._prices, scene.standings[name], scene.there[name], scene.waiting[name]
            )
            for name in routing.able(self._backends, job.model, job.input)
            if name != job.backend
        ]
        well = [other for other in others if other.trouble is None]
        untried = [other for other in well if other.backend not in failed]
        if untried and not job.ready:
            return _of(untried, RoutingReason.failed_elsewhere)
        if job.backend in scene.wrong:
            return _of(untried or well, scene.wrong[job.backend])
        return None

    def _move(self, job: Row[Any], choice: Choice) -> bool:
        with self._database.write() as tx:
            moved = jobs.reroute(
                tx,
                job.id,
                source=job.backend,
                target=choice.backend,
                reason=choice.reason,
                sandbox=self._is_sandbox(choice.backend),
            )
        if moved:
            way = {"from": job.backend, "to": choice.backend, "why": choice.reason}
            log.info("moved on", extra={"job_id": job.id, "request_id": job.request_id, **way})
        return moved


def _failed(connection: Connection, ids: Iterable[str]) -> Mapping[str, set[str]]:
    """Who has failed these jobs already."""
    query = select(attempts.c.job_id, attempts.c.backend)
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row in connection.execute(query.where(attempts.c.job_id.in_(ids), attempts.c.outcome == Outcome.failed)):
        found[row.job_id].add(row.backend)
    return found


def _of(candidates: Sequence[Candidate], why: RoutingReason) -> Choice | None:
    choice = routing.choose(candidates)
    return None if choice is None else replace(choice, reason=why)
