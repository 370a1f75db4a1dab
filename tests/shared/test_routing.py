"""The policy of `auto`: by a table of cases, and by what holds of any."""

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.breaker import Standing, State
from shared.catalogue import DEFAULT_MODEL
from shared.load import Present
from shared.routing import ROOM_SECONDS, Candidate, Choice, able, candidate, choose

HOSTED = Candidate("hosted", 8000, State.closed, workers=1, slots=200, seconds=2.0, queued=0, in_hand=0)
OWN = Candidate("own", 0, State.closed, workers=1, slots=4, seconds=3.0, queued=0, in_hand=0)

#: What differs of the hosted one, which is the first in order; of the own card; and what is chosen then, and why.
CASES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {}, "own", "cheapest"),
    ({"price": 0}, {}, "hosted", "first"),
    # Health comes before all else.
    ({}, {"breaker": State.open}, "hosted", "breaker_open"),
    ({"queued": 9000}, {"breaker": State.open}, "hosted", "breaker_open"),
    ({}, {"workers": 0, "slots": 0}, "hosted", "no_worker"),
    ({"breaker": State.open}, {"workers": 0, "slots": 0}, "hosted", "no_worker"),
    ({"breaker": State.open}, {"breaker": State.open}, "own", "cheapest"),
    ({"workers": 0, "slots": 0}, {"workers": 0, "slots": 0}, "own", "cheapest"),
    # Half-open: one goes to find out.
    ({}, {"breaker": State.half_open}, "own", "cheapest"),
    ({}, {"breaker": State.half_open, "queued": 1}, "hosted", "breaker_open"),
    ({}, {"breaker": State.half_open, "in_hand": 1}, "hosted", "breaker_open"),
    # Load comes before the price.
    ({}, {"in_hand": 4, "queued": 11}, "own", "cheapest"),  # three turns: 9 s
    ({}, {"in_hand": 4, "queued": 12}, "hosted", "has_room"),
    ({"seconds": 20.0, "queued": 200}, {"in_hand": 4, "queued": 12}, "own", "soonest"),
    ({"seconds": 20.0, "queued": 200}, {"in_hand": 4, "queued": 40}, "hosted", "soonest"),
    ({"seconds": None}, {"seconds": None, "queued": 43}, "own", "cheapest"),
    ({"seconds": None}, {"seconds": None, "queued": 44}, "hosted", "has_room"),
    # A queue that is full takes nothing.
    ({}, {"full": True}, "hosted", "has_room"),
    ({"breaker": State.open}, {"full": True}, "hosted", "has_room"),
    ({"full": True}, {"full": True}, "own", "cheapest"),
]


@pytest.mark.parametrize(("hosted", "own", "backend", "reason"), CASES)
def test_who_is_chosen_and_why(hosted: dict[str, Any], own: dict[str, Any], backend: str, reason: str) -> None:
    assert choose([replace(HOSTED, **hosted), replace(OWN, **own)]) == Choice(backend, reason)  # type: ignore[arg-type]


def test_where_one_alone_can_do_it_nothing_else_counts() -> None:
    assert choose([replace(HOSTED, workers=0, full=True)]) == Choice("hosted", "only_one")  # type: ignore[arg-type]
    assert choose([]) is None


def test_what_is_not_known_of_a_breaker_speaks_against_nobody() -> None:
    unknown = candidate("dataoorts", DEFAULT_MODEL, {}, None, Present(2, 1.0, workers=1), 0)
    assert (unknown.breaker, unknown.trouble, unknown.price) == (State.closed, None, 8000)
    standing = Standing(State.open, None, datetime.now(UTC))
    own = candidate("diffusers", DEFAULT_MODEL, {DEFAULT_MODEL: Decimal(1)}, standing, Present(2, 1.0, workers=1), 0)
    assert (own.trouble, own.price) == ("breaker_open", 0), "one's own cards cost nothing, whatever the price list says"


def test_who_can_do_a_job_is_told_by_its_model_and_by_whether_it_alters_an_image() -> None:
    both = ["dataoorts", "diffusers"]
    assert able(both, DEFAULT_MODEL, {"prompt": "a fox"}) == both
    assert able(both[::-1], DEFAULT_MODEL, {"prompt": "a fox", "image": None}) == both[::-1]
    assert able(both, DEFAULT_MODEL, {"prompt": "a fox", "image": "job_1"}) == ["diffusers"]
    assert able(both, "lykon/dreamshaper-8-lcm", {}) == ["dataoorts"]
    assert able(both, "of another time", {}) == able([], DEFAULT_MODEL, {}) == []


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        backend=st.sampled_from("abcdef"),
        price=st.sampled_from([0, 1000, 8000]),
        breaker=st.sampled_from(State),
        workers=st.integers(0, 2),
        slots=st.integers(0, 20),
        seconds=st.none() | st.floats(0.01, 100),
        queued=st.integers(0, 100),
        in_hand=st.integers(0, 20),
        full=st.booleans(),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda each: each.backend,
)


@given(CANDIDATES)
def test_each_line_of_the_policy_comes_before_the_next(candidates: list[Candidate]) -> None:
    choice = choose(candidates)
    assert choice == choose(list(candidates)), "the same again"
    assert choice is not None
    [chosen] = [each for each in candidates if each.backend == choice.backend]
    left = [each for each in candidates if not each.full]
    assert not (left and chosen.full), "never a full one while another has a place"
    left = left or candidates
    well = [each for each in left if each.trouble is None]
    assert not (well and chosen.trouble), "never one in trouble while another is well"
    if chosen.trouble == "no_worker":
        assert not any(each.workers for each in left), "where nobody works a job waits only if nobody works anywhere"
    left = [each for each in left if each.trouble == chosen.trouble]
    if chosen.wait > ROOM_SECONDS:
        assert chosen.wait == min(each.wait for each in left), "who must wait waits as short as he can"
    else:
        cheaper = [each for each in left if each.price < chosen.price and each.wait <= ROOM_SECONDS]
        assert not cheaper, "nobody pays more than he must"
    same = [each for each in left if (each.wait, each.price) == (chosen.wait, chosen.price)]
    assert same[0] == chosen, "in the order of the setting"


@given(CANDIDATES, st.randoms())
def test_the_order_decides_where_nothing_else_does(candidates: list[Candidate], dice: Any) -> None:
    choice, shuffled = choose(candidates), list(candidates)
    dice.shuffle(shuffled)
    other = choose(shuffled)
    assert choice is not None and other is not None
    assert choice.reason == "first" or other.backend == choice.backend
