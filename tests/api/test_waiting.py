"""The waiting places: who is woken, who is not, and how a wait ends."""

import threading
import time
from collections.abc import Callable

import pytest

from api.waiting import Waiting, preferred_wait
from shared.announcements import Listener


class SilentListener(Listener):
    """A subscription that never hears anything."""

    def __init__(self, heard: Callable[[str | None], None]) -> None:
        self.started = 0

    def start(self) -> None:
        self.started += 1

    def close(self) -> None: ...


def waiting(places: int = 2) -> Waiting:
    return Waiting(SilentListener, places)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("wait=10", 10),
        ("wait=0", 0),
        ("wait=61", 60),
        ("wait=999999999", 60),
        ("WAIT = 5", 5),
        ('wait="7"', 7),
        ("respond-async, wait=3", 3),
        ("wait=3; foo=bar", 3),
        ("wait=1, wait=2", 1),
        ("wait", None),
        ("wait=", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        ("wait=soon", None),
        ("wait=9999999999", 60),
        ("wait=\N{ARABIC-INDIC DIGIT ONE}", None),
        ("handling=lenient", None),
        ("", None),
        (None, None),
    ],
)
def test_a_preference_that_makes_no_sense_is_ignored(header: str | None, seconds: int | None) -> None:
    assert preferred_wait(header) == seconds


def test_what_is_enough_already_is_not_waited_for() -> None:
    found, waited = waiting().until("job_a", 60, lambda: "succeeded", lambda found: True)
    assert (found, waited) == ("succeeded", True)


def test_a_wait_is_woken_by_its_job_and_not_by_others() -> None:
    places = waiting()
    reads: list[float] = []
    first_read, state = threading.Event(), "running"

    def read() -> str:
        reads.append(time.monotonic())
        first_read.set()
        return state

    result: list[tuple[str, bool]] = []
    thread = threading.Thread(
        target=lambda: result.append(places.until("job_a", 60, read, lambda found: found == "succeeded"))
    )
    thread.start()
    assert first_read.wait(10)
    places.wake("job_b")
    assert len(reads) == 1
    state = "succeeded"
    places.wake("job_a")
    thread.join(10)
    assert result == [("succeeded", True)]


def test_a_wait_reads_again_without_being_woken() -> None:
    states = iter(["running", "succeeded"])
    found, _ = waiting().until("job_a", 60, lambda: next(states), lambda found: found == "succeeded")
    assert found == "succeeded"


def test_a_wait_ends_with_its_time() -> None:
    found, waited = waiting().until("job_a", 0.05, lambda: "running", lambda found: False)
    assert (found, waited) == ("running", True)


def test_when_no_place_is_free_the_answer_comes_at_once() -> None:
    places = waiting(places=1)
    inside, leave = threading.Event(), threading.Event()

    def read() -> bool:
        inside.set()
        return leave.is_set()

    thread = threading.Thread(target=places.until, args=("job_a", 60, read, bool))
    thread.start()
    assert inside.wait(10)
    assert places.until("job_b", 60, lambda: "running", lambda found: False) == ("running", False)
    leave.set()
    places.wake("job_a")
    thread.join(10)
    assert places.until("job_b", 0.01, lambda: "running", lambda found: False) == ("running", True)


def test_every_wait_ends_when_the_process_stops() -> None:
    places = waiting()
    inside = threading.Event()
    thread = threading.Thread(target=places.until, args=("job_a", 60, inside.set, lambda found: False))
    thread.start()
    assert inside.wait(10)
    places.close()
    thread.join(10)
    assert not thread.is_alive()
    assert places.until("job_a", 60, lambda: "running", lambda found: False) == ("running", False)


def test_the_subscription_begins_with_the_first_wait() -> None:
    listeners: list[SilentListener] = []

    def listen(heard: Callable[[str | None], None]) -> Listener:
        listeners.append(SilentListener(heard))
        return listeners[0]

    places = Waiting(listen, 2)
    assert listeners[0].started == 0
    for _ in range(2):
        places.until("job_a", 0, lambda: None, lambda found: True)
    assert listeners[0].started == 1
