"""What was painted is kept, within bounds, and painted once."""

import threading
from functools import partial

import pytest

from sandbox.pictures import Pictures


def test_a_picture_is_painted_once() -> None:
    pictures, painted = Pictures(), []

    def paint() -> bytes:
        painted.append(1)
        return b"picture"

    assert [pictures.get("key", paint) for _ in range(3)] == [b"picture"] * 3
    assert len(painted) == 1


def test_two_equal_requests_at_once_paint_once() -> None:
    pictures, painted, got = Pictures(), [], []
    begun, finish = threading.Event(), threading.Event()

    def paint() -> bytes:
        painted.append(1)
        begun.set()
        assert finish.wait(60)
        return b"picture"

    threads = [threading.Thread(target=lambda: got.append(pictures.get("key", paint)), daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    finish.set()
    for thread in threads:
        thread.join(60)
    assert got == [b"picture"] * 8
    assert len(painted) == 1


def test_the_oldest_picture_is_let_go_when_there_are_too_many_bytes() -> None:
    pictures = Pictures(kept_bytes=25)
    painted: list[str] = []

    def paint(key: str) -> bytes:
        painted.append(key)
        return b"0123456789"

    for key in ("a", "b", "a", "c", "a", "b"):  # c pushes out b: a was used after it
        pictures.get(key, partial(paint, key))
    assert painted == ["a", "b", "c", "b"]


def test_a_picture_larger_than_the_bound_is_served_and_not_kept() -> None:
    pictures = Pictures(kept_bytes=5)
    assert pictures.get("key", lambda: b"0123456789") == b"0123456789"
    assert pictures.get("key", lambda: b"other") == b"other"


def test_a_painting_that_fails_leaves_the_next_one_free_to_try() -> None:
    pictures = Pictures()
    with pytest.raises(ZeroDivisionError):
        pictures.get("key", lambda: bytes(1 // 0))
    assert pictures.get("key", lambda: b"picture") == b"picture"
