"""When a breaker opens and closes: the rules of `worker/breaker.py`, with a clock that the test sets."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from shared.breaker import LONGEST_PAUSE, PROBE_SECONDS, Breaker, Reason, State, read, written
from worker import breaker as rules
from worker.backends.base import Billed, Failure, Kind
from worker.breaker import (
    ALONE_SECONDS,
    COSTLY_PAUSE,
    ENOUGH_FAILURES,
    FIRST_SLOTS,
    FORGOTTEN_AFTER,
    PAUSE,
    Permit,
    Verdict,
    admit,
    renew,
    withdraw,
)

NOW = 1_000_000.0
NEW = Breaker()
FAILED = Failure(Kind.transient, Billed.no, "HTTP 503")
#: A single job's, ours, or nobody's.
SAYS_NOTHING = (Kind.rejected, Kind.unsafe, Kind.bad_output, Kind.out_of_memory, Kind.internal, Kind.canceled)


def failure(kind: Kind, retry_after: float | None = None, billed: Billed = Billed.no) -> Failure:
    return Failure(kind, billed, "", retry_after)


def ended(
    breaker: Breaker, now: float, permit: Permit, failure: Failure | None, job_id: str = "job_1"
) -> tuple[Breaker, Verdict]:
    """Of one job, where it makes no difference whose call it was."""
    return rules.ended(breaker, now, permit, failure, job_id)


def after(*endings: Failure | None, breaker: Breaker = NEW, now: float = NOW) -> Breaker:
    """After calls that were sent in its present turn, and ended so; None: with a picture."""
    permit = Permit(1, breaker.turns)
    for ending in endings:
        breaker, _ = ended(breaker, now, permit, ending)
    return breaker


def is_open(breaker: Breaker, reason: Reason, seconds: float, now: float = NOW) -> bool:
    standing = breaker.standing(now)
    return (standing.state, standing.reason) == (State.open, reason) and breaker.open_for(now) == seconds


OPEN = after(*[FAILED] * ENOUGH_FAILURES)
DUE = OPEN.until


def probing(breaker: Breaker = OPEN, now: float = DUE) -> tuple[Breaker, Permit]:
    breaker, permit = admit(breaker, now, 32, 0, "the probe")
    assert permit.probe == "the probe" and permit.calls == 1
    return breaker, permit


def test_ten_failures_in_a_row_open_it_and_nine_do_not() -> None:
    assert not after(*[FAILED] * 9).is_open
    assert is_open(after(*[FAILED] * 10), Reason.failing, PAUSE)
    assert is_open(after(*[failure(Kind.not_accepted)] * 10), Reason.failing, PAUSE)


def test_half_of_the_latest_twenty_open_it_and_a_third_does_not() -> None:
    assert after(*[None, FAILED] * 10).is_open
    assert not after(*[None, None, FAILED] * 100).is_open


def test_however_much_succeeded_before_ten_failures_open_it() -> None:
    assert after(*[None] * 10_000, *[FAILED] * 10).is_open


def test_a_backend_that_is_well_leaves_nothing_to_write_down() -> None:
    assert after(*[None] * 100) == Breaker()


def test_old_failures_are_forgotten() -> None:
    breaker = after(*[FAILED] * 9)
    assert after(FAILED, breaker=breaker, now=NOW + FORGOTTEN_AFTER).is_open
    assert not after(FAILED, breaker=breaker, now=NOW + FORGOTTEN_AFTER + 1).is_open


@pytest.mark.parametrize("kind", SAYS_NOTHING)
def test_what_is_not_the_backends_never_opens_it(kind: Kind) -> None:
    assert after(*[failure(kind)] * 100) == Breaker()
    assert after(*[FAILED] * 9, *[failure(kind)] * 100, FAILED).is_open, "nor does it speak for it"


def test_every_kind_of_failure_opens_it_or_says_nothing() -> None:
    assert {kind for kind in Kind if after(*[failure(kind)] * 100).is_open} == set(Kind) - set(SAYS_NOTHING)


@pytest.mark.parametrize("kind", [Kind.quota_exhausted, Kind.auth_failed])
def test_what_an_operator_must_mend_opens_it_at_once_for_a_minute(kind: Kind) -> None:
    assert is_open(after(failure(kind)), Reason(kind.value), 60)
    assert is_open(after(failure(kind, retry_after=1)), Reason(kind.value), 60)
    assert is_open(after(failure(kind, retry_after=300)), Reason(kind.value), 300)


@pytest.mark.parametrize(
    ("asked", "obeyed"),
    [(7, 7), (0, 1), (900, 900), (1e9, 900), (float("inf"), 900), (None, PAUSE), (-5, PAUSE), (float("nan"), PAUSE)],
)
def test_a_rate_limit_opens_it_for_as_long_as_it_says_within_bounds(asked: float | None, obeyed: float) -> None:
    assert is_open(after(failure(Kind.rate_limited, asked)), Reason.rate_limited, obeyed)


def test_while_it_is_open_nothing_is_let_through() -> None:
    assert admit(OPEN, NOW, 32, 0, "x") == (OPEN, Permit(0, OPEN.turns))
    assert admit(OPEN, DUE - 0.001, 32, 0, "x")[1].calls == 0


def test_when_the_pause_is_over_one_probe_is_let_through_and_no_second_one() -> None:
    assert OPEN.standing(DUE).state == State.half_open
    breaker, _ = probing()
    assert admit(breaker, DUE + PROBE_SECONDS - 0.001, 32, 0, "another")[1].calls == 0
    assert admit(breaker, DUE + PROBE_SECONDS, 32, 0, "another")[1].probe == "another", "its worker has died"


def test_a_probe_that_is_renewed_keeps_others_out() -> None:
    breaker, _ = probing()
    breaker, still = renew(breaker, DUE + 9, "the probe")
    assert still and admit(breaker, DUE + 18, 32, 0, "another")[1].calls == 0
    assert renew(breaker, DUE + 18, "another") == (breaker, False)


def test_a_probe_that_was_not_sent_makes_room_for_another_at_once() -> None:
    breaker, _ = probing()
    assert withdraw(breaker, DUE, "another")[0] == breaker
    assert admit(withdraw(breaker, DUE, "the probe")[0], DUE, 32, 0, "another")[1].probe == "another"


@pytest.mark.parametrize("ending", [None, failure(Kind.rejected), failure(Kind.unsafe)])
def test_a_good_probe_closes_it(ending: Failure | None) -> None:
    breaker, permit = probing()
    breaker, verdict = ended(breaker, DUE, permit, ending)
    assert breaker.standing(DUE).state == State.closed and verdict.open_for is None


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.rejected, Kind.unsafe}))
def test_a_failed_probe_keeps_it_open_for_a_pause(kind: Kind) -> None:
    breaker, permit = probing()
    breaker, verdict = ended(breaker, DUE, permit, failure(kind))
    expected = 60 if kind in (Kind.quota_exhausted, Kind.auth_failed) else PAUSE
    assert breaker.open_for(DUE) == verdict.open_for == expected and verdict.excused
    assert admit(breaker, DUE + expected, 32, 0, "next")[1].probe == "next"


@pytest.mark.parametrize("billed", [Billed.yes, Billed.unknown])
def test_after_a_probe_that_may_have_to_be_paid_the_next_one_waits_for_a_minute(billed: Billed) -> None:
    breaker, permit = probing()
    breaker, _ = ended(breaker, DUE, permit, failure(Kind.transient, billed=billed))
    assert breaker.open_for(DUE) == COSTLY_PAUSE


def test_a_failed_probe_may_change_the_reason() -> None:
    breaker, permit = probing()
    assert is_open(ended(breaker, DUE, permit, failure(Kind.auth_failed))[0], Reason.auth_failed, 60, DUE)


# Calls end in any order.


def test_what_was_sent_before_it_opened_neither_closes_it_nor_prolongs_it() -> None:
    sent_before = Permit(1, OPEN.turns - 1)
    for ending in (None, FAILED, failure(Kind.bad_output), failure(Kind.rejected)):
        assert ended(OPEN, NOW + 1, sent_before, ending)[0] == OPEN


def test_what_was_sent_before_it_opened_may_know_of_a_longer_pause() -> None:
    sent_before = Permit(1, OPEN.turns - 1)
    breaker, _ = ended(OPEN, NOW, sent_before, failure(Kind.rate_limited, 30))
    assert is_open(breaker, Reason.rate_limited, 30)
    assert ended(breaker, NOW, sent_before, failure(Kind.rate_limited, 10))[0] == breaker, "but not of a shorter one"
    assert is_open(ended(breaker, NOW, sent_before, failure(Kind.auth_failed))[0], Reason.auth_failed, 60)


def test_what_was_sent_before_it_closed_is_news_from_the_outage() -> None:
    breaker, permit = probing()
    closed, _ = ended(breaker, DUE, permit, None)
    for turn in (OPEN.turns - 1, OPEN.turns):
        for late in (FAILED, failure(Kind.auth_failed), failure(Kind.rate_limited, 900)):
            assert ended(closed, DUE + 1, Permit(1, turn), late)[0] == closed


def test_what_was_sent_before_an_earlier_outage_is_no_news_in_the_next_one() -> None:
    breaker, permit = probing()
    closed, _ = ended(breaker, DUE, permit, None)
    again = after(*[FAILED] * ENOUGH_FAILURES, breaker=closed, now=DUE)
    assert again.is_open and again.turns == 3
    for old in (Permit(1, 0), permit):
        for ending in (None, failure(Kind.auth_failed)):
            assert ended(again, DUE, old, ending)[0] == again


def test_a_good_probe_whose_lease_ran_out_closes_it_all_the_same() -> None:
    breaker, permit = probing()
    breaker, _ = admit(breaker, DUE + PROBE_SECONDS, 1, 0, "another")
    assert not ended(breaker, DUE + 20, permit, None)[0].is_open
    assert ended(breaker, DUE + 20, permit, FAILED)[0] == breaker, "a bad one is no news while another is on its way"


# What may be held against a job.


def test_the_first_failure_is_not_excused_and_what_follows_it_is_until_a_call_succeeds() -> None:
    first, verdict = ended(Breaker(), NOW, Permit(1), FAILED)
    assert not verdict.excused
    second, verdict = ended(first, NOW, Permit(1), FAILED)
    assert verdict.excused
    well = after(None, breaker=second)
    assert not ended(well, NOW, Permit(1), FAILED)[1].excused


def test_the_failure_that_opens_it_and_all_that_come_while_it_is_open_are_excused() -> None:
    assert ended(after(*[None, FAILED] * 9), NOW, Permit(1), FAILED)[1].excused
    assert ended(Breaker(), NOW, Permit(1), failure(Kind.auth_failed))[1].open_for == 60
    assert ended(OPEN, NOW, Permit(1, OPEN.turns - 1), FAILED)[1].excused


# One that fails alone.


class Calls:
    """Calls that end one after the other, a second apart if nothing else is said."""

    def __init__(self) -> None:
        self.breaker, self.now = Breaker(), NOW

    def ends(self, job_id: str, ending: Failure | None = FAILED, after: float = 1.0) -> Verdict:
        self.now += after
        permit = Permit(1, self.breaker.turns, self.breaker.probe)
        if self.breaker.is_open and self.breaker.probe is None:
            self.now = max(self.now, self.breaker.until)
            self.breaker, permit = admit(self.breaker, self.now, 1, 0, "p")
        self.breaker, verdict = ended(self.breaker, self.now, permit, ending, job_id)
        return verdict

    def fails_alone(self) -> None:
        """For as long as nobody else must have failed. Its first failure is the job's own, as retry.py has it."""
        self.ends("job_a")
        began = self.now
        while self.now < began + ALONE_SECONDS - 30:
            assert self.ends("job_a", after=20).excused


def test_a_job_that_fails_alone_for_long_is_no_longer_excused() -> None:
    calls = Calls()
    calls.fails_alone()
    assert [calls.ends("job_a", after=40).excused for _ in range(3)] == [False] * 3
    assert calls.breaker.is_open, "and the backend is asked no more often for it"


@pytest.mark.parametrize(
    ("job_id", "ending"),
    [
        ("job_b", FAILED),
        ("job_b", None),
        ("job_b", failure(Kind.not_accepted)),
        ("job_a", failure(Kind.not_accepted)),
        ("job_a", failure(Kind.auth_failed)),
    ],
)
def test_what_says_that_it_is_not_the_jobs_own_fault_begins_the_time_anew(job_id: str, ending: Failure | None) -> None:
    calls = Calls()
    calls.fails_alone()
    calls.ends(job_id, ending)
    calls.ends("job_a")
    assert (calls.breaker.alone, calls.breaker.alone_since) == ("job_a", calls.now)
    assert calls.ends("job_a", after=40).excused


def test_a_failure_that_is_told_by_the_output_says_nothing_of_who_fails_alone() -> None:
    calls = Calls()
    calls.fails_alone()
    calls.ends("job_b", failure(Kind.bad_output))
    assert not calls.ends("job_a", after=40).excused


def test_an_outage_that_touches_two_jobs_burns_nothing_however_long_it_is() -> None:
    calls = Calls()
    calls.ends("job_a")
    calls.ends("job_b")
    assert all(calls.ends(job_id, after=60).excused for _ in range(1000) for job_id in ("job_a", "job_b"))


def test_an_older_version_reads_what_is_written_and_what_it_writes_is_read() -> None:
    """During a deploy both are at work. What the older one forgets begins anew."""

    @dataclass(frozen=True)
    class Older:
        turns: int = 0
        reason: Reason | None = None
        until: float = 0.0
        probe: str | None = None
        probe_until: float = 0.0
        recent: str = ""
        failed_at: float = 0.0
        closed_at: float | None = None

    its = TypeAdapter(Older)
    read_by_it = its.validate_json(written(OPEN))
    assert (read_by_it.turns, read_by_it.reason, read_by_it.until) == (OPEN.turns, OPEN.reason, OPEN.until)
    assert OPEN.alone is not None and read(its.dump_json(read_by_it)) == replace(OPEN, alone=None, alone_since=0.0)


# After it closed.


def test_the_slots_come_up_gently() -> None:
    closed = Breaker(turns=2, closed_at=NOW)

    def let_through(seconds: float, in_hand: int = 0, wanted: int = 32) -> int:
        return admit(closed, NOW + seconds, wanted, in_hand, "x")[1].calls

    assert [let_through(0, in_hand) for in_hand in (0, 3, 5, 200)] == [FIRST_SLOTS, 2, 0, 0]
    assert [let_through(seconds, 5) for seconds in (0.9, 1, 2, 3)] == [0, 5, 15, 32]
    assert [let_through(seconds, 199) for seconds in (5, 6)] == [0, 32]
    assert let_through(9, 100_000) == let_through(-5, 100_000) == 32
    assert admit(Breaker(), NOW, 32, 100_000, "x")[1].calls == 32, "one that was never open lets everything through"


# Clocks.


@pytest.mark.parametrize("back", [1_000, 1e9])
def test_a_clock_that_was_set_back_opens_it_for_no_longer(back: float) -> None:
    assert admit(OPEN, NOW - back, 1, 0, "x")[1].probe == "x"
    breaker, _ = probing()
    assert admit(breaker, NOW - back, 1, 0, "x")[1].probe == "x"


def test_it_is_read_as_it_was_written_and_anything_else_is_nothing() -> None:
    for breaker in (Breaker(), OPEN, probing()[0], after(FAILED, None, FAILED)):
        assert read(written(breaker)) == breaker
    assert read(None) is read(b"") is read(b"{") is read(b'{"turns": "x"}') is None


# For any order of calls, deaths, and clocks.

kinds = st.sampled_from([None, *Kind])
waits = st.one_of(st.floats(0, 20), st.floats(0, 2000), st.floats(-2000, 0))
askings = st.one_of(st.none(), st.floats(allow_nan=True))
steps = st.lists(st.tuples(st.sampled_from(["claim", "end", "die"]), st.integers(0, 9), kinds, askings, waits))


@given(steps)
@example([("claim", 0, None, None, 0.0), ("end", 0, Kind.rate_limited, 900.0, -500.0)])  # a clock that was set back
def test_whatever_happens_there_is_one_probe_at_most_and_never_a_pause_without_end(
    happening: list[tuple[str, int, Kind | None, float | None, float]],
) -> None:
    breaker, now, number = Breaker(), NOW, 0
    in_flight: list[Permit] = []
    for what, which, kind, asked, wait in happening:
        if what == "claim":
            alive = breaker.probe if breaker.is_probed(now) else None
            breaker, permit = admit(breaker, now, 3, 0, f"{number}")
            number += 1
            assert permit.probe is None or alive is None, "no second one while the first is at work"
            assert not breaker.is_open or permit.calls <= 1
            in_flight += [replace(permit, calls=1)] * permit.calls
        elif in_flight and what == "end":
            permit = in_flight.pop(which % len(in_flight))
            turns = breaker.turns
            breaker, _ = ended(breaker, now, permit, None if kind is None else failure(kind, asked))
            if permit.probe is not None and permit.turn == turns and kind is None:
                assert not breaker.is_open, "a good probe closes it"
        elif in_flight:
            in_flight.pop(which % len(in_flight))
        now += wait
        assert breaker.open_for(now) <= LONGEST_PAUSE
        assert read(written(breaker)) == breaker
    # Whoever dies, and whatever was said: a probe is let through within the longest pause, and a good one closes it.
    if breaker.is_open:
        breaker, permit = admit(breaker, now, 1, 0, "last")
        if permit.probe is None:
            now += LONGEST_PAUSE + PROBE_SECONDS
            breaker, permit = admit(breaker, now, 1, 0, "last")
        assert permit.probe == "last"
        assert not ended(breaker, now, permit, None)[0].is_open
