"""A job's life: the only writer of a job's status.

    submit -> queued -- claim --> running -- succeed --> succeeded     adopt: a picture of any attempt
                ^                    |------ fail -----> failed               ends a job that is queued or running
                '-- requeue, release, rescue    cancel: ends a job that is queued or running
    queued -- too old: expire --> expired (never tried) | failed, gave_up (tried)

Every move is one guarded UPDATE: it names the statuses it may leave and, for a worker's own moves, the fence that
its claim was given. Zero rows is an answer: somebody else decided; the move returns None or False and nothing
happened. A move, the job's `sequence` and its event row are one transaction, which the caller opens with
`database.write()` and in which nothing is sent.

Attempts are closed by an UPDATE of their own, whatever became of the job, so that no call goes uncounted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    Integer,
    Row,
    Update,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from shared.database import now, now_ms
from shared.errors import JobErrorCode
from shared.ids import new_id
from shared.image_store import Image
from shared.tables import Billed, Outcome, Status, attempts, events, jobs

TERMINAL = frozenset({Status.succeeded, Status.failed, Status.canceled, Status.expired})

EVENT_OF = {
    Status.queued: "job.queued",
    Status.running: "job.started",
    Status.succeeded: "job.succeeded",
    Status.failed: "job.failed",
    Status.canceled: "job.canceled",
    Status.expired: "job.expired",
}


def is_status(status: Status) -> ColumnElement[bool]:
    """Whether a job stands there, written so that the partial indexes serve it."""
    # Spelt out in the statement, not bound: a database uses a partial index only for a condition it can see.
    return jobs.c.status == literal(status.value, literal_execute=True)


CLAIMABLE = and_(is_status(Status.queued), jobs.c.ready)
ATTEMPT_RUNS = attempts.c.outcome == literal(Outcome.running.value, literal_execute=True)
NEVER_TRIED = jobs.c.failures + jobs.c.crashes == 0


def too_old() -> ColumnElement[bool]:
    """Whether a queued job has waited longer than it may."""
    past_deadline = and_(jobs.c.deadline_at.is_not(None), jobs.c.deadline_at < now())  # never NULL: it is negated too
    return or_(jobs.c.queue_until < now(), and_(past_deadline, NEVER_TRIED))


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job ended without a picture, as clients read it."""

    code: JobErrorCode
    message: str
    retryable: bool
    billed: Billed

    def as_json(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message, "retryable": self.retryable, "billed": self.billed}


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in a worker's hands: what it needs to work, and the fence that its moves must show."""

    job_id: str
    fence: int
    attempt: int
    model: str
    input: Mapping[str, Any]
    failures: int
    refusals: int
    crashes: int


# Statements are built once: building one costs more than running it, and some stand on every client's path.
_SUBMIT = (
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


@dataclass(frozen=True, slots=True)
class _Move:
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
            _record(tx, job, self.to, {"reason": reason} if reason else {})
        return job


def _move(
    to: Status, *conditions: ColumnElement[bool], allowed: tuple[Status, ...], fenced: bool, **changes: Any
) -> _Move:
    """The one form of every move: WHERE id AND status IN (allowed), and for a worker's own moves AND fence = mine."""
    mine = [jobs.c.fence == bindparam("its_fence")] if fenced else []
    statement = (
        update(jobs)
        .where(jobs.c.id == bindparam("its_id"), jobs.c.status.in_(allowed), *mine, *conditions)
        .values(status=to, sequence=jobs.c.sequence + 1, **changes)
        .returning(jobs)
    )
    return _Move(to, statement)


#: The worker is gone from it.
_LET_GO: dict[str, Any] = {"worker": None, "lease_until": None, "attempt_deadline_at": None}
#: It is over.
_ENDED: dict[str, Any] = {"completed_at": now(), "ready": False, "ready_at": None, **_LET_GO}

_OPEN = (Status.queued, Status.running)
_LAPSED = jobs.c.lease_until < now()

_CLAIM = _move(
    Status.running,
    allowed=(Status.queued,),
    fenced=False,
    fence=jobs.c.fence + 1,
    attempts=jobs.c.attempts + 1,
    started_at=func.coalesce(jobs.c.started_at, now()),
    lease_until=now(bindparam("lease_seconds", type_=Float)),
    attempt_deadline_at=now(bindparam("attempt_seconds", type_=Float)),
)
_SUCCEED = _move(Status.succeeded, allowed=(Status.running,), fenced=True, **_ENDED)
_ADOPT = _move(Status.succeeded, allowed=_OPEN, fenced=False, fence=jobs.c.fence + 1, **_ENDED)
_FAIL = _move(Status.failed, allowed=(Status.running,), fenced=True, failures=jobs.c.failures + 1, **_ENDED)
_REQUEUE = _move(
    Status.queued,
    allowed=(Status.running,),
    fenced=True,
    ready_at=now(bindparam("after_seconds", type_=Float)),
    failures=jobs.c.failures + bindparam("failed", type_=Integer),
    refusals=case((bindparam("failed", type_=Integer) == 1, 0), else_=jobs.c.refusals + 1),
    **_LET_GO,
)
_RELEASE = _move(Status.queued, allowed=(Status.running,), fenced=True, **_LET_GO)
_CANCEL = _move(Status.canceled, allowed=_OPEN, fenced=False, **_ENDED)
_RESCUE = _move(
    Status.queued,
    _LAPSED,
    jobs.c.crashes + 1 < bindparam("max_crashes", type_=Integer),
    allowed=(Status.running,),
    fenced=True,
    crashes=jobs.c.crashes + 1,
    **_LET_GO,
)
_CRASH = _move(Status.failed, _LAPSED, allowed=(Status.running,), fenced=True, crashes=jobs.c.crashes + 1, **_ENDED)
_EXPIRE = _move(Status.expired, too_old(), NEVER_TRIED, allowed=(Status.queued,), fenced=False, **_ENDED)
_GIVE_UP = _move(Status.failed, too_old(), allowed=(Status.queued,), fenced=False, **_ENDED)

_NEXT = (
    select(jobs.c.id)
    .where(jobs.c.backend == bindparam("of_backend"), CLAIMABLE, ~too_old())
    .order_by(jobs.c.rank, jobs.c.id)
    .limit(bindparam("at_most", type_=Integer))
    .with_for_update(skip_locked=True)
)
_BEGIN_ATTEMPT = insert(attempts).values(
    started_at=now(),
    deadline_at=now(bindparam("attempt_seconds", type_=Float)),
    outcome=Outcome.running,
    billed=Billed.unknown,
)
_CLOSE_ATTEMPT = (
    update(attempts)
    .where(
        attempts.c.job_id == bindparam("its_id"),
        attempts.c.number == bindparam("its_number"),
        attempts.c.outcome.in_((Outcome.running, Outcome.unknown)),
    )
    .values(completed_at=now())
    .returning(attempts.c.number)
)


@dataclass(frozen=True, slots=True)
class Made:
    """A job that a request led to. `is_new`: it was made now; else it was there before."""

    job: Row[Any]
    is_new: bool


def submit(
    tx: Connection,
    *,
    project_id: str,
    model: str,
    backend_asked: str,
    backend: str,
    input: Mapping[str, Any],
    metadata: Mapping[str, str],
    sandbox: bool,
    deadline_seconds: float | None,
    max_wait_seconds: float,
    retried_from: str | None = None,
) -> Row[Any]:
    """Accept a job: from the commit of this transaction on it is ours, whatever becomes of Redis. Returns its row."""
    job = tx.execute(
        _SUBMIT,
        {
            "id": new_id("job"),
            "project_id": project_id,
            "model": model,
            "backend_asked": backend_asked,
            "backend": backend,
            "input": dict(input),
            "metadata": dict(metadata),
            "sandbox": sandbox,
            "deadline_seconds": deadline_seconds,
            "max_wait_seconds": max_wait_seconds,
            "retried_from": retried_from,
        },
    ).one()
    _record(tx, job, Status.queued, {})
    return job


def claim(
    tx: Connection,
    backend: str,
    *,
    worker: str,
    lease_seconds: float,
    attempt_seconds: float,
    prices: Mapping[str, int],
    limit: int = 1,
) -> list[Claim]:
    """Take the next jobs of a backend, in the queue's order, under a lease; their attempts begin.

    `attempt_seconds` is the longest that one attempt may take: no lease reaches beyond it. `prices` is what an image
    of each model costs on this backend, in millionths of a dollar.
    """
    claims = []
    for job_id in tx.scalars(_NEXT, {"of_backend": backend, "at_most": limit}).all():
        terms: dict[str, Any] = {"worker": worker, "lease_seconds": lease_seconds, "attempt_seconds": attempt_seconds}
        job = _CLAIM.make(tx, job_id, **terms)
        if job is None:
            continue
        attempt = {
            "job_id": job.id,
            "number": job.attempts,
            "backend": backend,
            "worker": worker,
            "price": prices[job.model],
            "attempt_seconds": attempt_seconds,
        }
        tx.execute(_BEGIN_ATTEMPT, attempt)
        claims.append(
            Claim(job.id, job.fence, job.attempts, job.model, job.input, job.failures, job.refusals, job.crashes)
        )
    return claims


def renew(tx: Connection, held: Iterable[tuple[str, int]], lease_seconds: float) -> set[tuple[str, int]]:
    """The heartbeat: extend the leases of these (job, fence) pairs. Returns those that are still the caller's.

    A lease never reaches beyond its attempt's hard deadline: a lost thread must not keep its job alive.
    """
    lease = now(lease_seconds)
    statement = (
        update(jobs)
        .where(is_status(Status.running), tuple_(jobs.c.id, jobs.c.fence).in_(list(held)))
        .values(lease_until=case((jobs.c.attempt_deadline_at < lease, jobs.c.attempt_deadline_at), else_=lease))
        .returning(jobs.c.id, jobs.c.fence)
    )
    return {(row.id, row.fence) for row in tx.execute(statement)}


def succeed(tx: Connection, claim: Claim, image: Image) -> bool:
    """The worker's own end: the job points at the picture, which was put and committed before."""
    return _SUCCEED.make(tx, image.job_id, fence=claim.fence, **_pointing_at(image)) is not None


def adopt(tx: Connection, image: Image) -> bool:
    """A picture of any attempt ends a job that is still open: it was paid for. A worker that has it is fenced out."""
    return _ADOPT.make(tx, image.job_id, **_pointing_at(image)) is not None


def _pointing_at(image: Image) -> dict[str, Any]:
    return {
        "warnings": image.warnings,
        "image_attempt": image.attempt,
        "image_content_type": image.content_type,
        "image_width": image.width,
        "image_height": image.height,
        "image_bytes": image.bytes,
        "image_sha256": image.sha256,
    }


def fail(tx: Connection, claim: Claim, error: JobError) -> bool:
    """The worker's own end without a picture."""
    return _FAIL.make(tx, claim.job_id, fence=claim.fence, error=error.as_json()) is not None


def requeue(tx: Connection, claim: Claim, *, reason: str, after_seconds: float, counts: bool) -> bool:
    """Back into the queue after a passing failure, not before `after_seconds`.

    `counts`: whether it is one of the MAX_ATTEMPTS; what is known not to have been accepted counts only in time.
    """
    pause = after_seconds if after_seconds > 0 else None
    given = {"ready": pause is None, "after_seconds": pause, "failed": int(counts)}
    return _REQUEUE.make(tx, claim.job_id, fence=claim.fence, reason=reason, **given) is not None


def release(tx: Connection, claim: Claim, *, reason: str) -> bool:
    """Back into the queue at once: claimed, and nothing sent."""
    return _RELEASE.make(tx, claim.job_id, fence=claim.fence, reason=reason) is not None


def cancel(tx: Connection, job_id: str) -> bool:
    """Nobody wants it any more. A worker that has it learns so; what its call costs still reaches its attempt."""
    return _CANCEL.make(tx, job_id) is not None


def retry(tx: Connection, job_id: str, *, backend: str, sandbox: bool, max_wait_seconds: float) -> Made | None:
    """Submit an ended job again, with the same input and seed. While one such is open, it is that one.

    None if there is nothing to submit again: the job succeeded, is still open, or its data were removed.
    """
    # Locked, so that two retries at once make one job. (On SQLite there is one writer anyway.)
    job = tx.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).one()
    if job.status not in (Status.failed, Status.canceled, Status.expired) or job.data_removed:
        return None
    again = select(jobs).where(jobs.c.retried_from == job_id, jobs.c.status.in_((Status.queued, Status.running)))
    open_one = tx.execute(again.order_by(jobs.c.id).limit(1)).one_or_none()
    if open_one is not None:
        return Made(open_one, is_new=False)
    new = submit(
        tx,
        project_id=job.project_id,
        model=job.model,
        backend_asked=job.backend_asked,
        backend=backend,
        input=job.input,
        metadata=job.metadata,
        sandbox=sandbox,
        deadline_seconds=None,
        max_wait_seconds=max_wait_seconds,
        retried_from=job_id,
    )
    return Made(new, is_new=True)


def remove_data(tx: Connection, job_id: str) -> bool:
    """Forget what an ended job was about: its prompt, its metadata, its picture. Its row stays, and its bill.

    No move: its status stays. False if it has not ended; removing twice is fine. The pictures themselves are the
    image store's to remove, after the commit; what a crash leaves there, nothing points at, and the sweep finds.
    """
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status.in_(TERMINAL))
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
            image_sha256=None,
        )
        .returning(jobs.c.id)
    )
    return tx.execute(statement).one_or_none() is not None


def rescue(tx: Connection, job_id: str, fence: int, *, max_crashes: int) -> Status | None:
    """A lease ran out: its worker counts as dead. Back into the queue, or failed after `max_crashes` such deaths.

    Returns where the job stands now; None if the lease was renewed, or the job moved on, in the meantime.
    """
    if _RESCUE.make(tx, job_id, fence=fence, reason="rescued", max_crashes=max_crashes) is not None:
        return Status.queued
    died = JobError(JobErrorCode.worker_crashed, "Each of its workers died or lost its lease.", True, Billed.unknown)
    crashed = _CRASH.make(tx, job_id, fence=fence, error=died.as_json())
    return None if crashed is None else Status.failed


def expire(tx: Connection, job_id: str) -> Status | None:
    """A job that waited too long ends: `expired` if it was never tried, else `failed`. None if it is not too old."""
    never = "It waited longer than it may before its first attempt. Nothing was sent and nothing is billed."
    error = JobError(JobErrorCode.expired, never, True, Billed.no)
    if _EXPIRE.make(tx, job_id, error=error.as_json()) is not None:
        return Status.expired
    tried = "It was tried, and then waited in the queue longer than it may."
    error = JobError(JobErrorCode.gave_up, tried, True, Billed.unknown)
    return None if _GIVE_UP.make(tx, job_id, error=error.as_json()) is None else Status.failed


def make_ready(tx: Connection, job_id: str) -> bool:
    """A job whose pause is over may be claimed again. No move: its status stays, and nobody is told."""
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, is_status(Status.queued), ~jobs.c.ready, jobs.c.ready_at <= now())
        .values(ready=True, ready_at=None)
        .returning(jobs.c.id)
    )
    return tx.execute(statement).one_or_none() is not None


def close_attempt(
    tx: Connection,
    job_id: str,
    number: int,
    outcome: Outcome,
    billed: Billed,
    error: Mapping[str, str] | None = None,
) -> bool:
    """Write down how an attempt ended, whatever became of its job. What was `unknown` may still become known."""
    how = {"its_id": job_id, "its_number": number, "outcome": outcome, "billed": billed, "error": error}
    return tx.execute(_CLOSE_ATTEMPT, how).one_or_none() is not None


def end_of(tx: Connection, job_id: str) -> tuple[Status, int | None]:
    """Where a job stands, and the attempt whose picture it points at."""
    row = tx.execute(select(jobs.c.status, jobs.c.image_attempt).where(jobs.c.id == job_id)).one()
    return Status(row.status), row.image_attempt


def _record(tx: Connection, job: Row[Any], status: Status, data: dict[str, Any]) -> None:
    """The event of a move: with `attempts` and `error` as they stood, which a later move may change."""
    tx.info["moved"].append(job.id)
    tx.execute(
        _RECORD,
        {
            "id": new_id("evt"),
            "job_id": job.id,
            "project_id": job.project_id,
            "sequence": job.sequence,
            "type": EVENT_OF[status],
            "data": {"attempts": job.attempts, "error": job.error, **data},
        },
    )
