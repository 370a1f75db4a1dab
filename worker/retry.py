"""What to do after a failure. Pure: no I/O, no clock, no chance (`jitter` is handed in).

| kind | counts | pause before the next try | in the end |
| --- | --- | --- | --- |
| rejected | - | never tried again | `rejected` |
| unsafe | - | never tried again (nor elsewhere: that would be a way round the rules) | `content_filtered` |
| bad_output | yes | full jitter: 0 to 2, 4, 8 … at most 60 s | `bad_output` at max_attempts |
| transient | yes | the same | `backend_unavailable` at max_attempts |
| transient, excused | no | half to all of 2, 4, 8 … at most 60 s | the job's time in the queue |
| out_of_memory | yes | the same | `out_of_memory` at max_attempts |
| internal | yes | the same | `internal_error` at max_attempts |
| rate_limited | no | the same, or what Retry-After says | the job's time in the queue |
| not_accepted | no | the same | the job's time in the queue |
| canceled | no | none: its job has ended, or is somebody else's by now | - |
| quota_exhausted | no | a minute: an operator must mend it | the job's time in the queue |
| auth_failed | no | the same | the job's time in the queue |

A Retry-After, of any kind, is obeyed between 1 s and 15 min: a pause is never shorter than it, and at most a tenth
longer, so that a thousand jobs don't come back in the same instant. NaN and negative values are ignored.

What counts was answered, and may cost money, so it is bounded in number; there full jitter spreads best. What does
not count is bounded in time alone, so its pause has a floor: without one it would be a loop that knocks without rest.

A `transient` failure of a hosted backend is excused if it costs nothing, and may have been the backend's own: the
breaker is open, the call was its probe, the call that ended before it failed too, or it is the first that befell this
job (an outage begins with one). So an outage burns no attempt; a job that fails alone, while others succeed, has one
try more; and so does one that alone has failed for a quarter of an hour while nothing else ran (worker/breaker.py).
What may have to be paid always counts: each job has at most max_attempts such bills, however long an outage is.

Where another backend may do the job (`elsewhere`), its pause is TURN at least: in it the sweep moves the job there, if
that backend is well (worker/rerouting.py).

While the breaker is open, its pause takes the place of a shorter one. A job that failed comes back a little after it,
so that the next probe is another job: else one that always fails could keep the breaker open.
"""

import math
from dataclasses import dataclass

from shared.errors import JobErrorCode
from worker.backends.base import Billed, Kind

FIRST_PAUSE = 2.0  # seconds; doubles with every failure
LONGEST_PAUSE = 60.0
OPERATOR_PAUSE = 60.0
RETRY_AFTER_BOUNDS = (1.0, 900.0)
SPREAD = 0.1  # of a pause that somebody asked for
TURN = 2.0  # seconds: so long others have their turn after a failure: another job as probe, another backend


@dataclass(frozen=True)
class Retry:
    """Back into the queue. `counts`: whether this failure is one of the job's max_attempts."""

    after_seconds: float
    counts: bool


@dataclass(frozen=True)
class Fail:
    """The end of the job. `retryable`: whether the client may hope for more from the same request later."""

    code: JobErrorCode
    retryable: bool


FINAL = {
    Kind.rejected: Fail(JobErrorCode.rejected, retryable=False),
    Kind.unsafe: Fail(JobErrorCode.content_filtered, retryable=False),
}
COUNTED = {
    Kind.bad_output: Fail(JobErrorCode.bad_output, retryable=True),
    Kind.transient: Fail(JobErrorCode.backend_unavailable, retryable=True),
    Kind.out_of_memory: Fail(JobErrorCode.out_of_memory, retryable=True),
    Kind.internal: Fail(JobErrorCode.internal_error, retryable=True),
}
WAITS_FOR_AN_OPERATOR = frozenset({Kind.quota_exhausted, Kind.auth_failed})


def counts(kind: Kind, excused: bool = False) -> bool:
    """Whether a failure of this kind is one of the job's max_attempts, if the job goes on."""
    return kind in COUNTED and not (excused and kind == Kind.transient)


def excuses(billed: Billed, may_be_the_backends: bool, failed_before: bool) -> bool:
    """Whether a transient failure is excused, as said above."""
    return billed == Billed.no and (may_be_the_backends or not failed_before)


def decide(
    kind: Kind,
    failures: int,
    max_attempts: int,
    not_accepted_in_a_row: int,
    retry_after: float | None,
    jitter: float,
    *,
    excused: bool = False,
    open_for: float | None = None,
    elsewhere: bool = False,
) -> Retry | Fail:
    """The table above.

    `failures`: the job's failures that count, this one included if it does. `not_accepted_in_a_row`: how many of its
    last tries in a row did not count, this one included if it does not. `retry_after`: seconds, as asked by the
    backend. `jitter`: 0 to below 1. `excused`: as said above. `open_for`: seconds until the breaker's next probe; None:
    it is closed. `elsewhere`: whether another backend may do the job.
    """
    if kind in FINAL:
        return FINAL[kind]
    if kind == Kind.canceled:
        return Retry(0, counts=False)
    shortest = TURN if elsewhere else 0.0
    asked = _asked(retry_after, jitter)
    if open_for is not None:
        asked = max(asked, open_for * (1 + SPREAD * jitter) + (TURN if kind == Kind.transient else 0))
    if counts(kind, excused):
        if failures >= max_attempts:
            return COUNTED[kind]
        return Retry(max(jitter * _ceiling(failures), asked, shortest), counts=True)
    if kind in WAITS_FOR_AN_OPERATOR:
        return Retry(max(OPERATOR_PAUSE * (1 + SPREAD * jitter), asked), counts=False)
    return Retry(max(asked or _ceiling(not_accepted_in_a_row) * (1 + jitter) / 2, shortest), counts=False)


def _ceiling(times: int) -> float:
    # The exponent is bounded because 2.0**1024 overflows, and a job may be refused for a day.
    return min(FIRST_PAUSE * 2.0 ** min(max(times - 1, 0), 16), LONGEST_PAUSE)


def bounded(retry_after: float | None) -> float | None:
    """A Retry-After as it is obeyed, in seconds; None for none, and for nonsense."""
    if retry_after is None or math.isnan(retry_after) or retry_after < 0:
        return None
    shortest, longest = RETRY_AFTER_BOUNDS
    return min(max(retry_after, shortest), longest)


def _asked(retry_after: float | None, jitter: float) -> float:
    return (bounded(retry_after) or 0.0) * (1 + SPREAD * jitter)
