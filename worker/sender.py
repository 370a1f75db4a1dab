"""One try of a delivery, from its claim to its end."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select

from shared import deliveries, endpoints, logs, webhook_secrets
from shared.database import AWAY, Database
from shared.deliveries import Claim, Result
from shared.events import jobs_of
from shared.tables import TryOutcome, events
from shared.tables import endpoints as endpoint_rows
from shared.webhook_secrets import Unreadable, Vault
from worker import webhooks
from worker.claims import Claims
from worker.posting import NotDelivered, Poster
from worker.slots import Slots

log = logging.getLogger(__name__)

USER_AGENT = "Darkroom-Webhooks/0.1"


@dataclass(frozen=True)
class Letter:
    """What is sent, as it was read for this try."""

    body: bytes
    secrets: list[str]


class Sender:
    """Sends what is due. Its threads share the claims; half of them at most wait for those who fail or are new."""

    #: Between two tries to write down an end while the database is away.
    AWAY_PAUSE_SECONDS = 1.0
    #: A try takes 15 s, and what is read and written around it less than this.
    MOST_SECONDS = 45.0

    def __init__(
        self,
        *,
        database: Database,
        poster: Poster,
        vault: Vault,
        worker: str,
        slots: int,
        base_url: str,
        secret_key: str,
        stopping: threading.Event,
        more: Callable[[int], None] = lambda count: None,
        watched: Slots | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`base_url`: where receivers reach this service. `stopping`: set once the process was asked to stop.

        `watched`: what is told of each step.
        """
        self._database = database
        self._poster = poster
        self._vault = vault
        self._worker = worker
        self._base_url = base_url
        self._secret_key = secret_key
        self._stopping = stopping
        self._clock = clock
        self._most_probes = max(slots // 2, 1)
        self._probes = 0
        self._lock = threading.Lock()
        self._claims = Claims(self._take, more)
        self._watched = watched or Slots(slots)

    def work(self) -> None:
        """Claim and send until nothing is due, or until asked to stop."""
        with self._watched.work() as slot:
            while not self._stopping.is_set() and (claim := self._claims.next()):
                slot.hold(self.MOST_SECONDS)
                try:
                    self.send(claim)
                finally:
                    with self._lock:
                        self._probes -= claim.probe
                slot.end()

    def close(self) -> None:
        self._poster.close()

    def _take(self, limit: int) -> list[Claim]:
        with self._database.write() as tx:
            taken = deliveries.claim(tx, self._worker, limit=limit, probes=self._most_probes - self._probes)
        with self._lock:
            self._probes += sum(claim.probe for claim in taken)
        return taken

    def send(self, claim: Claim) -> None:
        """Make one try, and write down what became of it."""
        job_id = claim.subject_id if claim.subject_id.startswith("job_") else None
        with logs.about(delivery_id=claim.delivery_id, event_id=claim.event_id, job_id=job_id):
            self._send(claim)

    def _send(self, claim: Claim) -> None:
        try:
            result = self._try(claim)
        except AWAY as error:
            # Its lease runs out, and the sweep makes it due again.
            log.warning("the delivery could not be read, the database is away (%s)", type(error).__name__)
            return
        except Exception:
            log.exception("the try broke off")
            result = _ours("internal", "The sender failed; the fault is ours.")
        self._settle(claim, result)

    def _try(self, claim: Claim) -> Result:
        letter = self._write(claim)
        if isinstance(letter, Result):
            return letter
        headers = webhooks.signed(letter.secrets, claim.event_id, int(self._clock()), letter.body)
        fixed = {"Content-Type": "application/json; charset=utf-8", "User-Agent": USER_AGENT}
        started = time.monotonic()
        try:
            return webhooks.judge(self._poster.post(claim.url, letter.body, {**fixed, **headers}))
        except NotDelivered as failure:
            return webhooks.judge_failure(failure, time.monotonic() - started)

    def _write(self, claim: Claim) -> Letter | Result:
        with self._database.read() as connection:
            if claim.endpoint_id is not None:
                disabled = select(endpoint_rows.c.disabled_at).where(endpoint_rows.c.id == claim.endpoint_id)
                row = connection.execute(disabled).one_or_none()
                if row is None or row.disabled_at is not None:
                    return _ours("endpoint_closed", "The endpoint was disabled or removed.", closed=True)
            event = connection.execute(select(events).where(events.c.id == claim.event_id)).one()
            job: Row[Any] | None = connection.execute(jobs_of([event])).one_or_none()
            if job is not None:
                logs.note(request_id=job.request_id)
            try:
                secrets = webhook_secrets.live(connection, self._vault, claim.endpoint_id or claim.project_id)
            except Unreadable as error:
                log.error("%s", error)
                return _ours("unreadable_secret", "Its secret can't be read; the operator must mend this.")
        body = webhooks.body_of(event, job, self._base_url, self._secret_key)
        return Letter(body, secrets or [self._first_secret(claim.project_id)])

    def _first_secret(self, project_id: str) -> str:
        """A job names a URL in a project that never asked for its secret."""
        with self._database.write() as tx:
            return webhook_secrets.of_project(tx, self._vault, project_id)

    def _settle(self, claim: Claim, result: Result) -> None:
        while True:
            try:
                with self._database.write() as tx:
                    reason = deliveries.settle(tx, claim, result)
                    if reason is not None and claim.endpoint_id is not None:
                        endpoints.disable(tx, claim.endpoint_id, reason)
                    if result.closed and claim.endpoint_id is not None:
                        endpoints.drop_more(tx, claim.endpoint_id)
            except AWAY as error:
                log.warning("the end of the try waits for the database (%s)", type(error).__name__)
                self._watched.found_database_away()
                if self._stopping.wait(self.AWAY_PAUSE_SECONDS):
                    return  # sent again, with the same id, by whoever comes next
            else:
                seconds = None if result.seconds is None else round(result.seconds, 3)
                its = {"attempt": claim.number, "outcome": result.outcome, "status": result.status, "seconds": seconds}
                log.info("the try ended", extra={**its, "kind": (result.error or {}).get("code")})
                return


def _ours(code: str, message: str, *, closed: bool = False) -> Result:
    """A try that sent nothing."""
    error: Mapping[str, str] = {"code": code, "message": message}
    return Result(TryOutcome.failed, error=error, final=closed, blameless=True, closed=closed)
