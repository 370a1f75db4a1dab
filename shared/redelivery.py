"""Deliveries on somebody's wish: sent again, sent elsewhere, or not at all.

The project asks for it, or its endpoint was changed, closed or removed. As in shared/deliveries.py, every verb takes
the lock of the receiver before it touches a delivery.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, bindparam, select, update

from shared import receivers
from shared.database import now
from shared.receivers import PENDING
from shared.tables import DeliveryStatus, deliveries

#: Of what waits for one receiver, so much is changed in one transaction: whoever plans events waits for its lock.
MOST_AT_ONCE = 2000

#: Its schedule begins anew.
_ANEW: dict[str, Any] = {
    "status": DeliveryStatus.pending,
    "step": 0,
    "is_retry": False,
    "scheduled_at": now(),
    "due_at": now(),
    "completed_at": None,
}
_REDELIVER = (
    update(deliveries)
    .where(deliveries.c.id == bindparam("its_id"), deliveries.c.status != DeliveryStatus.sending)
    .values(_ANEW)
    .returning(deliveries.c.id)
)


def redeliver(tx: Connection, row: Row[Any]) -> bool:
    """Send it again, or now if it waits, with a schedule that begins anew: the same event, and so the same id.

    False: it is being sent in this moment.
    """
    receivers.due_now(tx, row.receiver, row.host)
    if tx.execute(_REDELIVER, {"its_id": row.id}).one_or_none() is None:
        receivers.find_next_due(tx, row.receiver)
        return False
    return True


def drop(tx: Connection, receiver: str) -> None:
    """Nothing goes to this receiver any more: what waits for it has failed, MOST_AT_ONCE of it now.

    Of the rest a sender finds out by the next that is due (worker/sender.py), and drops so many more.
    """
    receivers.lock(tx, receiver)
    ended = update(deliveries).where(deliveries.c.id.in_(_some_pending(receiver)), PENDING)
    tx.execute(ended.values(status=DeliveryStatus.failed, completed_at=now()))
    receivers.find_next_due(tx, receiver)


def _some_pending(receiver: str) -> Select[Any]:
    its = select(deliveries.c.id).where(deliveries.c.receiver == receiver, PENDING)
    return its.order_by(deliveries.c.is_retry, deliveries.c.due_at, deliveries.c.id).limit(MOST_AT_ONCE)


def readdress_pending(tx: Connection, endpoint: Row[Any]) -> None:
    """What waits for an endpoint is shown with its URL of today, MOST_AT_ONCE of it: all goes there (`claim`)."""
    readdress(tx, endpoint, deliveries.c.id.in_(_some_pending(endpoint.id)), PENDING)


def readdress(tx: Connection, endpoint: Row[Any], *which: ColumnElement[bool]) -> None:
    """These of an endpoint's deliveries go to its URL of today. Its receiver's lock is held."""
    _, host = receivers.receiver_of(endpoint.project_id, endpoint.url, endpoint.id)
    its = update(deliveries).where(deliveries.c.endpoint_id == endpoint.id, *which)
    tx.execute(its.values(url=endpoint.url, host=host))


def redeliver_failed(tx: Connection, endpoint: Row[Any], since: datetime, at_most: int) -> tuple[int, bool]:
    """Send what failed since then again, to its URL of today; returns how many, and whether there is more."""
    receiver, host = receivers.receiver_of(endpoint.project_id, endpoint.url, endpoint.id)
    receivers.due_now(tx, receiver, host)
    its = (deliveries.c.endpoint_id == endpoint.id, deliveries.c.created_at >= since)
    failed = select(deliveries.c.id).where(*its, deliveries.c.status == DeliveryStatus.failed)
    ids = list(tx.scalars(failed.order_by(deliveries.c.id).limit(at_most + 1)))
    again = deliveries.c.id.in_(ids[:at_most])
    readdress(tx, endpoint, again)
    tx.execute(update(deliveries).where(again).values(_ANEW))
    receivers.find_next_due(tx, receiver)
    return len(ids[:at_most]), len(ids) > at_most
