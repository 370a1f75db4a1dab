"""How many share a call, and what is claimed beside what is in hand."""

import pytest

from worker.backends.batch_room import BatchRoom, size_of

SMALL, MIDDLE, LARGE = (512, 512), (768, 768), (1024, 1024)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_larger_the_picture_the_fewer_share_a_call() -> None:
    room = BatchRoom({512 * 512: 8, 768 * 768: 4, 1024 * 1024: 2})
    sizes = [(256, 256), SMALL, (512, 520), MIDDLE, (2048, 512), LARGE, (1024, 1032)]
    assert [room.cap(size) for size in sizes] == [8, 8, 4, 4, 2, 2, 1]


def test_what_ran_out_of_memory_once_is_remembered_for_that_size_alone() -> None:
    room = BatchRoom({512 * 512: 8})
    room.lower(SMALL, 4)
    room.lower(SMALL, 6)
    assert room.cap(SMALL) == 4 and room.cap((512, 504)) == 8
    room.lower(SMALL, 0)
    assert room.cap(SMALL) == 1


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatchRoom({512 * 512: 0})


def test_with_nothing_in_hand_two_sizes_are_taken_up_to_their_caps() -> None:
    admit = BatchRoom({512 * 512: 3, 1024 * 1024: 2}).admission([])
    asked = [SMALL, LARGE, MIDDLE, SMALL, LARGE, SMALL, SMALL, LARGE]
    assert [admit(size) for size in asked] == [True, True, False, True, True, True, False, False]


def test_what_is_in_hand_counts() -> None:
    admit = BatchRoom({512 * 512: 3}).admission([SMALL, SMALL])
    assert [admit(size) for size in (SMALL, SMALL, LARGE, MIDDLE)] == [True, False, True, False]


def test_a_cap_that_was_lowered_holds_for_the_claim_too() -> None:
    room = BatchRoom({512 * 512: 8})
    room.lower(SMALL, 2)
    admit = room.admission([SMALL])
    assert [admit(SMALL), admit(SMALL)] == [True, False]


def test_two_sizes_that_never_end_do_not_keep_a_third_out_for_ever() -> None:
    clock = Clock()
    room = BatchRoom({1024 * 1024: 4}, patience_seconds=20, clock=clock)
    admit = room.admission([SMALL, LARGE])
    assert not admit(MIDDLE) and admit(SMALL)
    clock.now += 19
    admit = room.admission([SMALL, LARGE])
    assert not admit(MIDDLE) and admit(SMALL)
    clock.now += 2
    admit = room.admission([SMALL, LARGE])
    assert not admit(MIDDLE) and not admit(SMALL) and not admit(LARGE)  # so that one of them runs out
    admit = room.admission([SMALL])
    assert not admit(SMALL) and admit(MIDDLE) and admit(SMALL)


def test_a_size_that_was_kept_out_and_is_gone_keeps_nobody_out_of_an_empty_card() -> None:
    clock = Clock()
    room = BatchRoom(patience_seconds=20, clock=clock)
    assert not room.admission([SMALL, LARGE])(MIDDLE)
    clock.now += 60
    assert room.admission([])(SMALL)


def test_a_job_without_a_size_has_the_size_that_the_catalogue_says() -> None:
    assert size_of({"prompt": "a fox"}) == (512, 512) and size_of({"width": 64, "height": None}) == (64, 512)
