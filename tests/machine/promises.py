"""What must hold: of each move when it is committed, of all rows after each rule, and of everything in the end.

Written from the contract, not from the code: it is the machine's second opinion.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Row, select

from shared.database import Database
from shared.image_store import ImageStore
from shared.tables import attempts, events, images, jobs

#: The one that workers work for.
BACKEND = "dataoorts"
TERMINAL = {"succeeded", "failed", "canceled", "expired"}
LIFE = {
    "job.queued": {"job.queued", "job.started", "job.succeeded", "job.failed", "job.canceled", "job.expired"},
    "job.started": {"job.queued", "job.succeeded", "job.failed", "job.canceled"},
}
EVENT_OF = {"running": "job.started"} | {status: f"job.{status}" for status in ("queued", *TERMINAL)}

Job = Row[Any]
Attempt = tuple[str, int]


class Clock(Protocol):
    now: datetime


class Promises:
    """`broken`: those that did not hold. Nothing is raised where the code under test could catch it."""

    def __init__(
        self,
        database: Database,
        image_store: ImageStore,
        clock: Clock,
        spool: Path,
        max_attempts: int,
        max_crashes: int,
        looks: Callable[[], int],
    ) -> None:
        """`looks`: how often the sweep that rescues now has looked at what lapsed since the database was away."""
        self.broken: list[str] = []
        self._database = database
        self._images = image_store
        self._clock = clock
        self._spool = spool
        self._max_attempts = max_attempts
        self._max_crashes = max_crashes
        self._looks = looks
        self._jobs: dict[str, Job] = {}
        self._closed: dict[Attempt, tuple[str, str]] = {}
        self._paid: dict[Attempt, bool] = {}
        self._safe: dict[Attempt, bytes] = {}
        self.folders_in_use: set[Path] = set()

    def jobs(self) -> list[str]:
        """In the order of their submission."""
        return list(self._jobs)

    def ended_jobs(self) -> list[str]:
        return [job.id for job in self._jobs.values() if job.status in TERMINAL]

    # -- What the vendor and the spool tell -----------------------------------------------------------------------

    def a_call_is_made(self, job_id: str, attempt: int, paid: bool) -> None:
        begun = select(attempts.c.number).where(attempts.c.job_id == job_id, attempts.c.number == attempt)
        with self._database.read() as connection:
            self._holds(connection.scalar(begun) is not None, "an attempt is a row before the vendor is called")
        self._holds((job_id, attempt) not in self._paid, "an attempt calls the vendor once")
        self._paid[job_id, attempt] = paid

    def a_picture_is_safe(self, job_id: str, attempt: int, data: bytes) -> None:
        self._safe[job_id, attempt] = data

    def what_a_dead_worker_left(self, path: Path) -> None:
        self._holds(path.parent not in self.folders_in_use, "nobody touches what a living worker spooled")

    def an_entry_is_removed(self, job_id: str, attempt: int) -> None:
        row = self._attempts()[job_id, attempt]
        self._holds(
            row.outcome not in ("running", "unknown") and row.billed == "yes",
            "a picture leaves the spool after the commit that settles its attempt",
        )
        spoilt = self._safe[job_id, attempt].startswith(b"spoilt")
        self._holds(spoilt == (row.outcome == "failed"), "a whole picture is never thrown away as a failure")
        with self._database.read() as connection:
            job = connection.execute(select(jobs).where(jobs.c.id == job_id)).one()
        self._holds(spoilt or job.status in TERMINAL, "a whole picture ends its job, unless that has ended")
        stored = attempt in [image.attempt for image in self._images.of_job(job_id)]
        self._holds(
            not stored or job.data_removed or job.image_attempt == attempt,
            "a picture that ends no job is removed by whoever put it",
        )

    def a_job_is_canceled(self, job_id: str) -> None:
        self._holds(self._jobs[job_id].status == "canceled", "what is open can be canceled")

    # -- After every commit ---------------------------------------------------------------------------------------

    def after_a_commit(self) -> None:
        with self._database.read() as connection:
            rows = connection.execute(select(jobs)).all()
        for new in rows:
            old = self._jobs.get(new.id)
            if old is None:
                self._holds(new.status == "queued" and new.sequence == 1 and new.ready, "a job begins in the queue")
            elif old.status != new.status or old.sequence != new.sequence:
                self._moved(old, new)
            elif old.status in TERMINAL:
                removed = new.data_removed and not old.data_removed and new.image_attempt is None
                self._holds(removed or tuple(old) == tuple(new), "what has ended changes no more")
            self._stands(new)
            self._jobs[new.id] = new
        running = Counter(job.worker for job in rows if job.status == "running" and self._is_suspect(job))
        self._holds(max(running.values(), default=0) <= 1, "a process runs one suspect at a time")

    def _is_suspect(self, job: Job) -> bool:
        return bool(job.crashes + 1 >= self._max_crashes)

    def _moved(self, old: Job, new: Job) -> None:
        self._holds(new.sequence == old.sequence + 1, "a move is one event")
        self._holds(new.backend == old.backend or new.status == "queued", "only who waits changes its backend")
        self._holds(
            new.failures - old.failures in (0, 1) and new.crashes - old.crashes in (0, 1), "an end is counted once"
        )
        how = {
            ("queued", "running"): self._claimed,
            ("queued", "queued"): self._moved_on,
            ("running", "queued"): self._came_back,
            ("queued", "succeeded"): self._succeeded,
            ("running", "succeeded"): self._succeeded,
            ("running", "failed"): self._failed,
            ("queued", "canceled"): self._canceled,
            ("running", "canceled"): self._canceled,
            ("queued", "expired"): self._expired,
            ("queued", "failed"): self._gave_up,
        }.get((old.status, new.status))
        if how is None:
            self.broken.append(f"no move leads from {old.status} to {new.status}")
        else:
            how(old, new)
        if how not in (self._claimed, self._succeeded):
            self._holds((new.fence, new.attempts) == (old.fence, old.attempts), "only claim and adopt pass the fence")

    def _claimed(self, old: Job, new: Job) -> None:
        now = self._clock.now
        self._holds((new.fence, new.attempts) == (old.fence + 1, old.attempts + 1), "a claim passes the fence")
        self._holds(old.ready, "who backs off is not claimed")
        self._holds(old.backend == BACKEND, "a worker claims what waits for its backend")
        self._holds(not self._is_too_old(old), "what waited too long is not claimed")
        self._holds(now < new.lease_until <= new.attempt_deadline_at, "a claim is under a lease")

    def _moved_on(self, old: Job, new: Job) -> None:
        self._holds(new.backend != old.backend and new.ready, "who is moved on waits for another backend, at once")
        self._holds(
            new.routing[:-1] == old.routing and new.routing[-1]["backend"] == new.backend, "and it is written down"
        )
        self._holds((new.failures, new.rank) == (old.failures, old.rank), "its past and its place stay as they are")

    def _came_back(self, old: Job, new: Job) -> None:
        if new.crashes > old.crashes:
            self._is_rescued(old)
            self._holds(new.ready and new.failures == old.failures, "a rescued job may be claimed at once")
        else:
            self._holds(new.ready or new.ready_at is not None, "who backs off has a time to come back")

    def _is_rescued(self, old: Job) -> None:
        self._holds(old.lease_until < self._clock.now, "only a lapsed lease is rescued")
        self._holds(self._looks() >= 2, "and only when it was seen twice since the database was away")

    def _succeeded(self, old: Job, new: Job) -> None:
        own = old.status == "running" and new.image_attempt == new.attempts
        passed = new.fence - old.fence
        self._holds(new.attempts == old.attempts, "a picture is no attempt")
        self._holds(passed in (0, 1) and (own or passed == 1), "only the claim's own picture leaves the fence as it is")

    def _failed(self, old: Job, new: Job) -> None:
        if new.crashes > old.crashes:
            self._is_rescued(old)
            self._holds(
                new.crashes == self._max_crashes and new.error["code"] == "worker_crashed",
                "max_crashes deaths end a job, and no fewer",
            )
        else:
            self._holds(new.failures == old.failures + 1, "a failure counts")
            self._holds(new.error["code"] != "worker_crashed", "a failure is no death")

    def _canceled(self, old: Job, new: Job) -> None: ...

    def _expired(self, old: Job, new: Job) -> None:
        self._holds(old.failures + old.crashes == 0, "who was tried does not expire")
        self._holds(self._is_too_old(old), "who may still wait does not expire")

    def _gave_up(self, old: Job, new: Job) -> None:
        self._holds(old.failures + old.crashes > 0 and self._is_too_old(old), "who may still wait is not given up")

    def _is_too_old(self, job: Job) -> bool:
        now, never_tried = self._clock.now, job.failures + job.crashes == 0
        return bool(job.queue_until < now or (never_tried and job.deadline_at is not None and job.deadline_at < now))

    def _stands(self, job: Job) -> None:
        lease = (job.worker, job.lease_until, job.attempt_deadline_at)
        if job.status == "running":
            self._holds(None not in lease, "who runs has a worker and a lease")
            self._holds(job.lease_until <= job.attempt_deadline_at, "no lease reaches beyond its attempt")
            self._holds(job.fence == job.attempts, "whoever runs holds the newest fence")
        else:
            self._holds(lease == (None, None, None), "who does not run has neither worker nor lease")
        if job.status == "queued":
            self._holds(job.ready == (job.ready_at is None), "who waits is ready, or has a time to be")
        self._holds((job.completed_at is not None) == (job.status in TERMINAL), "what has ended says when")
        self._holds((job.error is not None) == (job.status in ("failed", "expired")), "what failed says why")
        pointed = job.status == "succeeded" and not job.data_removed
        self._holds((job.image_attempt is not None) == pointed, "who succeeded points at a picture, and nobody else")
        crashed = job.status == "failed" and job.error["code"] == "worker_crashed"
        self._holds((job.crashes >= self._max_crashes) == crashed, "max_crashes deaths are worker_crashed")
        self._holds(job.failures <= self._max_attempts, "no more failures than max_attempts")

    # -- After every rule -----------------------------------------------------------------------------------------

    def after_a_rule(self) -> None:
        self._pictures()
        self._events()
        self._books()
        self.raise_if_broken()

    def _pictures(self) -> None:
        """Those that jobs point at are there."""
        query = select(images.c.job_id, images.c.attempt, images.c.sha256)
        with self._database.read() as connection:
            stored = {(row.job_id, row.attempt): row.sha256 for row in connection.execute(query)}
        for job in self._jobs.values():
            if job.image_attempt is not None:
                there = stored.get((job.id, job.image_attempt))
                self._holds(there == job.image_sha256, "who succeeded has a readable picture")

    def _events(self) -> None:
        where = events.c.subject_id, events.c.sequence
        query = select(*where, events.c.type).order_by(*where)
        told: dict[str, list[tuple[int, str]]] = defaultdict(list)
        with self._database.read() as connection:
            for row in connection.execute(query):
                told[row.subject_id].append((row.sequence, row.type))
        for job in self._jobs.values():
            numbers, types = zip(*told[job.id], strict=True)
            self._holds(list(numbers) == list(range(1, job.sequence + 1)), "every move is an event, numbered")
            follow = all(then in LIFE.get(first, ()) for first, then in pairwise(types))
            self._holds(follow, "events tell a life, with one end")
            self._holds(types[-1] == EVENT_OF[job.status], "the last event tells where the job stands")

    def _books(self) -> None:
        rows = self._attempts()
        for place, row in rows.items():
            job = self._jobs[row.job_id]
            paid = self._paid.get(place, False)
            self._holds(row.billed == "unknown" or (row.billed == "yes") == paid, "what is billed is what was paid")
            self._holds(row.outcome != "running" or row.billed == "unknown", "what runs may cost")
            self._holds((row.completed_at is None) == (row.outcome == "running"), "what is closed says when")
            before = self._closed.get(place)
            closed = (row.outcome, row.billed)
            if before is not None and before[0] not in ("running", "unknown"):
                self._holds(closed == before, "a settled attempt changes no more")
            if before is not None and before[0] == "unknown":
                self._holds(row.outcome != "running", "no attempt begins again")
            self._closed[place] = closed
            let_go = job.status in ("queued", "failed", "expired") or row.number < job.attempts
            if let_go:
                self._holds(row.outcome != "running", "who lets a job go closes its attempt")
        self._holds(self._paid.keys() <= rows.keys(), "every call stands in the books")
        numbers = Counter(job_id for job_id, _ in rows)
        for job in self._jobs.values():
            self._holds(numbers[job.id] == job.attempts, "every claim is an attempt, once")
            calls = sum(paid for (job_id, _), paid in self._paid.items() if job_id == job.id)
            self._holds(calls <= job.failures + job.crashes + 1, "a job is paid again only after a failure or a death")
            its = Counter(row.outcome for row in rows.values() if row.job_id == job.id and row.billed != "no")
            image = int(job.status == "succeeded")
            late = max(its["succeeded"] - image, 0)
            self._holds(late <= job.crashes, "only a worker that counted as dead makes a picture too many")
            known = image + late + its["unknown"] + its["canceled"] + its["failed"] + its["running"]
            self._holds(
                calls <= known, "a call is its job's picture, a late one, canceled, a billed failure, or unknown"
            )
            self._holds(job.status != "expired" or calls == 0, "what expired cost nothing")

    def _attempts(self) -> dict[Attempt, Row[Any]]:
        with self._database.read() as connection:
            return {(row.job_id, row.number): row for row in connection.execute(select(attempts))}

    # -- In the end -----------------------------------------------------------------------------------------------

    def all_has_ended(self) -> bool:
        return (
            all(job.status in TERMINAL for job in self._jobs.values())
            and all(row.outcome != "running" for row in self._attempts().values())
            and not self._spooled()
        )

    def nobody_waits(self) -> None:
        """Called once tickets for all that wait were taken, and worked off."""
        for job in self._jobs.values():
            claimable = job.status == "queued" and job.ready and job.backend == BACKEND
            waits = claimable and not self._is_suspect(job) and not self._is_too_old(job)
            self._holds(not waits, "who can be claimed is claimed, whatever became of the tickets")

    def in_the_end(self) -> None:
        """Once everybody could go on: every job has ended, nothing lies about, and the books are right."""
        self.after_a_rule()
        for job in self._jobs.values():
            self._holds(job.status in TERMINAL, f"every job ends, and one is {job.status}")
        rows = self._attempts()
        for place, row in rows.items():
            self._holds(row.outcome != "running", "every attempt is closed")
            if place in self._safe:
                self._holds(row.billed == "yes", "a picture that was safe on the disk is accounted for")
        pointed = {(job.id, job.image_attempt) for job in self._jobs.values() if job.image_attempt is not None}
        stored = set(self._images.page(("", 0), 1000))
        self._holds(stored == pointed, "there are the pictures that jobs point at, and no others")
        self._holds(not self._spooled(), f"nothing is left on the spool: {self._spooled()}")
        with self._database.read() as connection:
            told = connection.execute(select(events.c.subject_id, events.c.sequence, events.c.number)).all()
        self._holds(None not in [row.number for row in told], "every event has its number in the feed")
        in_order = sorted(told, key=lambda row: row.number or 0)
        self._holds([row.number for row in in_order] == list(range(1, len(told) + 1)), "which no other has")
        sorted_by_job = sorted(in_order, key=lambda row: row.subject_id)  # it keeps the order of each one's numbers
        by_life = sorted(told, key=lambda row: (row.subject_id, row.sequence))
        self._holds(sorted_by_job == by_life, "and a job's events stand there in the order of its life")
        taken = sum(rows[place].price for place, paid in self._paid.items() if paid)
        bill = sum(row.price for row in rows.values() if row.billed != "no")
        in_vain = sum(
            row.price for place, row in rows.items() if row.billed == "unknown" and not self._paid.get(place, False)
        )
        self._holds(bill == taken + in_vain, "the bill is what the vendor took, and what is unknown in full")
        self.raise_if_broken()

    def _spooled(self) -> list[str]:
        return sorted(path.name for path in self._spool.rglob("*.picture*"))

    # -------------------------------------------------------------------------------------------------------------

    def _holds(self, condition: bool, promise: str) -> None:
        if not condition:
            self.broken.append(promise)

    def raise_if_broken(self) -> None:
        if self.broken:
            raise AssertionError("; ".join(dict.fromkeys(self.broken)))
