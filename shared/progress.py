"""How far a running job is: a hint, over Redis alone, from the worker to those who look on.

Soft: it has neither id nor sequence, is told a few times a second, and is lost while Redis is away. What ended, or runs
elsewhere by now, is told by the number of the attempt.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import redis
from pydantic import BaseModel, Field
from sqlalchemy import Row

from shared.courier import Courier
from shared.tables import Status

log = logging.getLogger(__name__)

CHANNEL = "darkroom.progress"

#: The backends that tell how far they are.
TELLING = frozenset({"diffusers", "automatic1111"})

#: How long it is believed without being renewed, in seconds. A step on a slow machine takes that long.
BELIEVED_SECONDS = 120


class Progress(BaseModel):
    """How far an attempt is. A hint: it may be late, and it may be missing."""

    fraction: float = Field(ge=0, le=1)
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker tells. `preview`: a small JPEG of what there is so far, or None."""

    attempt: int
    step: int
    steps: int
    preview: bytes | None

    @property
    def progress(self) -> Progress:
        return Progress(fraction=self.step / self.steps, step=self.step, steps=self.steps)


def _key(job_id: str, attempt: int) -> str:
    return f"darkroom:progress:{job_id}:{attempt}"


class ProgressTeller(Courier):
    """Tells from a thread of its own, so that no step waits for Redis: of each job the latest, a few times a second."""

    REST_SECONDS = 0.25
    #: After a failure Redis is left alone for this long.
    PAUSE_SECONDS = 2.0

    def __init__(self, redis: redis.Redis) -> None:
        super().__init__("progress")
        self._redis = redis
        self._latest: dict[str, Report] = {}

    def tell(self, job_id: str, report: Report) -> None:
        """Returns at once and never fails."""
        with self._wake:
            before = self._latest.get(job_id)
            if report.preview is None and before is not None and before.attempt == report.attempt:
                report = Report(report.attempt, report.step, report.steps, before.preview)
            self._latest[job_id] = report
            self._send()

    def _waiting(self) -> bool:
        return bool(self._latest)

    def _run_errands(self) -> float:
        with self._wake:
            latest, self._latest = self._latest, {}
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id, report in latest.items():
                    key = _key(job_id, report.attempt)
                    fields: dict[Any, Any] = {"step": report.step, "steps": report.steps}
                    if report.preview is not None:
                        fields["preview"] = report.preview
                    pipe.hset(key, mapping=fields)
                    pipe.expire(key, BELIEVED_SECONDS)
                    pipe.publish(CHANNEL, job_id)
                pipe.execute()
        except (redis.RedisError, OSError) as error:
            log.warning("Redis could not be told how far jobs are (%s)", type(error).__name__)
            return self.PAUSE_SECONDS
        return self.REST_SECONDS


class ProgressBoard:
    """Reads what was told. While Redis is away nothing is known, and nobody waits for it more than once a while."""

    PAUSE_SECONDS = 5.0

    def __init__(self, redis: redis.Redis, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._clock = clock
        self._away_until = 0.0

    def of(self, job: Row[Any]) -> Progress | None:
        """How far this job is; None if it does not run, its backend tells nothing, or nothing is known."""
        if job.status != Status.running or job.backend not in TELLING:
            return None
        report = self._read(job.id, job.attempts, "step", "steps")
        return None if report is None else report.progress

    def latest(self, job_id: str, attempt: int) -> Report | None:
        """What was told last of this attempt, with the latest preview."""
        return self._read(job_id, attempt, "step", "steps", "preview")

    def _read(self, job_id: str, attempt: int, *fields: str) -> Report | None:
        if self._clock() < self._away_until:
            return None
        try:
            found = cast(list[bytes | None], self._redis.hmget(_key(job_id, attempt), list(fields)))
        except (redis.RedisError, OSError):
            self._away_until = self._clock() + self.PAUSE_SECONDS
            return None
        step, steps, *preview = found
        if step is None or steps is None:
            return None
        return Report(attempt, int(step), int(steps), preview[0] if preview else None)
