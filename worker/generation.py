"""One attempt at one job, top to bottom: claim, read its image, generate, spool, judge, put the picture, close."""

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import Connection

from shared import inputs, jobs, logs, routing
from shared.database import AWAY, Database
from shared.image_store import ImageStore
from shared.jobs import Claim, JobError, Terms
from shared.progress import Report
from shared.queue_head import QueueHead
from shared.routing import AUTO
from shared.tables import Billed, Outcome
from worker import retry
from worker.backends.base import Backend, Failure, Kind, Picture, Read, Request, Unjudged
from worker.breaker import Permit, Verdict
from worker.claims import Claims
from worker.closing import Closing, outcome_of
from worker.leases import Leases
from worker.shared_breaker import SharedBreaker
from worker.slots import Slots
from worker.spool import Entry, Spool

log = logging.getLogger(__name__)

#: For jitter. Its own: the dice that a process has in common are nobody's to draw from in a thread.
_dice = random.Random()


_Done = TypeVar("_Done")


class _Left(Exception):
    """The process stops before it could be done. No picture is lost: what was received is on the disk."""


class Generation:
    """Works at the jobs of one backend. Hundreds of threads call `work()` at once."""

    #: Between two tries to judge or store what came back while nobody can. A picture that was received is paid for: it
    #: is never thrown away, and the slot waits with it.
    AWAY_PAUSE_SECONDS = 1.0
    #: What is no picture is told to a database that is away for so long once the process is to stop. Then the lease
    #: gives the job back, and the sweep closes the attempt as `unknown`.
    STOPPING_SECONDS = 10.0

    def __init__(
        self,
        *,
        database: Database,
        images: ImageStore,
        backend: Backend,
        leases: Leases,
        worker: str,
        prices: Mapping[str, int],
        max_attempts: int,
        max_crashes: int,
        lease_seconds: float,
        stopping: threading.Event,
        others: Sequence[str] = (),
        spool: Spool | None = None,
        breaker: SharedBreaker | None = None,
        may_claim: Callable[[], bool] = lambda: True,
        more: Callable[[int], None] = lambda jobs: None,
        tell: Callable[[str, Report], None] = lambda job_id, report: None,
        slots: Slots | None = None,
    ) -> None:
        """`prices`: millionths of a dollar an image, by model. `stopping`: set once the process was asked to stop.

        `others`: the backends that are in use beside this one. `spool`: where pictures are safe as soon as they are
        received; None: nowhere. `breaker`: the backend's, asked before a claim; None: one of this process alone.
        `may_claim`: asked too, about what is not the backend's. `more`: called with how many jobs were claimed when
        there may be more. `tell`: how far a job is. `slots`: what is told of each step.
        """
        self._database = database
        self._closing = Closing(database, images)
        self._backend = backend
        self._leases = leases
        self._terms = Terms(worker, lease_seconds, backend.attempt_seconds, prices, max_crashes)
        self._claims = Claims(self._take, more)
        self._head = QueueHead()
        self._more = more
        self._tell = tell
        self._in_hand: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._breaker = breaker or SharedBreaker(backend.name)
        #: By claim: what the breaker allowed, and since when it is held.
        self._taken: dict[tuple[str, int], tuple[Permit, float]] = {}
        self._max_attempts = max_attempts
        self._others = others
        self._stopping = stopping
        self._keep = spool.keep if spool is not None else Entry
        self._hand_back = spool.hand_back if spool is not None else lambda entry: None
        self._may_claim = may_claim
        self._slots = slots or Slots(1)
        self._seconds: deque[float] = deque(maxlen=50)

    def work(self) -> None:
        """Claim and work until no job is left, or until asked to stop."""
        with self._slots.work() as slot:
            while not self._stopping.is_set() and self._may_claim() and (claim := self._claims.next()):
                slot.hold(self._backend.attempt_seconds)
                self.run_attempt(claim)
                slot.end()

    def _take(self, limit: int) -> list[Claim]:
        permit = self._breaker.admit(limit, len(self._in_hand))
        if not permit.calls:
            return []
        claims: list[Claim] = []
        began = time.monotonic()
        try:
            compatible = self._backend.compatible(list(self._in_hand.values()))
            with self._database.write() as tx:
                found = jobs.claim(
                    tx,
                    self._backend.name,
                    self._terms,
                    limit=permit.calls,
                    compatible=compatible,
                    head=self._head,
                )
            claims = found  # not before the commit: if that fails, the permit is nobody's, and a probe's kept for ever
        finally:
            if not claims:
                self._breaker.withdraw(permit)
        for claim in claims:
            self._in_hand[claim.job_id, claim.fence] = claim.input
            self._taken[claim.job_id, claim.fence] = permit, began
        return claims

    @property
    def backend_name(self) -> str:
        return self._backend.name

    @property
    def mean_seconds(self) -> float | None:
        """What the latest calls of the backend took on average; None before the first."""
        seconds = list(self._seconds)
        return sum(seconds) / len(seconds) if seconds else None

    def run_attempt(self, claim: Claim) -> None:
        """From a claim to its end, whatever that is."""
        permit, taken_at = self._taken.pop((claim.job_id, claim.fence), (Permit(1), time.monotonic()))
        its = {"job_id": claim.job_id, "attempt": claim.attempt, "request_id": claim.request_id}
        with logs.about(**its, backend=self._backend.name), self._leases.holding(claim), suppress(_Left):
            began = time.monotonic()
            try:
                starts_from = self._starts_from(claim)
                if (why_not := self._why_not_send(taken_at)) is not None:
                    self._until_done(lambda: self._release(claim, why_not))
                    _tell(Outcome.canceled, Billed.no, why_not, 0.0)
                    return
                outcome, entry = self._generate(claim, starts_from)
                verdict = self._hear(claim, permit, outcome)
            finally:
                self._breaker.withdraw(permit)
                self._let_go(claim)
            try:
                self._settle(claim, outcome, entry, verdict, began)
            except _Left:
                raise
            except Exception:
                if entry is not None:
                    self._hand_back(entry)  # paid for: whatever went wrong here, Recovery offers it
                raise

    def _settle(
        self, claim: Claim, outcome: Picture | Failure, entry: Entry | None, verdict: Verdict, began: float
    ) -> None:
        """Judge it if nobody could, store it or give the job back, and close the attempt."""
        if isinstance(outcome, Unjudged) and entry is not None:
            outcome = self._until_done(lambda: self._judge(claim, entry.read()), entry, is_picture=True)
        if isinstance(outcome, Picture):
            picture = outcome
            status = self._until_done(
                lambda: self._closing.with_picture(claim.job_id, claim.attempt, picture, claim),
                entry,
                is_picture=True,
            )
            _tell(outcome_of(status), Billed.yes, None, time.monotonic() - began)
        else:
            failure = outcome
            self._until_done(lambda: self._give_back(claim, failure, verdict), entry)
            _tell(Outcome.failed, failure.billed, failure.kind, time.monotonic() - began)
        if entry is not None:
            entry.remove()  # after the commit that made it unnecessary

    def _starts_from(self, claim: Claim) -> dict[str, bytes]:
        """The image that it alters and its mask, by name; nothing for most jobs."""
        if "image" not in claim.input:
            return {}

        def read() -> dict[str, bytes]:
            with self._database.read() as connection:
                return inputs.read(connection, claim.job_id)

        # Now, and not at the claim: pictures would wait in memory for their turn, under the locks of all claims.
        given = self._until_done(read, said="waiting for what the job starts from")
        self._slots.hold(self._backend.attempt_seconds)
        return given

    def _generate(self, claim: Claim, starts_from: Mapping[str, bytes]) -> tuple[Picture | Failure, Entry | None]:
        """What the backend says, and what it received, which may be more: a picture that could not be judged."""
        kept: list[Entry] = []

        def received(data: bytes) -> Read:
            kept.append(self._keep(claim.job_id, claim.attempt, data))
            return kept[-1].read

        def progress(_index: int, step: int, steps: int, preview: bytes | None) -> None:
            self._tell(claim.job_id, Report(claim.attempt, step, steps, preview))

        if missing := {"image", "mask"}.intersection(claim.input) - set(starts_from):
            gone = f"The {' and the '.join(sorted(missing))} of this job can't be found any more."
            return Failure(Kind.rejected, Billed.no, gone, asked=False), None
        started = time.monotonic()
        try:
            image, mask = starts_from.get("image"), starts_from.get("mask")
            request = Request(claim.job_id, claim.model, claim.input, received, image, mask)
            outcome = self._backend.generate(
                [request], progress=progress, canceled=lambda _index: self._leases.lost(claim)
            )[0]
            self._seconds.append(time.monotonic() - started)
        except Exception:
            # A fault of ours must not cost the job its life, nor the thread its. Whether it was paid, nobody knows.
            log.exception("the attempt broke off")
            outcome = Failure(Kind.internal, Billed.unknown, "The worker failed; the fault is ours.")
        if kept and isinstance(outcome, Failure) and outcome.kind == Kind.internal:
            # The fault came between the picture and its judgement: it is here and paid, so it is looked at once more.
            outcome = Unjudged(Kind.transient, Billed.yes, outcome.message)
        return outcome, kept[0] if kept else None

    def _hear(self, claim: Claim, permit: Permit, outcome: Picture | Failure) -> Verdict:
        """Tell the breaker. Of a job that nobody was asked for it hears nothing: its permit is withdrawn."""
        if isinstance(outcome, Failure) and not outcome.asked:
            return Verdict()
        failure = None if isinstance(outcome, Picture | Unjudged) else outcome
        return self._breaker.ended(permit, failure, claim.job_id)

    def _let_go(self, claim: Claim) -> None:
        """The backend is done with it. Where jobs share its room, another one may come in while this one is stored."""
        self._in_hand.pop((claim.job_id, claim.fence), None)
        if self._backend.capabilities.most_at_once > 1:
            self._more(1)

    def _why_not_send(self, taken_at: float) -> str | None:
        """Why what was claimed then is given back unsent; None if it is not.

        A process that was stopped for a while and goes on, or could not read what the job starts from, may have lost
        its lease, or have less time left than a call may take: another worker makes it, and it would be paid twice.
        """
        if self._stopping.is_set():
            return "worker_stopping"
        return "worker_late" if time.monotonic() - taken_at > self._terms.lease_seconds / 2 else None

    def _judge(self, claim: Claim, data: bytes) -> Picture | Failure:
        """Of a picture that `generate` could not judge. Raises Unjudged if that still can't be."""
        try:
            return self._backend.judge(Request(claim.job_id, claim.model, claim.input), data)
        except Unjudged:
            raise
        except Failure as failure:
            return failure

    def _give_back(self, claim: Claim, failure: Failure, verdict: Verdict) -> None:
        failed_before = claim.failures + claim.refusals > 0
        excused = self._backend.capabilities.hosted and retry.excuses(failure.billed, verdict.excused, failed_before)
        decision = retry.decide(
            failure.kind,
            failures=claim.failures + (1 if retry.counts(failure.kind, excused) else 0),
            max_attempts=self._max_attempts,
            not_accepted_in_a_row=claim.refusals + 1,
            retry_after=failure.retry_after,
            jitter=_dice.random(),
            excused=excused,
            open_for=verdict.open_for,
            elsewhere=claim.asked == AUTO and bool(routing.able(self._others, claim.model, claim.input)),
        )

        def move(tx: Connection) -> None:
            if isinstance(decision, retry.Retry):
                jobs.requeue(
                    tx,
                    claim,
                    reason=failure.kind,
                    after_seconds=decision.after_seconds,
                    counts=decision.counts,
                )
            else:
                error = JobError(decision.code, failure.message, decision.retryable, failure.billed)
                jobs.fail(tx, claim, error)

        self._closing.with_failure(claim.job_id, claim.attempt, failure, move)

    def _release(self, claim: Claim, reason: str) -> None:
        with self._database.write() as tx:
            jobs.release(tx, claim, reason=reason)
            jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.canceled, Billed.no)

    def _until_done(
        self,
        step: Callable[[], _Done],
        entry: Entry | None = None,
        *,
        is_picture: bool = False,
        said: str = "holding what came back until it can be judged and stored",
    ) -> _Done:
        """Do it, and again for as long as the database is away, or whoever judges pictures. A step may run twice.

        Raises _Left if the process is to stop meanwhile: at once if what came, `entry`, is on the disk; after
        STOPPING_SECONDS if nothing is held that was paid for. A picture that is in memory alone is held on to.
        """
        told, on_disk = False, entry is not None and entry.path is not None
        give_up_at = math.inf
        while True:
            self._slots.hold()
            try:
                return step()
            except (*AWAY, Unjudged) as error:
                if not told:
                    log.warning("%s (%s)", said, type(error).__name__)
                    told = True
                self._slots.found_database_away()
            if not self._stopping.wait(self.AWAY_PAUSE_SECONDS):
                continue
            if on_disk:
                log.warning("stopping; its picture waits on the spool for the next worker")
                raise _Left
            give_up_at = min(give_up_at, time.monotonic() + self.STOPPING_SECONDS)
            if not is_picture and time.monotonic() >= give_up_at:
                log.warning("stopping; the database is away, so the job's lease gives it back")
                raise _Left
            time.sleep(self.AWAY_PAUSE_SECONDS)


def _tell(outcome: Outcome, billed: Billed, kind: str | None, seconds: float) -> None:
    """The one line of an attempt's end."""
    log.info(
        "the attempt ended",
        extra={"outcome": outcome, "billed": billed, "kind": kind, "seconds": round(seconds, 3)},
    )
