"""What was left on the spool is offered to its jobs, before this worker's first claim and ever after.

Dead workers left it; or this one, where its storing failed for another reason than a database that is away.
"""

import contextlib
import logging
import threading
from pathlib import Path

from sqlalchemy import select

from shared import logs
from shared.database import AWAY, Database
from shared.tables import jobs as table
from worker.backends.base import Backend, Failure, Request, Unjudged
from worker.closing import Closing
from worker.spool import Entry, Spool

log = logging.getLogger(__name__)


class Recovery:
    """One thread a process, so that neither a database that is away nor many pictures keep Celery from starting.

    It goes on looking: a worker beside this one may die later, and its jobs are rescued, and paid again, after half
    a minute or so. `done` is set once all that lay there at the start was offered.
    """

    LOOK_SECONDS = 5.0
    #: Between two tries while the database, or whoever judges pictures, is away.
    AWAY_PAUSE_SECONDS = 1.0

    def __init__(
        self, database: Database, closing: Closing, backend: Backend, spool: Spool, stopping: threading.Event
    ) -> None:
        self.done = threading.Event()
        self._database = database
        self._closing = closing
        self._backend = backend
        self._spool = spool
        self._stopping = stopping
        self._told: set[Path | None] = set()
        self._thread = threading.Thread(target=self._run, name="recovery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Once `stopping` is set: wait for the picture that is in hand."""
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def round(self) -> None:
        """Offer each picture that lies there; raises AWAY, Unjudged, or OSError if the spool can't be read."""
        with contextlib.closing(self._spool.left_behind()) as entries:
            for entry in entries:
                if self._stopping.is_set():
                    return
                try:
                    with logs.about(job_id=entry.job_id, attempt=entry.attempt, backend=self._backend.name):
                        self._offer(entry)
                except (*AWAY, Unjudged):
                    raise
                except Exception:
                    # One that can't be offered keeps neither the others nor the work from going on.
                    if entry.path not in self._told:
                        self._told.add(entry.path)
                        its = {"job_id": entry.job_id, "attempt": entry.attempt}
                        log.exception("a picture that was left on the spool can't be offered", extra=its)

    def _offer(self, entry: Entry) -> None:
        assert entry.path is not None
        with self._database.read() as connection:
            query = select(table.c.model, table.c.input, table.c.request_id).where(table.c.id == entry.job_id)
            job = connection.execute(query).one_or_none()
        if job is None:
            self._spool.ignore(entry.path, "this database knows no such job")
            return
        logs.note(request_id=job.request_id)
        try:
            picture = self._backend.judge(Request(entry.job_id, job.model, job.input), entry.read())
        except Unjudged:
            raise
        except Failure as failure:
            # Its job is the rescue's: nothing but a picture ends a job that somebody else may be working at.
            self._closing.with_failure(entry.job_id, entry.attempt, failure)
            log.warning(
                "a picture that was left on the spool is of no use: %s", failure.message, extra={"kind": failure.kind}
            )
        else:
            status = self._closing.with_picture(entry.job_id, entry.attempt, picture)
            log.info("a picture that was left on the spool was offered; the job is %s", status)
        entry.remove()

    def _run(self) -> None:
        pause, told = 0.0, False
        while not self._stopping.wait(pause):
            try:
                self.round()
                pause, told = self.LOOK_SECONDS, False
            except (*AWAY, Unjudged) as error:
                if not told:
                    log.warning("what was left on the spool can't be offered yet (%s)", type(error).__name__)
                pause, told = self.AWAY_PAUSE_SECONDS, True
                continue
            except Exception:
                if not told:
                    log.exception("the spool can't be read")  # no reason not to work
                pause, told = self.LOOK_SECONDS, True
            self.done.set()
