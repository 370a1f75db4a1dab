"""A job's life: the only writer of a job's status.

    submit -> queued -- claim --> running -- succeed --> succeeded     adopt: a picture of any attempt
                ^                    |------ fail -----> failed               ends a job that is queued or running
                '-- requeue, release, rescue    cancel: ends a job that is queued or running
    queued -- too old: expire --> expired (never tried) | failed, gave_up (tried)
    queued -- reroute --> queued, for another backend

Every move is one guarded UPDATE: it names the statuses it may leave and, for a worker's own moves, the fence that
its claim was given. Zero rows is an answer: somebody else decided; the move returns None or False and nothing
happened. A move, the job's `sequence` and its event row are one transaction, which the caller opens with
`database.write()` and in which nothing is sent.

Attempts are closed by an UPDATE of their own, whatever became of the job, so that no call goes uncounted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, select

from shared import deliveries, inputs, moves
from shared.errors import JobErrorCode
from shared.events import REROUTED
from shared.ids import new_id
from shared.image_store import Image
from shared.inputs import Input
from shared.job_object import rfc3339
from shared.queue_head import Place, QueueHead
from shared.routing import AUTO, RoutingReason
from shared.tables import Billed, Outcome, Status, jobs

#: How far down the queue a claim looks for jobs that go with those in hand.
LOOK_AHEAD = 64


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
class Terms:
    """On what terms a worker claims.

    `attempt_seconds`: the longest that one attempt may take; no lease reaches beyond it. `prices`: what an image of
    each model costs on this backend, in millionths of a dollar; jobs of other models are passed by. `max_crashes`: how
    many workers may die over one job.
    """

    worker: str
    lease_seconds: float
    attempt_seconds: float
    prices: Mapping[str, int]
    max_crashes: int


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
    request_id: str | None = None
    asked: str = AUTO  # whom it was submitted to


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
    reason: RoutingReason,
    input: Mapping[str, Any],
    metadata: Mapping[str, str],
    sandbox: bool,
    deadline_seconds: float | None,
    max_wait_seconds: float,
    retried_from: str | None = None,
    webhook: Mapping[str, Any] | None = None,
    request_id: str | None = None,
    starts_from: Iterable[Input] = (),
) -> Row[Any]:
    """Accept a job: from the commit of this transaction on it is ours, whatever becomes of Redis. Returns its row.

    `reason`: why it waits for this backend. `webhook`: {url, events}, who is told of it beside the project's endpoints.
    `request_id`: of the request that it came with, for the logs of whoever works at it. `starts_from`: what `input`
    describes, kept with the job.
    """
    job = tx.execute(
        moves.SUBMIT,
        {
            "id": new_id("job"),
            "project_id": project_id,
            "model": model,
            "backend_asked": backend_asked,
            "backend": backend,
            "routing": [{"backend": backend, "reason": reason}],
            "input": dict(input),
            "metadata": dict(metadata),
            "sandbox": sandbox,
            "deadline_seconds": deadline_seconds,
            "max_wait_seconds": max_wait_seconds,
            "retried_from": retried_from,
            "webhook": None if webhook is None else dict(webhook),
            "request_id": request_id,
        },
    ).one()
    inputs.keep(tx, job.id, starts_from)
    moves.record(tx, [job], Status.queued, {})
    return job


def claim(
    tx: Connection,
    backend: str,
    terms: Terms,
    *,
    limit: int = 1,
    compatible: Callable[[Mapping[str, Any]], bool] | None = None,
    head: QueueHead | None = None,
) -> list[Claim]:
    """Take the next jobs of a backend, in the queue's order, under a lease; their attempts begin.

    `compatible`: asked for the inputs of the next LOOK_AHEAD jobs; one that it refuses is passed by, and stays first.
    `head`: where the caller's earlier claims found the queue to begin; None: looked for from the start.

    A suspect, which is a job that one more death of its worker would end, is taken only where no other one runs. That
    holds as long as a worker makes one claim at a time.
    """
    claims: list[Claim] = []
    taken: list[Row[Any]] = []
    lease: dict[str, Any] = {
        "worker": terms.worker,
        "lease_seconds": terms.lease_seconds,
        "attempt_seconds": terms.attempt_seconds,
    }
    wanted = {"of_backend": backend, "of_models": list(terms.prices)}
    suspects = {"by_worker": terms.worker, "max_crashes": terms.max_crashes}
    head = head or QueueHead()

    def find(place: Place) -> Sequence[Row[Any]]:
        start = {"from_rank": place[0], "from_id": place[1]}
        return tx.execute(moves.NEXT, {**wanted, **start, "at_most": at_most, **suspects}).all()

    while len(claims) < limit:
        took_suspect = passed_by = False
        at_most = limit - len(claims) if compatible is None else LOOK_AHEAD
        for row in head.look(find, at_most):
            if len(claims) == limit:
                break
            if row.suspect and took_suspect:
                passed_by = True
                continue
            if compatible is not None and not compatible(row.input):
                continue
            job = tx.execute(moves.CLAIM.statement, {"its_id": row.id, **lease}).one_or_none()
            if job is None:
                continue
            taken.append(job)
            took_suspect = took_suspect or row.suspect
            so_far = (job.failures, job.refusals, job.crashes)
            rest = job.request_id, job.backend_asked
            claims.append(Claim(job.id, job.fence, job.attempts, job.model, job.input, *so_far, *rest))
        if not passed_by:
            break
    if taken:  # all at once: one by one it is half of what a claim takes
        moves.record(tx, taken, moves.CLAIM.to, {})
        terms_of_all = {"backend": backend, "worker": terms.worker, "attempt_seconds": terms.attempt_seconds}
        begun = [
            {"job_id": job.id, "number": job.attempts, "price": terms.prices[job.model], **terms_of_all}
            for job in taken
        ]
        tx.execute(moves.BEGIN_ATTEMPT, begun)
    return claims


def renew(tx: Connection, held: Iterable[tuple[str, int]], lease_seconds: float) -> set[tuple[str, int]]:
    """The heartbeat: extend the leases of these (job, fence) pairs. Returns those that are still the caller's.

    A lease never reaches beyond its attempt's hard deadline: a lost thread must not keep its job alive.
    """
    renewed = tx.execute(moves.RENEW, {"held": list(held), "lease_seconds": lease_seconds})
    return {(row.id, row.fence) for row in renewed}


def succeed(tx: Connection, claim: Claim, image: Image) -> bool:
    """The worker's own end: the job points at the picture, which was put and committed before."""
    return moves.SUCCEED.make(tx, image.job_id, fence=claim.fence, **_pointing_at(image)) is not None


def adopt(tx: Connection, image: Image) -> bool:
    """A picture of any attempt ends a job that is still open: it was paid for. A worker that has it is fenced out."""
    return moves.ADOPT.make(tx, image.job_id, **_pointing_at(image)) is not None


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
    return moves.FAIL.make(tx, claim.job_id, fence=claim.fence, error=error.as_json()) is not None


def requeue(tx: Connection, claim: Claim, *, reason: str, after_seconds: float, counts: bool) -> bool:
    """Back into the queue after a passing failure, not before `after_seconds`.

    `counts`: whether it is one of the MAX_ATTEMPTS; what is known not to have been accepted counts only in time.
    """
    pause = after_seconds if after_seconds > 0 else None
    given = {"ready": pause is None, "after_seconds": pause, "failed": int(counts)}
    return moves.REQUEUE.make(tx, claim.job_id, fence=claim.fence, reason=reason, **given) is not None


def release(tx: Connection, claim: Claim, *, reason: str) -> bool:
    """Back into the queue at once: claimed, and nothing sent."""
    return moves.RELEASE.make(tx, claim.job_id, fence=claim.fence, reason=reason) is not None


def cancel(tx: Connection, job_id: str) -> bool:
    """Nobody wants it any more. A worker that has it learns so; what its call costs still reaches its attempt."""
    return moves.CANCEL.make(tx, job_id) is not None


def reroute(tx: Connection, job_id: str, *, source: str, target: str, reason: RoutingReason, sandbox: bool) -> bool:
    """A job that waits for one backend waits for another from now on, and may be claimed at once.

    Its place in the queue, its fence and what is counted of it stay. `sandbox`: whether the other is the sandbox.
    """
    seen = tx.execute(moves.ROUTED, {"its_id": job_id}).one()
    # Made by an older version: nobody wrote down why it waited here.
    so_far = seen.routing or [{"backend": source, "reason": RoutingReason.first}]
    given = {
        "its_backend": source,
        "its_sequence": seen.sequence,
        "backend": target,
        "routing": [*so_far, {"backend": target, "reason": reason, "at": rfc3339(seen.now)}],
        "sandbox": sandbox,
    }
    return moves.REROUTE.make(tx, job_id, reason=REROUTED, **given) is not None


def retry(
    tx: Connection,
    job_id: str,
    *,
    backend: str,
    reason: RoutingReason,
    sandbox: bool,
    max_wait_seconds: float,
    request_id: str | None = None,
) -> Made | None:
    """Submit an ended job again, with the same input, seed and image. While one such is open, it is that one.

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
        reason=reason,
        input=job.input,
        metadata=job.metadata,
        sandbox=sandbox,
        deadline_seconds=None,
        max_wait_seconds=max_wait_seconds,
        retried_from=job_id,
        webhook=job.webhook,
        request_id=request_id,
    )
    inputs.copy(tx, job_id, to=new.id)
    return Made(new, is_new=True)


def remove_data(tx: Connection, job_id: str) -> bool:
    """Forget what an ended job was about: prompt, metadata, the image it began with, its picture, what receivers of its
    webhooks answered. Its row stays, its bill, and the picture's hash, by which it is known as ours.

    No move: its status stays. False if it has not ended; removing twice is fine. The pictures themselves are the
    image store's to remove, after the commit; what a crash leaves there, nothing points at, and the sweep finds.
    """
    tx.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())  # after a try that ends now
    if tx.execute(moves.REMOVE_DATA, {"its_id": job_id}).one_or_none() is None:
        return False
    inputs.remove(tx, job_id)
    deliveries.forget_answers(tx, job_id)
    return True


def rescue(tx: Connection, job_id: str, fence: int, *, max_crashes: int) -> Status | None:
    """A lease ran out: its worker counts as dead. Back into the queue, or failed after `max_crashes` such deaths.

    Returns where the job stands now; None if the lease was renewed, or the job moved on, in the meantime.
    """
    if moves.RESCUE.make(tx, job_id, fence=fence, reason="rescued", max_crashes=max_crashes) is not None:
        return Status.queued
    died = JobError(JobErrorCode.worker_crashed, "Each of its workers died or lost its lease.", True, Billed.unknown)
    crashed = moves.CRASH.make(tx, job_id, fence=fence, error=died.as_json())
    return None if crashed is None else Status.failed


def expire(tx: Connection, job_id: str) -> Status | None:
    """A job that waited too long ends: `expired` if it was never tried, else `failed`. None if it is not too old."""
    never = "It waited longer than it may, and no backend took it. Nothing is billed."
    error = JobError(JobErrorCode.expired, never, True, Billed.no)
    if moves.EXPIRE.make(tx, job_id, error=error.as_json()) is not None:
        return Status.expired
    tried = "It was tried, and then waited in the queue longer than it may."
    error = JobError(JobErrorCode.gave_up, tried, True, Billed.unknown)
    return None if moves.GIVE_UP.make(tx, job_id, error=error.as_json()) is None else Status.failed


def make_ready(tx: Connection, job_id: str) -> bool:
    """A job whose pause is over may be claimed again. No move: its status stays, and nobody is told."""
    return tx.execute(moves.MAKE_READY, {"its_id": job_id}).one_or_none() is not None


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
    return tx.execute(moves.CLOSE_ATTEMPT, how).one_or_none() is not None


def end_of(tx: Connection, job_id: str) -> tuple[Status, int | None]:
    """Where a job stands, and the attempt whose picture it points at."""
    row = tx.execute(moves.END_OF, {"its_id": job_id}).one()
    return Status(row.status), row.image_attempt
