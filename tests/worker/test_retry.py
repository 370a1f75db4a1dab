"""What is done after a failure: the table in `worker/retry.py`, line by line."""

import math

import pytest

from shared.errors import JobErrorCode
from worker.backends.base import Billed, Kind
from worker.retry import TURN, Fail, Retry, counts, decide, excuses

COUNTED = {
    Kind.bad_output: JobErrorCode.bad_output,
    Kind.transient: JobErrorCode.backend_unavailable,
    Kind.out_of_memory: JobErrorCode.out_of_memory,
    Kind.internal: JobErrorCode.internal_error,
}
UNCOUNTED = (Kind.rate_limited, Kind.not_accepted, Kind.quota_exhausted, Kind.auth_failed)


def after(
    kind: Kind,
    *,
    failures: int = 1,
    max_attempts: int = 3,
    in_a_row: int = 1,
    retry_after: float | None = None,
    jitter: float = 0.5,
) -> Retry | Fail:
    return decide(kind, failures, max_attempts, in_a_row, retry_after, jitter)


def pause(kind: Kind, **circumstances: float | None) -> float:
    decision = after(kind, **circumstances)  # type: ignore[arg-type]
    assert isinstance(decision, Retry)
    return decision.after_seconds


def test_every_kind_of_failure_has_its_line() -> None:
    for kind in Kind:
        assert isinstance(after(kind), Retry | Fail)


def test_a_request_that_is_wrong_is_never_tried_again() -> None:
    assert after(Kind.rejected, failures=0) == Fail(JobErrorCode.rejected, retryable=False)


def test_what_the_content_rules_forbid_is_never_tried_again() -> None:
    assert after(Kind.unsafe, failures=0) == Fail(JobErrorCode.content_filtered, retryable=False)


@pytest.mark.parametrize(("kind", "code"), COUNTED.items())
def test_a_failure_with_an_answer_counts_and_ends_the_job_at_the_last_attempt(kind: Kind, code: JobErrorCode) -> None:
    assert counts(kind)
    for failures in (1, 2):
        decision = after(kind, failures=failures)
        assert isinstance(decision, Retry) and decision.counts
    assert after(kind, failures=3) == Fail(code, retryable=True)
    assert after(kind, failures=1, max_attempts=1) == Fail(code, retryable=True)


@pytest.mark.parametrize("kind", UNCOUNTED)
def test_what_was_not_accepted_never_counts_and_never_ends_the_job(kind: Kind) -> None:
    assert not counts(kind)
    for in_a_row in (1, 10, 100_000):
        decision = after(kind, failures=99, in_a_row=in_a_row)
        assert isinstance(decision, Retry) and not decision.counts


def test_the_pauses_after_counted_failures_double_with_full_jitter_up_to_a_minute() -> None:
    ceilings = [pause(Kind.transient, failures=n, max_attempts=1000, jitter=0.9999) for n in (1, 2, 3, 4, 5, 6, 7, 999)]
    assert ceilings == pytest.approx([2, 4, 8, 16, 32, 60, 60, 60], rel=0.001)
    assert pause(Kind.transient, jitter=0) == 0


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.canceled])
def test_where_another_backend_may_do_it_no_pause_is_too_short_to_move_it_there(kind: Kind) -> None:
    for jitter, retry_after in ((0.0, None), (0.5, 1.0), (0.9, 30.0)):
        alone = decide(kind, 1, 3, 1, retry_after, jitter)
        beside = decide(kind, 1, 3, 1, retry_after, jitter, elsewhere=True)
        if isinstance(alone, Retry):
            alone = Retry(max(alone.after_seconds, TURN), alone.counts)
        assert beside == alone


@pytest.mark.parametrize("kind", [Kind.rate_limited, Kind.not_accepted])
def test_the_pauses_after_uncounted_failures_double_and_are_never_under_half_of_that(kind: Kind) -> None:
    for in_a_row, ceiling in ((1, 2), (2, 4), (3, 8), (6, 60), (100_000, 60)):
        assert pause(kind, in_a_row=in_a_row, jitter=0) == ceiling / 2
        assert pause(kind, in_a_row=in_a_row, jitter=0.9999) == pytest.approx(ceiling, rel=0.001)


@pytest.mark.parametrize("kind", [Kind.quota_exhausted, Kind.auth_failed])
def test_what_an_operator_must_mend_is_tried_at_most_once_a_minute(kind: Kind) -> None:
    assert pause(kind, jitter=0) == 60
    assert pause(kind, in_a_row=500, jitter=0.9999) == pytest.approx(66, rel=0.001)
    assert pause(kind, retry_after=1, jitter=0) == 60
    assert pause(kind, retry_after=300, jitter=0) == 300


@pytest.mark.parametrize(
    ("asked", "obeyed"),
    [(7, 7), (0, 1), (0.25, 1), (900, 900), (901, 900), (1e9, 900), (math.inf, 900)],
)
def test_retry_after_is_obeyed_between_a_second_and_a_quarter_of_an_hour(asked: float, obeyed: float) -> None:
    assert pause(Kind.rate_limited, retry_after=asked, in_a_row=50, jitter=0) == obeyed
    assert obeyed <= pause(Kind.rate_limited, retry_after=asked, jitter=0.9999) <= obeyed * 1.1


@pytest.mark.parametrize("nonsense", [-1, -math.inf, math.nan])
def test_a_nonsensical_retry_after_is_ignored(nonsense: float) -> None:
    assert pause(Kind.rate_limited, retry_after=nonsense) == pause(Kind.rate_limited)
    assert pause(Kind.transient, retry_after=nonsense) == pause(Kind.transient)


def test_a_counted_failure_waits_at_least_as_long_as_retry_after_says() -> None:
    assert pause(Kind.transient, retry_after=30, jitter=0) == 30
    assert pause(Kind.transient, failures=6, max_attempts=9, retry_after=1, jitter=0.5) == 30


def test_retry_after_saves_no_job_from_its_last_failure() -> None:
    assert isinstance(after(Kind.transient, failures=3, retry_after=5), Fail)
    assert isinstance(after(Kind.rejected, retry_after=5), Fail)


# While the vendor is out of order.


def test_an_excused_failure_never_counts_and_never_ends_the_job() -> None:
    assert not counts(Kind.transient, excused=True)
    decision = decide(Kind.transient, 99, 3, 1, None, 0.5, excused=True)
    assert isinstance(decision, Retry) and not decision.counts and decision.after_seconds >= 1


@pytest.mark.parametrize("kind", sorted(set(COUNTED) - {Kind.transient}))
def test_what_is_not_the_vendors_being_out_of_order_is_never_excused(kind: Kind) -> None:
    assert counts(kind, excused=True)
    assert decide(kind, 3, 3, 1, None, 0.5, excused=True) == Fail(COUNTED[kind], retryable=True)


@pytest.mark.parametrize("may_be_the_backends", [True, False])
@pytest.mark.parametrize("failed_before", [True, False])
def test_what_may_have_to_be_paid_is_never_excused(may_be_the_backends: bool, failed_before: bool) -> None:
    assert not excuses(Billed.unknown, may_be_the_backends, failed_before)
    assert not excuses(Billed.yes, may_be_the_backends, failed_before)
    assert excuses(Billed.no, may_be_the_backends, failed_before) == (may_be_the_backends or not failed_before)


def test_while_the_breaker_is_open_its_pause_takes_the_place_of_a_shorter_one() -> None:
    def paused(kind: Kind, open_for: float, in_a_row: int = 1, jitter: float = 0.0) -> float:
        decision = decide(kind, 1, 3, in_a_row, None, jitter, excused=True, open_for=open_for)
        assert isinstance(decision, Retry)
        return decision.after_seconds

    assert paused(Kind.rate_limited, 300) == 300 and paused(Kind.rate_limited, 300, jitter=0.9999) <= 330
    assert paused(Kind.rate_limited, 5, in_a_row=50) == 5, "it, and not the job's own, says when"
    assert paused(Kind.transient, 5) == 5 + TURN, "another job is to be the next probe"
    assert paused(Kind.auth_failed, 20) == 60
    assert paused(Kind.bad_output, 20) == 20
