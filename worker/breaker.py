"""When a backend's breaker opens and closes. Pure: no I/O, no clock (`now` is handed in), no chance.

It opens

| for | when | until its first probe |
| --- | --- | --- |
| failing | 10 of the latest 20 calls that ended, over all workers, were `transient` or `not_accepted` | 5 s |
| rate_limited | one call was | what Retry-After says, else 5 s |
| quota_exhausted, auth_failed | one call was | a minute |

and, whatever the kind, not before a Retry-After that came with it; within 1 s and 15 min (`worker/retry.py`). When the
pause is over one job is claimed as a probe. If the vendor makes its picture, or refuses this one request, the breaker
closes; otherwise the pause begins anew, with a minute at least where the probe may have to be paid.

Ten in a row open it however busy it is (a share of all calls of a while would let thousands fail first), and one call
in five that fails hardly ever does (one chance in 400 a call). What a single job did (`rejected`, `unsafe`,
`bad_output`, `out_of_memory`), what is ours (`internal`), and what was `canceled` says nothing of the backend. What was
refused before anybody was asked (`Failure.asked`) is not told here at all: its permit is withdrawn.

Calls end in any order. Each says in which turn of the breaker it was sent: what was sent before it closed last is news
from the outage, and ignored; so is, while it is open, the success of a call that was sent before.

A job that fails while nothing else runs looks like an outage, and an outage burns no attempt: it would be tried for a
day. So who has failed alone for ALONE_SECONDS, without a success or another job's failure in between, is not excused.
"""

from dataclasses import dataclass, replace

from shared.breaker import PROBE_SECONDS, Breaker, Reason
from worker.backends.base import Billed, Failure, Kind
from worker.retry import OPERATOR_PAUSE, bounded

#: So many of the latest calls are looked at, and so many failures among them open it.
WINDOW, ENOUGH_FAILURES = 20, 10
#: Without another failure for so long, in seconds, the window is empty again. Longer than a job's longest pause.
FORGOTTEN_AFTER = 120.0
#: Between two probes of a failing backend, in seconds.
PAUSE = 5.0
#: After a probe that may have to be paid, at least.
COSTLY_PAUSE = 60.0
#: So long an outage may touch one job alone, and burn none of its attempts.
ALONE_SECONDS = 900.0
#: After it closed, so many jobs in the hands of each process, and twice as many with each second.
FIRST_SLOTS, ALL_AFTER = 5, 8.0

REASONS = {
    Kind.transient: Reason.failing,
    Kind.not_accepted: Reason.failing,
    Kind.rate_limited: Reason.rate_limited,
    Kind.quota_exhausted: Reason.quota_exhausted,
    Kind.auth_failed: Reason.auth_failed,
}
#: What a probe may end with beside a picture, and the backend is well: it has judged the request.
_JUDGED = frozenset({Kind.rejected, Kind.unsafe})


@dataclass(frozen=True)
class Permit:
    """Leave to send `calls` calls, in this turn of the breaker. `probe`: as a probe, of this name."""

    calls: int
    turn: int = 0
    probe: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What is known of the backend when a call ends.

    `open_for`: seconds until the next probe; None if the breaker is closed. `excused`: a failure of this call may well
    have been the backend's, not the job's: the breaker is open, it was a probe, or the call before failed too; and its
    job is not the only one that has failed for long.
    """

    open_for: float | None = None
    excused: bool = False


def admit(breaker: Breaker, now: float, wanted: int, in_hand: int, name: str) -> tuple[Breaker, Permit]:
    """How many jobs may be claimed, where `wanted` could be, by a process that has `in_hand` of them.

    `name`: what the probe is called, if it is to be one.
    """
    if not breaker.is_open:
        return breaker, Permit(min(wanted, max(_slots(breaker, now) - in_hand, 0)), breaker.turns)
    if wanted < 1 or breaker.open_for(now) or breaker.is_probed(now):
        return breaker, Permit(0, breaker.turns)
    # Its pause is over, also by a clock that was set back since: it does not begin again if the probe's worker dies.
    probed = replace(breaker, until=min(breaker.until, now), probe=name, probe_until=now + PROBE_SECONDS)
    return probed, Permit(1, breaker.turns, name)


def renew(breaker: Breaker, now: float, name: str) -> tuple[Breaker, bool]:
    """The probe is still at work. Whether it still is the probe."""
    if breaker.probe != name:
        return breaker, False
    return replace(breaker, probe_until=now + PROBE_SECONDS), True


def withdraw(breaker: Breaker, now: float, name: str) -> tuple[Breaker, None]:
    """The probe was not sent: the next one may be, at once."""
    if breaker.probe != name:
        return breaker, None
    return replace(breaker, probe=None, probe_until=0.0), None


def ended(
    breaker: Breaker, now: float, permit: Permit, failure: Failure | None, job_id: str
) -> tuple[Breaker, Verdict]:
    """A call for this job ended with a picture, or with this failure."""
    if not breaker.is_open:
        heard = permit.turn >= breaker.turns
        doubtful = not heard or _recent(breaker, now).endswith("-")
        after = _while_closed(breaker, now, failure) if heard else breaker
    else:
        heard = permit.turn >= breaker.turns - 1
        doubtful = True
        after = _while_open(breaker, now, permit, failure) if heard else breaker
    if heard:
        after = _alone(breaker, after, now, failure, job_id)
    alone = after.alone == job_id and now - after.alone_since >= ALONE_SECONDS
    return after, Verdict(after.open_for(now) if after.is_open else None, (after.is_open or doubtful) and not alone)


def _alone(before: Breaker, after: Breaker, now: float, failure: Failure | None, job_id: str) -> Breaker:
    """`after`, with what is known of the one job that fails. Only what could count is held against it."""
    says_nothing = after.is_open if failure is None else failure.kind not in REASONS
    if says_nothing:
        return replace(after, alone=before.alone, alone_since=before.alone_since)
    if failure is None or failure.kind != Kind.transient:
        return replace(after, alone=None, alone_since=0.0)
    since = before.alone_since if before.alone == job_id else now
    return replace(after, alone=job_id, alone_since=since)


def _while_closed(breaker: Breaker, now: float, failure: Failure | None) -> Breaker:
    if failure is None:
        return replace(breaker, recent=_window(_recent(breaker, now) + "+"))
    reason = REASONS.get(failure.kind)
    if reason is None:
        return breaker
    if reason == Reason.failing:
        recent = _window(_recent(breaker, now) + "-")
        if recent.count("-") < ENOUGH_FAILURES:
            return replace(breaker, recent=recent, failed_at=now)
    return Breaker(breaker.turns + 1, reason, now + _pause(failure))


def _while_open(breaker: Breaker, now: float, permit: Permit, failure: Failure | None) -> Breaker:
    is_probe = permit.probe is not None
    if is_probe and (failure is None or failure.kind in _JUDGED):
        return Breaker(breaker.turns + 1, closed_at=now)
    if failure is None:
        return breaker
    reason = REASONS.get(failure.kind, breaker.reason)
    if is_probe and breaker.probe == permit.probe:
        pause = _pause(failure)
        if failure.billed != Billed.no:
            pause = max(pause, COSTLY_PAUSE)
        return replace(breaker, reason=reason, until=now + pause, probe=None, probe_until=0.0)
    if reason != Reason.failing and failure.kind in REASONS and now + _pause(failure) > breaker.until:
        return replace(breaker, reason=reason, until=now + _pause(failure))
    return breaker


def _pause(failure: Failure) -> float:
    operators = failure.kind in (Kind.quota_exhausted, Kind.auth_failed)
    asked = bounded(failure.retry_after)
    if asked is None:
        return OPERATOR_PAUSE if operators else PAUSE
    return max(asked, OPERATOR_PAUSE) if operators else asked


def _recent(breaker: Breaker, now: float) -> str:
    return breaker.recent if 0 <= now - breaker.failed_at <= FORGOTTEN_AFTER else ""


def _window(recent: str) -> str:
    """The latest calls, without the successes before the first failure: a backend that is well has nothing to tell."""
    return recent[-WINDOW:].lstrip("+")


def _slots(breaker: Breaker, now: float) -> int:
    """How many jobs a process may have in hand: a vendor that just came back is not met with all calls at once."""
    since = ALL_AFTER if breaker.closed_at is None else now - breaker.closed_at
    return FIRST_SLOTS * 2 ** int(since) if 0 <= since < ALL_AFTER else 1_000_000
