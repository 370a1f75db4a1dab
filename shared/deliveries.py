"""A delivery's life: one event on its way to one URL. With shared/redelivery.py the only writer of it and of its tries.

    plan -> pending -- claim --> sending -- settle --> delivered | failed
               ^                    |
               '-- settle, rescue --'        redeliver (shared/redelivery.py): one that ended is pending again

Deliveries are claimed like jobs, under a lease and a fence. A try takes 15 s at most, so its lease is long enough from
the start and nobody renews it. Whoever was killed between its POST and its commit is found by the sweep, and the same
event is sent again with the same id: never a new one, and never none. Every verb here takes the lock of the receiver
(shared/receivers.py) before it touches a delivery.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    Connection,
    Float,
    Row,
    Select,
    String,
    bindparam,
    func,
    insert,
    literal,
    select,
    update,
)

from shared import receivers
from shared.database import now
from shared.events import EventType
from shared.ids import new_id
from shared.receivers import PENDING
from shared.tables import DeliveryStatus, Disabled, TryOutcome, deliveries, endpoints, jobs
from shared.tables import delivery_tries as tries
from shared.tables import receivers as receiver_rows

#: Seconds before each try, counted from the one before: more than three days in all. Jitter only adds to them.
PAUSES = (0, 5, 300, 1800, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
MOST_JITTER = 0.1
#: For jitter. Its own: the dice that a process has in common are nobody's to draw from in a thread.
_dice = random.Random()
#: The longest that a receiver's Retry-After may put off the next try.
LONGEST_RETRY_AFTER_SECONDS = 24 * 3600

#: A try takes 15 s at most (worker/posting.py). The rest is for its commit, before its sender counts as dead.
LEASE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A delivery to be made: what happened, and who is told."""

    event: Row[Any]
    url: str
    endpoint_id: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivery in a sender's hands. `probe`: its receiver has not proved itself yet, or fails."""

    delivery_id: str
    fence: int
    number: int
    step: int
    event_id: str
    subject_id: str
    project_id: str
    endpoint_id: str | None
    receiver: str
    url: str
    probe: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a try: the answer's status and the start of its body, or the error that there was instead.

    `retry_after`: seconds, if the receiver asked for them. `gone`: it wants nothing any more. `final`: trying again is
    no use. `blameless`: the receiver had no part in it. `closed`: its endpoint was disabled or removed.
    """

    outcome: TryOutcome
    seconds: float | None = None
    status: int | None = None
    answer: str | None = None
    error: Mapping[str, str] | None = None
    retry_after: float = 0.0
    gone: bool = False
    final: bool = False
    blameless: bool = False
    closed: bool = False


_MAKE = insert(deliveries).values(
    status=DeliveryStatus.pending,
    tries=0,
    step=0,
    is_retry=False,
    scheduled_at=now(),
    due_at=now(),
    fence=0,
    created_at=now(),
)


def plan(tx: Connection, happened: Sequence[Row[Any]]) -> int:
    """Make the deliveries that these events lead to; returns how many. Each event is planned once (worker/feed.py)."""
    told = [event for event in happened if event.type != EventType.endpoint_test]  # made with its delivery
    of_jobs = {event.subject_id for event in told if event.subject_id.startswith("job_")}
    named = select(jobs.c.id, jobs.c.webhook).where(jobs.c.id.in_(of_jobs), jobs.c.webhook.is_not(None))
    webhooks: dict[str, Any] = {row.id: row.webhook for row in tx.execute(named)}
    listening = select(endpoints).where(
        endpoints.c.project_id.in_({event.project_id for event in told}), endpoints.c.disabled_at.is_(None)
    )
    registered = tx.execute(listening.order_by(endpoints.c.id)).all()
    wanted = []
    for event in told:
        webhook = webhooks.get(event.subject_id)
        if webhook is not None and event.type in webhook["events"]:
            wanted.append(Plan(event, webhook["url"], None))
        wanted.extend(
            Plan(event, endpoint.url, endpoint.id)
            for endpoint in registered
            if endpoint.project_id == event.project_id and event.type in endpoint.events
        )
    make(tx, wanted)
    return len(wanted)


def make(tx: Connection, wanted: Sequence[Plan]) -> list[str]:
    """Make these deliveries, due at once; returns their ids. Takes the locks of their receivers."""
    rows, due = [], set()
    for one in wanted:
        receiver, host = receivers.receiver_of(one.event.project_id, one.url, one.endpoint_id)
        due.add((receiver, host))
        row = {
            "id": new_id("dlv"),
            "project_id": one.event.project_id,
            "event_id": one.event.id,
            "subject_id": one.event.subject_id,
            "type": one.event.type,
            "endpoint_id": one.endpoint_id,
            "receiver": receiver,
            "host": host,
            "url": one.url,
        }
        rows.append(row)
    for receiver, host in sorted(due):
        receivers.due_now(tx, receiver, host)
    if rows:
        tx.execute(_MAKE, rows)
    return [str(row["id"]) for row in rows]


def _next(is_retry: bool) -> Select[Any]:
    """First tries go before old retries: two questions, so that each is a range of the index."""
    return (
        select(deliveries.c.id)
        .where(
            deliveries.c.receiver == bindparam("its_receiver"),
            PENDING,
            deliveries.c.is_retry == literal(is_retry, literal_execute=True),
            deliveries.c.due_at <= now(),
        )
        .order_by(deliveries.c.due_at, deliveries.c.id)
        .limit(bindparam("at_most"))
    )


_FIRST_TRIES, _RETRIES = _next(is_retry=False), _next(is_retry=True)
_URL_OF_TODAY = select(endpoints.c.url).where(endpoints.c.id == deliveries.c.endpoint_id).scalar_subquery()
_HOST_OF_TODAY = select(receiver_rows.c.host).where(receiver_rows.c.id == deliveries.c.receiver).scalar_subquery()
_CLAIM = (
    update(deliveries)
    .where(deliveries.c.id == bindparam("its_id"), PENDING)
    .values(
        status=DeliveryStatus.sending,
        url=func.coalesce(_URL_OF_TODAY, deliveries.c.url),
        host=func.coalesce(_HOST_OF_TODAY, deliveries.c.host),
        fence=deliveries.c.fence + 1,
        tries=deliveries.c.tries + 1,
        worker=bindparam("by_worker", type_=String),
        lease_until=now(LEASE_SECONDS),
    )
    .returning(deliveries)
)
_BEGIN_TRY = insert(tries).values(started_at=now(), outcome=TryOutcome.running)


def claim(tx: Connection, worker: str, *, limit: int, probes: int) -> list[Claim]:
    """Take what is due, under a lease, at most `probes` of it to receivers that fail or have not proved themselves.

    Who hangs can't be told from who will: so all of them share a part of the senders, and the rest is always there for
    those who answer. Several processes that claim at once may exceed a host's limit by a few.
    """
    claims: list[Claim] = []
    on_host: Counter[str] = Counter()
    for receiver in receivers.whose_turn(tx, limit=limit, probes=probes > 0):
        room = min(receiver.room, receiver.room_on_host - on_host[receiver.host], limit - len(claims))
        if receiver.probe:
            room = min(room, probes - sum(claim.probe for claim in claims))
        if room <= 0:
            continue
        its = {"its_receiver": receiver.id}
        ids = list(tx.scalars(_FIRST_TRIES, {**its, "at_most": room}))
        if len(ids) < room:
            ids += tx.scalars(_RETRIES, {**its, "at_most": room - len(ids)})
        taken = [_claim(tx, delivery_id, worker, bool(receiver.probe)) for delivery_id in ids]
        claims += [claim for claim in taken if claim is not None]
        on_host[receiver.host] += len(taken)
        receivers.find_next_due(tx, receiver.id)
    return claims


def _claim(tx: Connection, delivery_id: str, worker: str, probe: bool) -> Claim | None:
    row = tx.execute(_CLAIM, {"its_id": delivery_id, "by_worker": worker}).one_or_none()
    if row is None:
        return None  # a sender that was taken for dead has delivered it in this moment
    tx.execute(_BEGIN_TRY, {"delivery_id": row.id, "number": row.tries})
    return Claim(
        delivery_id=row.id,
        fence=row.fence,
        number=row.tries,
        step=row.step,
        event_id=row.event_id,
        subject_id=row.subject_id,
        project_id=row.project_id,
        endpoint_id=row.endpoint_id,
        receiver=row.receiver,
        url=row.url,
        probe=probe,
    )


def _settled(*allowed: DeliveryStatus, **changes: Any) -> Any:
    return (
        update(deliveries)
        .where(
            deliveries.c.id == bindparam("its_id"),
            deliveries.c.fence == bindparam("its_fence"),
            deliveries.c.status.in_(allowed),
        )
        .values(worker=None, lease_until=None, **changes)
        .returning(deliveries.c.id)
    )


# Also when its sender was taken for dead: the receiver is spared a second one.
_DELIVERED = _settled(
    DeliveryStatus.sending, DeliveryStatus.pending, status=DeliveryStatus.delivered, completed_at=now()
)
_FAILED = _settled(DeliveryStatus.sending, status=DeliveryStatus.failed, completed_at=now())
_PUT_OFF = _settled(
    DeliveryStatus.sending,
    status=DeliveryStatus.pending,
    step=bindparam("to_step"),
    is_retry=True,
    due_at=now(bindparam("after_seconds", type_=Float)),
)
_CLOSE_TRY = (
    update(tries)
    .where(
        tries.c.delivery_id == bindparam("its_id"),
        tries.c.number == bindparam("its_number"),
        tries.c.outcome.in_((TryOutcome.running, TryOutcome.unknown)),
    )
    .values(
        outcome=bindparam("how"),
        seconds=bindparam("its_seconds"),
        status=bindparam("its_status"),
        answer=bindparam("its_answer"),
        error=bindparam("its_error"),
    )
)


#: Its lock is held until the try is written down: a removal (shared/jobs.py) comes before, and is seen here, or after,
#: and finds the answer. Claims and moves of the job don't wait for it.
_IS_REMOVED = (
    select(jobs.c.data_removed).where(jobs.c.id == bindparam("its_id")).with_for_update(read=True, key_share=True)
)
_FORGET_ANSWERS = (
    update(tries)
    .where(tries.c.delivery_id.in_(select(deliveries.c.id).where(deliveries.c.subject_id == bindparam("its_subject"))))
    .values(answer=None)
)


def forget_answers(tx: Connection, subject_id: str) -> None:
    """What its receivers answered: some repeat what they were sent."""
    tx.execute(_FORGET_ANSWERS, {"its_subject": subject_id})


def settle(tx: Connection, claim: Claim, result: Result) -> Disabled | None:
    """Write down how a try ended, and what becomes of its delivery, unless somebody else decided about that meanwhile.

    Returns why its endpoint is to be disabled now (shared/endpoints.py), if it is.
    """
    its = {"its_id": claim.delivery_id, "its_fence": claim.fence}
    fails_for_days = False
    if result.outcome == TryOutcome.delivered:
        receivers.greet(tx, claim.receiver)
        tx.execute(_DELIVERED, its)
    else:
        receivers.lock(tx, claim.receiver)
        moved = not result.blameless and _has_moved(tx, claim)
        if moved:  # it says nothing of the new URL, which gets this try now
            result = replace(result, gone=False, final=False, blameless=True)
        if not result.blameless:
            fails_for_days = receivers.blame(tx, claim.receiver, result.retry_after)
        step = claim.step if moved else claim.step + 1
        if result.gone or result.final or step >= len(PAUSES):
            tx.execute(_FAILED, its)
        else:
            pause = max(_pause_before(step), min(result.retry_after, LONGEST_RETRY_AFTER_SECONDS))
            tx.execute(_PUT_OFF, {**its, "to_step": step, "after_seconds": 0.0 if moved else pause})
            receivers.find_next_due(tx, claim.receiver)
    if result.answer and tx.scalar(_IS_REMOVED, {"its_id": claim.subject_id}):
        result = replace(result, answer=None)
    _close_try(tx, claim.delivery_id, claim.number, result)
    if claim.endpoint_id is None:
        return None
    return Disabled.gone if result.gone else Disabled.failing if fails_for_days else None


def _has_moved(tx: Connection, claim: Claim) -> bool:
    """Whether its endpoint was given another URL since it was claimed. Its receiver's lock is held."""
    url = tx.scalar(select(endpoints.c.url).where(endpoints.c.id == claim.endpoint_id))
    return url is not None and url != claim.url


def _close_try(tx: Connection, delivery_id: str, number: int, result: Result) -> None:
    how = {"how": result.outcome, "its_seconds": result.seconds, "its_status": result.status}
    what = {"its_answer": result.answer, "its_error": result.error}
    tx.execute(_CLOSE_TRY, {"its_id": delivery_id, "its_number": number, **how, **what})


def _pause_before(step: int) -> float:
    return PAUSES[step] * (1 + _dice.uniform(0, MOST_JITTER))


def rescue(tx: Connection, row: Row[Any]) -> bool:
    """Its sender's lease ran out: it is due again after the next pause. `row`: id, fence, tries, step and receiver.

    What was sent is not known. Not even the last try ends it then: an event is told at least once.
    """
    receivers.lock(tx, row.receiver)
    step = min(row.step + 1, len(PAUSES) - 1)
    its = {"its_id": row.id, "its_fence": row.fence, "to_step": step, "after_seconds": _pause_before(step)}
    if tx.execute(_PUT_OFF, its).one_or_none() is None:
        return False
    receivers.find_next_due(tx, row.receiver)
    _close_try(tx, row.id, row.tries, Result(TryOutcome.unknown))
    return True
