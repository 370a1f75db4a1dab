"""What a signal handler may set."""

import signal
import threading
from collections.abc import Iterator

import pytest

from worker.stop import Stop


@pytest.fixture
def handled() -> Iterator[Stop]:
    """Set by a signal, as in the worker and the sweep."""
    stop = Stop()
    before = signal.signal(signal.SIGUSR1, lambda *_: stop.set())
    yield stop
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.timeout(60)
def test_a_second_signal_in_the_middle_of_the_first_ones_work_is_no_deadlock(handled: Stop) -> None:
    with handled._cond:  # as within set(), and wait()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
    assert handled.is_set()


def test_whoever_waits_is_woken(handled: Stop) -> None:
    woken = threading.Thread(target=handled.wait, daemon=True)
    woken.start()
    signal.raise_signal(signal.SIGUSR1)
    woken.join(60)
    assert not woken.is_alive() and handled.wait(0)
