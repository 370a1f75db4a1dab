"""Who receives deliveries, and how many of them at once: one that hangs or fails must cost the others nothing.

A receiver is an endpoint, or the server of the URLs that a project's jobs name. Its row is the lock for its deliveries:
whoever makes one due, claims or ends it holds that row first. Nobody who holds one waits for another, but for the
planning of events, of which there is one at a time.

It begins with a small window, which grows by one with every success and falls to one at a failure; after some failures
in a row it is left alone between two tries. How many are on their way to it is counted from their leases, so that a
crash leaves nothing behind that would have to be counted back.
"""

from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    Float,
    Row,
    Select,
    bindparam,
    case,
    func,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from shared.database import now
from shared.tables import DeliveryStatus, deliveries, receivers

#: How many deliveries may be on their way to one receiver.
FIRST_WINDOW = 2
MOST_WINDOW = 16
#: To all receivers of one host together.
MOST_PER_HOST = 24

#: After so many failures in a row a receiver is left alone between two tries: a second, then twice as long each time.
FAILURES_BEFORE_REST = 3
LONGEST_REST_SECONDS = 30
#: What a Retry-After may make of that rest: it speaks for all that goes there.
LONGEST_ASKED_REST_SECONDS = 600

#: An endpoint that did nothing but fail for so long is disabled.
FAILING_DAYS = 5

PENDING = deliveries.c.status == literal(DeliveryStatus.pending.value, literal_execute=True)
SENDING = deliveries.c.status == literal(DeliveryStatus.sending.value, literal_execute=True)


def receiver_of(project_id: str, url: str, endpoint_id: str | None) -> tuple[str, str]:
    """The receiver's id and host: of an endpoint, or of a project's jobs at the server of this URL."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")[:255]  # with or without the root's dot, it is one host
    return endpoint_id or f"{project_id} {parts.scheme}://{host}:{parts.port or ''}", host


def _on_their_way(same: Any) -> ColumnElement[int]:
    """How many deliveries are being sent there now. A lease that ran out is a dead sender's."""
    where = (SENDING, deliveries.c.host == receivers.c.host, deliveries.c.lease_until > now(), same)
    return select(func.count()).select_from(deliveries).where(*where).correlate(receivers).scalar_subquery()


_ROOM = receivers.c.window - _on_their_way(deliveries.c.receiver == receivers.c.id)
_ROOM_ON_HOST = MOST_PER_HOST - _on_their_way(deliveries.c.host == receivers.c.host)
_IS_PROBE = or_(receivers.c.failures > 0, receivers.c.window <= FIRST_WINDOW)
_IS_DUE = receivers.c.next_due_at.is_not(None) & (receivers.c.next_due_at <= now())
_IS_RESTED = or_(receivers.c.rest_until.is_(None), receivers.c.rest_until <= now())
#: Something can be sent there now, as far as its row and its leases tell.
TAKES = (_IS_DUE, _IS_RESTED, _ROOM > 0, _ROOM_ON_HOST > 0)

_ORDER = (receivers.c.failures > 0, receivers.c.next_due_at, receivers.c.id)
#: Whose turn it is: those who take what they get first, then in the order in which it was due.
_NEXT = (
    select(receivers.c.id)
    .where(*TAKES, or_(~_IS_PROBE, bindparam("probes", type_=Boolean)))
    .order_by(*_ORDER)
    .limit(bindparam("at_most"))
    .with_for_update(of=receivers, skip_locked=True, key_share=True)
)
#: Asked once their locks are held: a claim that committed while these were searched may have taken what room there was.
_ROOMS = (
    select(
        receivers.c.id,
        receivers.c.host,
        _IS_PROBE.label("probe"),
        _ROOM.label("room"),
        _ROOM_ON_HOST.label("room_on_host"),
    )
    .where(receivers.c.id.in_(bindparam("locked", expanding=True)), *TAKES)
    .order_by(*_ORDER)
)


def earliest(is_retry: bool) -> Select[Any]:
    """When the next of its first tries, or of its retries, is due: two questions, each one step in the index."""
    return select(func.min(deliveries.c.due_at).label("due_at")).where(
        deliveries.c.receiver == bindparam("its_receiver"),
        PENDING,
        deliveries.c.is_retry == literal(is_retry, literal_execute=True),
    )


_either = union_all(earliest(is_retry=False), earliest(is_retry=True)).subquery()
_FIND_NEXT_DUE = (
    update(receivers)
    .where(receivers.c.id == bindparam("its_receiver"))
    .values(next_due_at=select(func.min(_either.c.due_at)).scalar_subquery())
)
_LOCK = select(receivers.c.failures).where(receivers.c.id == bindparam("its_receiver")).with_for_update(key_share=True)
_DUE_NOW = (
    update(receivers)
    .where(receivers.c.id == bindparam("its_receiver"))
    .values(next_due_at=case((receivers.c.next_due_at <= now(), receivers.c.next_due_at), else_=now()))
)
#: Where nothing would change nothing is locked: a receiver that is well is no bottleneck.
_GREET = (
    update(receivers)
    .where(
        receivers.c.id == bindparam("its_receiver"),
        or_(receivers.c.failures > 0, receivers.c.window < MOST_WINDOW, receivers.c.rest_until.is_not(None)),
    )
    .values(
        window=case((receivers.c.window < MOST_WINDOW, receivers.c.window + 1), else_=MOST_WINDOW),
        failures=0,
        failing_since=None,
        rest_until=None,
    )
)
_BLAME = (
    update(receivers)
    .where(receivers.c.id == bindparam("its_receiver"))
    .values(
        window=1,
        failures=receivers.c.failures + 1,
        failing_since=func.coalesce(receivers.c.failing_since, now()),
        rest_until=now(bindparam("rest_seconds", type_=Float)),
    )
    .returning(receivers.c.failing_since < now(-FAILING_DAYS * 86400))
)


def whose_turn(tx: Connection, *, limit: int, probes: bool) -> list[Row[Any]]:
    """The receivers to whom something may be sent now, locked: (id, host, probe, room, room_on_host).

    `probe`: it has not proved itself yet, or fails. Only with `probes` are there any such.
    """
    locked = list(tx.scalars(_NEXT, {"at_most": limit, "probes": probes}))
    return list(tx.execute(_ROOMS, {"locked": locked})) if locked else []


def count_due(connection: Connection, *, at_most: int) -> int:
    """To how many receivers something may be sent now."""
    some = select(receivers.c.id).where(*TAKES).limit(at_most).subquery()
    return connection.scalar(select(func.count()).select_from(some)) or 0


def lock(tx: Connection, receiver: str) -> int:
    """Take its lock; returns its failures in a row."""
    return tx.execute(_LOCK, {"its_receiver": receiver}).scalar_one_or_none() or 0


def due_now(tx: Connection, receiver: str, host: str) -> None:
    """Something is due now to a receiver, which may be new. Takes its lock."""
    new = {"id": receiver, "host": host, "window": FIRST_WINDOW, "failures": 0}
    insert = sqlite.insert if tx.dialect.name == "sqlite" else postgresql.insert
    tx.execute(insert(receivers).values(**new).on_conflict_do_nothing(index_elements=["id"]))
    tx.execute(_DUE_NOW, {"its_receiver": receiver})


def find_next_due(tx: Connection, receiver: str) -> None:
    """What is due there next has changed. Its lock is held."""
    tx.execute(_FIND_NEXT_DUE, {"its_receiver": receiver})


def greet(tx: Connection, receiver: str) -> None:
    """It took a delivery: it may have one more at once."""
    tx.execute(_GREET, {"its_receiver": receiver})


def blame(tx: Connection, receiver: str, asked_rest: float) -> bool:
    """It did not take a delivery: one at a time from now on, and perhaps a rest. Takes its lock.

    `asked_rest`: seconds, from its Retry-After. Returns whether nothing but failure came from there for FAILING_DAYS.
    """
    failures = lock(tx, receiver) + 1
    rest = min(asked_rest, LONGEST_ASKED_REST_SECONDS)
    if failures >= FAILURES_BEFORE_REST:
        rest = max(rest, min(2.0 ** min(failures - FAILURES_BEFORE_REST, 10), LONGEST_REST_SECONDS))
    return bool(tx.execute(_BLAME, {"its_receiver": receiver, "rest_seconds": rest or None}).scalar())


def pardon(tx: Connection, receiver: str) -> None:
    """Its past failures say nothing any more."""
    fresh = {"window": FIRST_WINDOW, "failures": 0, "failing_since": None, "rest_until": None}
    tx.execute(update(receivers).where(receivers.c.id == receiver).values(**fresh))


def move(tx: Connection, receiver: str, host: str) -> None:
    """It is at another address now, of which nothing is known yet. Takes its lock."""
    tx.execute(update(receivers).where(receivers.c.id == receiver).values(host=host))
    pardon(tx, receiver)
