"""Folds what happened into the tallies (shared/tallies.py): each thing once, whoever dies and however many sweeps run.

What happened to jobs is told by their events, in the transaction that numbers them (worker/feed.py): an event is
numbered once. Attempts, deliveries and their tries carry in `tallied` how they were tallied last: a row where that is
not how it stands now is folded and marked in one transaction, under its lock. So no move knows of tallies.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Row, Table, select, tuple_, update

from shared import tallies
from shared.database import Database
from shared.events import EVENT_OF, REROUTED, EventType
from shared.standing import TERMINAL
from shared.tables import Billed, Outcome, Status, TryOutcome, attempts, deliveries, delivery_tries, jobs
from shared.tallies import Series

#: Rows in one transaction.
AT_MOST = 500

#: How a delivery is marked that was never tallied. It is made as `pending`, which is to be tallied too.
_NEW = "none"

_STATUS_OF = {event: status for status, event in EVENT_OF.items()}


def of_events(tx: Connection, numbered: Sequence[Row[Any]]) -> None:
    """Tally the moves that these events tell of, which are being numbered in this transaction."""
    moves = [event for event in numbered if event.type in _STATUS_OF]
    if not moves:
        return
    times = jobs.c.created_at, jobs.c.started_at, jobs.c.completed_at
    of_them = select(jobs.c.id, jobs.c.backend, jobs.c.routing, *times)
    found = tx.execute(of_them.where(jobs.c.id.in_({event.subject_id for event in moves})))
    rows: dict[str, Any] = {row.id: row for row in found}
    amounts: Counter[Series] = Counter()
    for event in moves:
        amounts.update(_of_move(event, rows[event.subject_id]))
    tallies.add(tx, amounts)


def _of_move(event: Row[Any], job: Any) -> dict[Series, int]:
    """The job's row may have moved on since: only what never changes again is read from it."""
    to, backend = _STATUS_OF[EventType(event.type)], event.data.get("backend", job.backend)
    reroutes = max(event.data.get("routed", 1) - 1, 0)
    if to == Status.queued:
        queued: dict[Series, int] = {("queued", backend): 1}
        if event.data.get("reason") == REROUTED:
            return queued | {("queued", job.routing[reroutes - 1]["backend"]): -1}
        return queued | ({("jobs_submitted",): 1} if event.sequence == 1 else {})
    # But for reroutes, a job is queued by its first move, running or ended by its second, and so on: every even one
    # leaves the queue.
    left: dict[Series, int] = {("queued", backend): -1} if (event.sequence - reroutes) % 2 == 0 else {}
    if to in TERMINAL:
        return left | {("jobs_ended", to): 1} | tallies.took(("time_to_end", to), job.created_at, job.completed_at)
    if event.data["attempts"] == 1:
        return left | tallies.took(("time_to_start", backend), job.created_at, job.started_at)
    return left


def fold(database: Database) -> bool:
    """Tally the attempts, deliveries and tries that changed; returns whether more are left. Locks nothing for none."""
    kinds = (
        (attempts, attempts.c.outcome, attempts.c.completed_at, _of_attempt),
        (deliveries, deliveries.c.status, deliveries.c.id, _of_delivery),
        (delivery_tries, delivery_tries.c.outcome, delivery_tries.c.started_at, _of_try),
    )
    more = [_fold(database, *kind) for kind in kinds]  # each of them, before any() stops at the first
    return any(more)


def changed(of: Table, stands: Column[str], order: ColumnElement[Any]) -> Any:
    """The rows that do not stand as they were tallied, in the order of their partial index, or none is used."""
    return select(of).where(of.c.tallied != stands).order_by(order).limit(AT_MOST)


def _fold(database: Database, of: Table, stands: Column[str], order: ColumnElement[Any], count: Any) -> bool:
    some = changed(of, stands, order)
    with database.read() as connection:
        if connection.execute(some.limit(1)).first() is None:
            return False
    with database.write() as tx:
        # Skipped, not waited for: what somebody else holds is being tallied by another sweep, or changes this moment.
        rows = tx.execute(some.with_for_update(skip_locked=True)).all()
        keys = list(of.primary_key.columns)
        place = tuple_(*keys).in_([tuple(row._mapping[key] for key in keys) for row in rows])
        tx.execute(update(of).where(place).values(tallied=stands))
        amounts: Counter[Series] = Counter()
        for row in rows:
            amounts.update(count(row))
        tallies.add(tx, amounts)
    return len(rows) == AT_MOST


def _of_attempt(row: Row[Any]) -> dict[Series, int]:
    if row.tallied == Outcome.running:
        spent = 0 if row.billed == Billed.no else row.price
        return {
            ("attempts", row.backend, row.outcome): 1,
            ("spend", row.backend): spent,
            ("billed_unknown", row.backend): int(row.billed == Billed.unknown),
        }
    # It was tallied as `unknown`, in full, because its worker counted as dead; now its end is known after all.
    return {
        ("attempts_cleared", row.backend, row.outcome): 1,
        ("spend_taken_back", row.backend): row.price if row.billed == Billed.no else 0,
        ("billed_unknown", row.backend): -int(row.billed != Billed.unknown),
    }


def _of_delivery(row: Row[Any]) -> dict[Series, int]:
    before: dict[Series, int] = {} if row.tallied == _NEW else {("deliveries", row.tallied): -1}
    return before | {("deliveries", row.status): 1}


def _of_try(row: Row[Any]) -> dict[Series, int]:
    name = "tries" if row.tallied == TryOutcome.running else "tries_cleared"
    return {(name, row.outcome): 1}
