"""The statements of a job's life, built once: building one costs more than running it, and most stand on a hot path.

Only shared/jobs.py uses them; what they mean stands there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Integer,
    Row,
    String,
    Update,
    bindparam,
    case,
    exists,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from shared.database import now, now_ms
from shared.events import EVENT_OF
from shared.ids import new_id
from shared.standing import CLAIMABLE, NEVER_TRIED, TERMINAL, is_status, spelt, too_old
from shared.tables import Billed, Outcome, Status, attempts, events, jobs

SUBMIT = (
    insert(jobs)
    .values(
        status=Status.queued,
        sequence=1,
        warnings=[],
        ready=True,
        rank=now_ms(),
        deadline_at=now(bindparam("deadline_seconds", type_=Float)),
        queue_until=now(bindparam("max_wait_seconds", type_=Float)),
        fence=0,
        attempts=0,
        failures=0,
        refusals=0,
        crashes=0,
        created_at=now(),
    )
    .returning(jobs)
)
_RECORD = insert(events).values(created_at=now())


#: What is read of a job that was moved: for its event, and for a claim. Not all of it: reading a row takes longer than
#: writing it.
_MOVED = (
    *(jobs.c.id, jobs.c.project_id, jobs.c.sequence, jobs.c.attempts, jobs.c.error, jobs.c.backend, jobs.c.routing),
    *(jobs.c.fence, jobs.c.model, jobs.c.input, jobs.c.failures, jobs.c.refusals, jobs.c.crashes),
    *(jobs.c.request_id, jobs.c.backend_asked),
)


@dataclass(frozen=True, slots=True)
class Move:
    """One of a job's moves: where it leads, and the guarded UPDATE that makes it."""

    to: Status
    statement: Update

    def make(
        self, tx: Connection, job_id: str, *, fence: int | None = None, reason: str | None = None, **given: Any
    ) -> Row[Any] | None:
        """Move the job, and record the event. None: it is not in a state that this move may leave, or not ours."""
        mine = {} if fence is None else {"its_fence": fence}
        job = tx.execute(self.statement, {"its_id": job_id, **mine, **given}).one_or_none()
        if job is not None:
            record(tx, [job], self.to, {"reason": reason} if reason else {})
        return job


def _move(
    to: Status, *conditions: ColumnElement[bool], allowed: tuple[Status, ...], fenced: bool, **changes: Any
) -> Move:
    """The one form of every move: WHERE id AND status IN (allowed), and for a worker's own moves AND fence = mine."""
    mine = [jobs.c.fence == bindparam("its_fence")] if fenced else []
    statement = (
        update(jobs)
        .where(jobs.c.id == bindparam("its_id"), is_status(*allowed), *mine, *conditions)
        .values(status=to, sequence=jobs.c.sequence + 1, **changes)
        .returning(*_MOVED)
    )
    return Move(to, statement)


#: The worker is gone from it.
_LET_GO: dict[str, Any] = {"worker": None, "lease_until": None, "attempt_deadline_at": None}
#: It is over.
_ENDED: dict[str, Any] = {"completed_at": now(), "ready": False, "ready_at": None, **_LET_GO}

_OPEN = (Status.queued, Status.running)
_LAPSED = jobs.c.lease_until < now()
_LEASE = now(bindparam("lease_seconds", type_=Float))

CLAIM = _move(
    Status.running,
    allowed=(Status.queued,),
    fenced=False,
    fence=jobs.c.fence + 1,
    attempts=jobs.c.attempts + 1,
    started_at=func.coalesce(jobs.c.started_at, now()),
    lease_until=_LEASE,
    attempt_deadline_at=now(bindparam("attempt_seconds", type_=Float)),
)
SUCCEED = _move(Status.succeeded, allowed=(Status.running,), fenced=True, **_ENDED)
ADOPT = _move(Status.succeeded, allowed=_OPEN, fenced=False, fence=jobs.c.fence + 1, **_ENDED)
FAIL = _move(Status.failed, allowed=(Status.running,), fenced=True, failures=jobs.c.failures + 1, **_ENDED)
REQUEUE = _move(
    Status.queued,
    allowed=(Status.running,),
    fenced=True,
    ready_at=now(bindparam("after_seconds", type_=Float)),
    failures=jobs.c.failures + bindparam("failed", type_=Integer),
    refusals=case((bindparam("failed", type_=Integer) == 1, 0), else_=jobs.c.refusals + 1),
    **_LET_GO,
)
RELEASE = _move(Status.queued, allowed=(Status.running,), fenced=True, **_LET_GO)
#: `sequence` too: so `routing` is what was read, and one entry longer.
REROUTE = _move(
    Status.queued,
    jobs.c.backend == bindparam("its_backend"),
    jobs.c.sequence == bindparam("its_sequence"),
    allowed=(Status.queued,),
    fenced=False,
    ready=True,
    ready_at=None,
)
CANCEL = _move(Status.canceled, allowed=_OPEN, fenced=False, **_ENDED)
RESCUE = _move(
    Status.queued,
    _LAPSED,
    jobs.c.crashes + 1 < bindparam("max_crashes", type_=Integer),
    allowed=(Status.running,),
    fenced=True,
    crashes=jobs.c.crashes + 1,
    **_LET_GO,
)
CRASH = _move(Status.failed, _LAPSED, allowed=(Status.running,), fenced=True, crashes=jobs.c.crashes + 1, **_ENDED)
EXPIRE = _move(Status.expired, too_old(), NEVER_TRIED, allowed=(Status.queued,), fenced=False, **_ENDED)
GIVE_UP = _move(Status.failed, too_old(), allowed=(Status.queued,), fenced=False, **_ENDED)

# One death accuses every job of its process. One that another death would end is a suspect, and runs as the only one in
# its process: so a death that ends a job had no other suspect.
_SUSPECT = jobs.c.crashes + 1 >= bindparam("max_crashes", type_=Integer)
_other = jobs.alias("other")
_NO_SUSPECT_HERE = ~exists(
    select(_other.c.id).where(
        _other.c.status == spelt(Status.running),
        _other.c.worker == bindparam("by_worker", type_=String),
        _other.c.crashes + 1 >= bindparam("max_crashes", type_=Integer),
    )
)
#: A place in the queue (shared/queue_head.py).
_FROM = tuple_(bindparam("from_rank", type_=BigInteger), bindparam("from_id", type_=String))
NEXT = (
    select(jobs.c.id, _SUSPECT.label("suspect"), jobs.c.input, jobs.c.rank)
    .where(
        jobs.c.backend == bindparam("of_backend"),
        # Of another model nobody here knows the price: the job is another version's, and must not stand in the way.
        jobs.c.model.in_(bindparam("of_models", expanding=True)),
        CLAIMABLE,
        tuple_(jobs.c.rank, jobs.c.id) >= _FROM,
        ~too_old(),
        or_(~_SUSPECT, _NO_SUSPECT_HERE),
    )
    .order_by(jobs.c.rank, jobs.c.id)
    .limit(bindparam("at_most", type_=Integer))
    .with_for_update(skip_locked=True, of=jobs, key_share=True)  # a webhook's end does not hide a job
)
ROUTED = select(jobs.c.sequence, jobs.c.routing, now().label("now")).where(jobs.c.id == bindparam("its_id"))
#: `held`: pairs of (id, fence).
RENEW = (
    update(jobs)
    .where(is_status(Status.running), tuple_(jobs.c.id, jobs.c.fence).in_(bindparam("held", expanding=True)))
    .values(
        lease_until=case(
            (jobs.c.attempt_deadline_at < _LEASE, jobs.c.attempt_deadline_at),
            else_=_LEASE,
        )
    )
    .returning(jobs.c.id, jobs.c.fence)
)
MAKE_READY = (
    update(jobs)
    .where(jobs.c.id == bindparam("its_id"), is_status(Status.queued), ~jobs.c.ready, jobs.c.ready_at <= now())
    .values(ready=True, ready_at=None)
    .returning(jobs.c.id)
)
REMOVE_DATA = (
    update(jobs)
    .where(jobs.c.id == bindparam("its_id"), is_status(*sorted(TERMINAL)))
    .values(
        data_removed=True,
        input={},
        metadata={},
        warnings=[],
        image_attempt=None,
        image_content_type=None,
        image_width=None,
        image_height=None,
        image_bytes=None,
        # image_sha256 stays: that a picture was ours is known for good (GET /v1/provenance), and says nothing of it.
    )
    .returning(jobs.c.id)
)
BEGIN_ATTEMPT = insert(attempts).values(
    started_at=now(),
    deadline_at=now(bindparam("attempt_seconds", type_=Float)),
    outcome=Outcome.running,
    billed=Billed.unknown,
)
CLOSE_ATTEMPT = (
    update(attempts)
    .where(
        attempts.c.job_id == bindparam("its_id"),
        attempts.c.number == bindparam("its_number"),
        attempts.c.outcome.in_((spelt(Outcome.running), spelt(Outcome.unknown))),
    )
    .values(completed_at=now())
    .returning(attempts.c.number)
)


#: Where a job stands, and the attempt whose picture it points at.
END_OF = select(jobs.c.status, jobs.c.image_attempt).where(jobs.c.id == bindparam("its_id"))


def record(tx: Connection, moved: Iterable[Row[Any]], status: Status, data: dict[str, Any]) -> None:
    """The event of the same move of some jobs: with what a later move may change, as it stood.

    `routed`: how often a job was routed.
    """
    recorded = [
        {
            "id": new_id("evt"),
            "subject_id": job.id,
            "project_id": job.project_id,
            "sequence": job.sequence,
            "type": EVENT_OF[status],
            "data": {
                "attempts": job.attempts,
                "error": job.error,
                "backend": job.backend,
                "routed": len(job.routing or ()),
                **data,
            },
        }
        for job in moved
    ]
    tx.info["moved"] += [event["subject_id"] for event in recorded]
    tx.execute(_RECORD, recorded)
