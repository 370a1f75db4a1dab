"""One attempt at one job, top to bottom: claim, generate, put the picture, close the row."""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from shared import jobs
from shared.database import AWAY, Database
from shared.image_store import Image, ImageStore
from shared.jobs import Claim, JobError, Terms
from shared.tables import Billed, Outcome, Status
from worker import retry
from worker.backends.base import Backend, Failure, Kind, Picture, Request
from worker.claims import Claims
from worker.leases import Leases

log = logging.getLogger(__name__)


class Generation:
    """Works at the jobs of one backend. Hundreds of threads call `work()` at once."""

    #: Between two tries to store what came back while the database is away. A picture that was received is paid for:
    #: it is never thrown away, and the slot waits with it.
    AWAY_PAUSE_SECONDS = 1.0

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
    ) -> None:
        """`prices`: millionths of a dollar an image, by model. `stopping`: set once the process was asked to stop."""
        self._database = database
        self._images = images
        self._backend = backend
        self._leases = leases
        terms = Terms(worker, lease_seconds, backend.attempt_seconds, prices, max_crashes)
        self._claims = Claims(database, backend.name, terms)
        self._max_attempts = max_attempts
        self._stopping = stopping
        self._seconds: deque[float] = deque(maxlen=50)

    def work(self) -> None:
        """Claim and work until no job is left, or until asked to stop."""
        while not self._stopping.is_set() and (claim := self._claims.next()):
            self.run_attempt(claim)

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
        with self._leases.holding(claim):
            if self._stopping.is_set():
                self._until_stored(lambda: self._release(claim))
                return
            outcome = self._generate(claim)
            if isinstance(outcome, Picture):
                self._keep(claim, outcome)
            else:
                self._until_stored(lambda: self._give_back(claim, outcome))

    def _generate(self, claim: Claim) -> Picture | Failure:
        started = time.monotonic()
        try:
            request = Request(claim.job_id, claim.model, claim.input)
            outcome = self._backend.generate(
                [request], progress=lambda *_: None, canceled=lambda _index: self._leases.lost(claim)
            )[0]
            self._seconds.append(time.monotonic() - started)
            return outcome
        except Exception:
            # A fault of ours must not cost the job its life, nor the thread its. Whether it was paid, nobody knows.
            log.exception("%s: attempt %d broke off", claim.job_id, claim.attempt)
            return Failure(Kind.transient, Billed.unknown, "The worker failed; the fault is ours.")

    def _keep(self, claim: Claim, picture: Picture) -> None:
        image = Image(
            job_id=claim.job_id,
            attempt=claim.attempt,
            content_type=picture.content_type,
            width=picture.width,
            height=picture.height,
            bytes=len(picture.data),
            sha256=picture.sha256,
            warnings=[{"code": warning.code, "message": warning.message} for warning in picture.warnings],
        )
        self._until_stored(lambda: self._images.put(image, picture.data))
        self._until_stored(lambda: self._point_at(claim, image))

    def _point_at(self, claim: Claim, image: Image) -> None:
        with self._database.write() as tx:
            # Not ours any more? It was paid for all the same: it ends the job unless another picture has.
            if not jobs.succeed(tx, claim, image):
                jobs.adopt(tx, image)
            # Asked, not remembered: this may be the second try at a commit whose answer was lost.
            status, pointed_at = jobs.end_of(tx, claim.job_id)
            kept = pointed_at == claim.attempt
            outcome = Outcome.canceled if status == Status.canceled else Outcome.succeeded
            jobs.close_attempt(tx, claim.job_id, claim.attempt, outcome, Billed.yes)
        if not kept:
            self._images.remove(claim.job_id, claim.attempt)

    def _give_back(self, claim: Claim, failure: Failure) -> None:
        decision = retry.decide(
            failure.kind,
            failures=claim.failures + (1 if retry.counts(failure.kind) else 0),
            max_attempts=self._max_attempts,
            not_accepted_in_a_row=claim.refusals + 1,
            retry_after=failure.retry_after,
            jitter=random.random(),
        )
        with self._database.write() as tx:
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
            said = {"code": str(failure.kind), "message": failure.message}
            jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.failed, failure.billed, said)

    def _release(self, claim: Claim) -> None:
        with self._database.write() as tx:
            jobs.release(tx, claim, reason="worker_stopping")
            jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.canceled, Billed.no)

    def _until_stored(self, store: Callable[[], None]) -> None:
        """Do it, and again for as long as the database is away. Each `store` may run twice."""
        told = False
        while True:
            try:
                return store()
            except AWAY as error:
                if not told:
                    log.warning("the database is away (%s): holding what came back until it is there", error)
                    told = True
                threading.Event().wait(self.AWAY_PAUSE_SECONDS)
