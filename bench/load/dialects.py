"""How each system is spoken to: the same three questions, in the words of each."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bench.load.connection import Answer, request
from bench.vendor import SIDE

#: The key of the service that is measured. It lives for a run, on loopback.
API_KEY = "dk_" + "bench" * 8
KEY_HEADER = f"Authorization: Bearer {API_KEY}\r\n"


@dataclass(frozen=True)
class Dialect:
    """`prefix`: before every path; `headers`: with every request; the names of the two ends of a job."""

    prefix: str
    headers: str
    succeeded: str
    open_ones: frozenset[str]
    nested: bool  # whether the wishes stand in a field `input`
    waits: bool  # whether it knows `Prefer: wait`

    def submit(self, prompt: str, **more: int) -> bytes:
        wish: dict[str, Any] = {"prompt": prompt, "width": SIDE, "height": SIDE, **more}
        body = json.dumps({"input": wish} if self.nested else wish).encode()
        return request("POST", f"{self.prefix}/jobs", body, self.headers)

    def poll(self, job_id: str, wait: int = 0) -> bytes:
        """`wait` in seconds: only for a dialect that knows it."""
        prefer = f"Prefer: wait={wait}\r\n" if wait else ""
        return request("GET", f"{self.prefix}/jobs/{job_id}", headers=self.headers + prefer)

    def download(self, job_id: str) -> bytes:
        return request("GET", f"{self.prefix}/jobs/{job_id}/image", headers=self.headers)


class JobFailed(Exception):
    """A job that ended without a picture: nothing that was measured with it counts."""


def job_of(answer: Answer, wanted: int) -> dict[str, Any]:
    """The job in an answer. Raises RuntimeError for another status than the wanted one."""
    if answer.status != wanted:
        raise RuntimeError(f"answered {answer.status} in place of {wanted}: {answer.body[:300]!r}")
    return dict(json.loads(answer.body))


def is_done(dialect: Dialect, job: dict[str, Any]) -> bool:
    """Whether it has its picture. Raises JobFailed if it never will."""
    status = job["status"]
    if status != dialect.succeeded and status not in dialect.open_ones:
        raise JobFailed(f"a job ended as {status}: {job.get('error')}")
    return bool(status == dialect.succeeded)


def completed_at(job: dict[str, Any]) -> float:
    """When it says that it ended, in seconds since 1970. Both write it down just before they store it."""
    moment = datetime.fromisoformat(job["completed_at"])
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


DIALECTS = {
    "darkroom": Dialect("/v1", KEY_HEADER, "succeeded", frozenset({"queued", "running"}), nested=True, waits=True),
    "baseline": Dialect("", "", "SUCCESS", frozenset({"PENDING", "STARTED", "RETRY"}), nested=False, waits=False),
}
