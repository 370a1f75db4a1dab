"""The heartbeat: one thread a process renews the leases of exactly the claims that this process is working on.

It uses a database connection of its own, so that it never queues behind the work. A claim that is no longer ours
(canceled, or rescued after an outage) is found out here at the latest.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from shared import jobs
from shared.database import AWAY, Database
from shared.jobs import Claim

log = logging.getLogger(__name__)


class Leases:
    """The claims in this process's hands."""

    #: After a failed renewal, the pause before the next try: the lease goes on running meanwhile.
    RETRY_SECONDS = 1.0
    #: After failed renewals nothing is claimed before this long after a good one. A database whose disk is full takes
    #: some writes and refuses others: a rescue may pass where a renewal does not. So the job of a picture that waits to
    #: be stored (Generation tries every second) may be in the queue again, and would be paid again.
    STEADY_SECONDS = 3.0
    #: However long a lease is, so often a worker shows that it is there.
    LONGEST_BEAT_SECONDS = 5.0
    #: Pairs in one statement; SQLite takes 32,766 parameters at most.
    CHUNK = 500

    def __init__(
        self, database: Database, lease_seconds: float, present: Callable[[Connection], None] = lambda tx: None
    ) -> None:
        """`present`: what else a beat writes, to show that this process is there."""
        self._database = database.dedicated()
        self._lease_seconds = lease_seconds
        self._present = present
        self._held: set[tuple[str, int]] = set()
        self._lost: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._hurry = threading.Event()
        self._steady_at = 0.0
        #: How often the heartbeat came round, well or not.
        self.turns = 0
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop renewing. What is still held lapses and is rescued."""
        self._closed.set()
        self._hurry.set()
        self._thread.join(timeout=10)
        self._database.close()

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Renew this claim's lease for as long as the block runs."""
        pair = (claim.job_id, claim.fence)
        with self._lock:
            self._held.add(pair)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(pair)
                self._lost.discard(pair)

    def lost(self, claim: Claim) -> bool:
        """Whether somebody else decided about this job in the meantime."""
        return (claim.job_id, claim.fence) in self._lost

    def look_again(self, job_id: str | None) -> None:
        """Something happened to this job (None: to any): if it is held here, find out now whether it still is ours."""
        with self._lock:
            held = bool(self._held) if job_id is None else any(job_id == held for held, _ in self._held)
        if held:
            self._hurry.set()

    def steady(self) -> bool:
        """Whether what is claimed now will be renewed."""
        return time.monotonic() >= self._steady_at

    def renew(self) -> None:
        """One beat. Raises what the database raises when it is away."""
        with self._lock:
            held = sorted(self._held)
        for start in range(0, len(held), self.CHUNK):
            chunk = held[start : start + self.CHUNK]
            with self._database.write() as tx:
                ours = jobs.renew(tx, chunk, self._lease_seconds)
            with self._lock:
                self._lost.update(self._held.intersection(set(chunk) - ours))
        with self._database.write() as tx:  # last: whatever is wrong with it, no lease lapses for it
            self._present(tx)

    def _run(self) -> None:
        pause, beat = 0.0, min(self._lease_seconds / 4, self.LONGEST_BEAT_SECONDS)
        while True:
            self._hurry.wait(pause)
            self._hurry.clear()
            if self._closed.is_set():
                return
            self.turns += 1
            try:
                self.renew()
                pause = beat
                if self._steady_at == math.inf:
                    self._steady_at = time.monotonic() + self.STEADY_SECONDS
            except AWAY as error:
                log.warning("leases could not be renewed, the database is away (%s)", type(error).__name__)
                pause, self._steady_at = self.RETRY_SECONDS, math.inf
            except Exception:
                log.exception("leases could not be renewed")
                pause, self._steady_at = self.RETRY_SECONDS, math.inf
