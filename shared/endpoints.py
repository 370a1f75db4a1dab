"""Endpoints: the URLs that a project registered to be told of its events. The only writer of their rows.

Who changes one holds it first (`hold`): the lock of its receiver, then its row.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, func, insert, select, update

from shared import deliveries, receivers, redelivery, webhook_secrets
from shared.database import now
from shared.deliveries import Plan
from shared.events import EventType
from shared.ids import new_id
from shared.job_object import rfc3339
from shared.tables import Disabled, endpoints, events
from shared.tables import deliveries as told
from shared.webhook_secrets import Vault

#: Of one project.
MOST_ENDPOINTS = 50

#: Deliveries that one call of `redeliver_since` makes due.
MOST_REDELIVERED = 1000

#: Ids begin with the clock of the machine that made them; so much it may differ from the database's.
_CLOCKS_DIFFER = timedelta(days=1)


class TooMany(Exception):
    """The project has as many endpoints as it may have."""


def register(
    tx: Connection, vault: Vault, *, project_id: str, url: str, description: str, events: Sequence[str]
) -> tuple[Row[Any], str]:
    """Make an endpoint; returns its row and its secret, which is not shown again. Raises TooMany."""
    webhook_secrets.hold_project(tx, project_id)
    count = tx.scalar(select(func.count()).where(endpoints.c.project_id == project_id)) or 0
    if count >= MOST_ENDPOINTS:
        raise TooMany
    row = tx.execute(
        insert(endpoints)
        .values(
            id=new_id("end"),
            project_id=project_id,
            url=url,
            description=description,
            events=list(events),
            sequence=0,
            created_at=now(),
        )
        .returning(endpoints)
    ).one()
    # There from the start, so that its lock can always be taken.
    receiver, host = receivers.receiver_of(project_id, url, row.id)
    receivers.due_now(tx, receiver, host)
    receivers.find_next_due(tx, receiver)
    return row, webhook_secrets.rotate(tx, vault, row.id)


def hold_to_change(tx: Connection, project_id: str, endpoint_id: str) -> Row[Any] | None:
    """As `hold`, between two rounds of the feed: what one of them planned for the endpoint as it was is there to see.

    Else an event could be planned while it is still disabled, and come to light after `redeliver_since` has looked.
    """
    webhook_secrets.hold_project(tx, project_id)
    return hold(tx, project_id, endpoint_id)


def hold(tx: Connection, project_id: str, endpoint_id: str) -> Row[Any] | None:
    """A project's endpoint as it stands now, locked. None: it has no such endpoint."""
    its = select(endpoints).where(endpoints.c.id == endpoint_id, endpoints.c.project_id == project_id)
    if tx.execute(its).one_or_none() is None:
        return None  # nobody waits for a lock of another project's
    receivers.lock(tx, endpoint_id)
    return tx.execute(its.with_for_update()).one_or_none()


def change(tx: Connection, endpoint_id: str, **changes: Any) -> Row[Any]:
    """Another URL, description or choice of events. What waits for it goes to its new URL. It is held."""
    row = tx.execute(
        update(endpoints).where(endpoints.c.id == endpoint_id).values(**changes).returning(endpoints)
    ).one()
    if "url" in changes:
        receivers.move(tx, *receivers.receiver_of(row.project_id, row.url, row.id))
        redelivery.readdress_pending(tx, row)
    return row


def disable(tx: Connection, endpoint_id: str, reason: Disabled) -> None:
    """Tell it nothing any more. What waits for it has failed; the others of its project are told."""
    redelivery.drop(tx, endpoint_id)  # first: it takes the receiver's lock, as everybody does who comes here
    disabled = (
        update(endpoints)
        .where(endpoints.c.id == endpoint_id, endpoints.c.disabled_at.is_(None))
        .values(disabled_at=now(), disabled_reason=reason)
        .returning(endpoints)
    )
    row = tx.execute(disabled).one_or_none()
    if row is not None:
        _record(tx, row, EventType.endpoint_disabled)


def drop_more(tx: Connection, endpoint_id: str) -> None:
    """Some more of what waited for an endpoint that is disabled or removed, if it still is. Its receiver is locked."""
    is_open = select(endpoints.c.id).where(endpoints.c.id == endpoint_id, endpoints.c.disabled_at.is_(None))
    if tx.execute(is_open).one_or_none() is None:
        redelivery.drop(tx, endpoint_id)


def enable(tx: Connection, endpoint_id: str) -> Row[Any]:
    """Tell it again, of what happens from now on. Its past failures are forgotten. It is held."""
    receivers.pardon(tx, endpoint_id)
    return change(tx, endpoint_id, disabled_at=None, disabled_reason=None)


def remove(tx: Connection, endpoint_id: str) -> None:
    """Forget it and its secrets. What was sent to it stays written down."""
    redelivery.drop(tx, endpoint_id)
    tx.execute(delete(endpoints).where(endpoints.c.id == endpoint_id))  # before its secrets, as who replaces one does
    webhook_secrets.forget(tx, endpoint_id)


def send_test(tx: Connection, endpoint: Row[Any]) -> str:
    """Make an event for this endpoint alone, and its delivery, whose id is returned."""
    receivers.lock(tx, endpoint.id)
    event = _record(tx, endpoint, EventType.endpoint_test)
    return deliveries.make(tx, [Plan(event, endpoint.url, endpoint.id)])[0]


def redeliver_since(tx: Connection, endpoint: Row[Any], since: datetime) -> tuple[int, bool]:
    """Send again what failed since then, and send what it was not told of: all that happened while it was disabled.

    Nothing from before it was there, MOST_REDELIVERED at most, and only what was planned already: the rest will be.
    Returns how many, and whether there is more. It is held.
    """
    since = max(since, endpoint.created_at)
    again, has_more = redelivery.redeliver_failed(tx, endpoint, since, MOST_REDELIVERED)
    room = MOST_REDELIVERED - again
    earliest_id = f"evt_{int((since - _CLOCKS_DIFFER).timestamp() * 1000):012x}"
    was_told = exists().where(
        told.c.subject_id == events.c.subject_id, told.c.event_id == events.c.id, told.c.endpoint_id == endpoint.id
    )
    missed = select(events).where(
        events.c.id >= earliest_id,
        events.c.project_id == endpoint.project_id,
        events.c.number.is_not(None),
        events.c.created_at >= since,
        events.c.type.in_(endpoint.events),
        ~was_told,
    )
    rows = tx.execute(missed.order_by(events.c.id).limit(room + 1)).all()
    deliveries.make(tx, [Plan(event, endpoint.url, endpoint.id) for event in rows[:room]])
    return again + len(rows[:room]), has_more or len(rows) > room


def as_stored(row: Row[Any]) -> dict[str, Any]:
    """An endpoint as its own events tell of it."""
    return {
        "id": row.id,
        "object": "endpoint",
        "url": row.url,
        "description": row.description,
        "events": row.events,
        "disabled": row.disabled_at is not None,
        "disabled_reason": row.disabled_reason,
        "disabled_at": None if row.disabled_at is None else rfc3339(row.disabled_at),
        "created_at": rfc3339(row.created_at),
    }


def _record(tx: Connection, endpoint: Row[Any], type: EventType) -> Row[Any]:
    counted = update(endpoints).where(endpoints.c.id == endpoint.id).values(sequence=endpoints.c.sequence + 1)
    sequence = tx.execute(counted.returning(endpoints.c.sequence)).scalar_one()
    tx.info["moved"].append(endpoint.id)
    return tx.execute(
        insert(events)
        .values(
            id=new_id("evt"),
            subject_id=endpoint.id,
            project_id=endpoint.project_id,
            sequence=sequence,
            type=type,
            data=as_stored(endpoint),
            created_at=now(),
        )
        .returning(events)
    ).one()
