"""The watchdog, with a clock that the test moves. Real deadlocks: tests/drills/test_stuck_workers.py."""

import os
import subprocess
import sys
import threading

import pytest

from tests.service import ROOT
from worker.slots import OWN_SECONDS, Slots
from worker.watchdog import (
    BEAT_SECONDS,
    DEAF_SECONDS,
    HELD_SECONDS,
    IGNORED_SECONDS,
    QUIET_SECONDS,
    STUCK,
    TICK_SECONDS,
    Watchdog,
)


class Watched:
    """A worker of ten slots with nothing to do, whose heart beats and whose consumer hears, unless the test says no."""

    def __init__(self) -> None:
        self.moment = 1000.0
        self.turns = 0
        self.heard = 0
        self.beats = self.hears = True
        self.tickets: int | None = 0
        self.slots = Slots(10)
        self.watchdog = Watchdog(
            turns=lambda: self.turns,
            stopping=threading.Event(),
            slots=self.slots,
            heard=lambda: self.heard,
            tickets=lambda: self.tickets,
            clock=lambda: self.moment,
        )

    def goes_on(self, seconds: float, moves: bool = False) -> str | None:
        """The first reason to end that it finds within this time."""
        for _ in range(round(seconds / TICK_SECONDS)):
            self.moment += TICK_SECONDS
            self.turns += self.beats
            self.heard += self.hears
            if moves:
                self.slots.moved()
            if stuck := self.watchdog.look():
                return stuck
        return None


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_worker_with_nothing_to_do_is_well(watched: Watched) -> None:
    assert watched.goes_on(3600) is None and watched.watchdog.trouble is None
    assert watched.watchdog.quiet_seconds == 0 and watched.watchdog.deaf_seconds == 0


def test_a_call_may_take_its_time_and_no_longer(watched: Watched) -> None:
    with watched.slots.work() as slot:
        slot.hold(180)
        assert watched.goes_on(180) is None
        assert "1 slots are over their time (1 hold a job)" in str(watched.goes_on(10))


def test_slots_that_find_no_next_job_for_too_long_are_stuck(watched: Watched) -> None:
    with watched.slots.work():
        assert watched.goes_on(OWN_SECONDS) is None
        stuck = watched.goes_on(4)
    assert stuck is not None and "(0 hold a job)" in stuck and watched.watchdog.trouble == stuck
    assert OWN_SECONDS + 4 < 60 and QUIET_SECONDS < 60


def test_what_came_is_stored_within_less_than_a_call_may_take(watched: Watched) -> None:
    with watched.slots.work() as slot:
        slot.hold(180)
        assert watched.goes_on(100) is None
        watched.slots.hold()
        assert watched.goes_on(OWN_SECONDS) is None
        assert "(1 hold a job)" in str(watched.goes_on(4))


def test_tickets_that_go_on_coming_are_no_progress(watched: Watched) -> None:
    with watched.slots.work():
        assert watched.goes_on(OWN_SECONDS - 6) is None
        with watched.slots.work():
            assert watched.goes_on(10) is not None


def test_one_lost_slot_ends_nothing_while_others_move(watched: Watched) -> None:
    with watched.slots.work() as slot:
        slot.hold(60)
        assert watched.goes_on(600, moves=True) is None


def test_slots_that_hold_pictures_until_the_database_is_back_are_not_stuck(watched: Watched) -> None:
    with watched.slots.work() as slot:
        slot.hold(60)
        for _ in range(100):
            watched.slots.found_database_away()
            assert watched.goes_on(20) is None
        watched.beats = False  # it waits its turn behind them
        for _ in range(10):
            watched.slots.found_database_away()
            assert watched.goes_on(20) is None


def test_a_heart_that_stands_still_ends_it(watched: Watched) -> None:
    watched.beats = False
    assert watched.goes_on(BEAT_SECONDS) is None
    assert "the heartbeat has stood still" in str(watched.goes_on(4))


def test_a_consumer_that_hears_nothing_although_redis_answers_ends_it(watched: Watched) -> None:
    watched.hears = False
    assert watched.goes_on(DEAF_SECONDS) is None
    assert "although Redis answers" in str(watched.goes_on(4))
    assert DEAF_SECONDS + 4 < 60


def test_a_redis_that_is_away_is_a_trouble_and_no_reason_to_end(watched: Watched) -> None:
    watched.hears, watched.tickets = False, None
    assert watched.goes_on(3600) is None
    assert "has heard nothing of Redis" in str(watched.watchdog.trouble)
    watched.tickets = 3  # it is back: Celery may take 32 s to try again
    assert watched.goes_on(32) is None
    watched.hears = True
    assert watched.goes_on(2) is None and watched.watchdog.trouble is None


def test_tickets_that_lie_in_the_queue_and_do_not_come_end_it(watched: Watched) -> None:
    watched.tickets = 5
    assert watched.goes_on(IGNORED_SECONDS) is None
    assert "tickets lie in the queue" in str(watched.goes_on(14))
    assert IGNORED_SECONDS + 14 < 60


def test_tickets_that_lie_there_while_every_slot_is_taken_or_some_come_are_no_trouble(watched: Watched) -> None:
    watched.tickets = 5
    for _ in range(20):
        with watched.slots.work():
            assert watched.goes_on(30, moves=True) is None
    slots = [watched.slots.work() for _ in range(10)]
    for slot in slots:
        slot.__enter__().hold(1000)
    assert watched.goes_on(600) is None
    for slot in slots:
        slot.__exit__(None, None, None)


def test_a_pause_of_the_whole_process_is_not_its_own_lack_of_progress(watched: Watched) -> None:
    watched.beats = watched.hears = False
    with watched.slots.work() as slot:
        slot.hold(60)
        watched.goes_on(10)
        watched.moment += 3600  # SIGSTOP, and then SIGCONT
        assert watched.goes_on(30) is None


def test_a_stuck_worker_ends_also_if_what_it_holds_can_never_be_stored(watched: Watched) -> None:
    def next_tick(_: float) -> bool:
        watched.moment += TICK_SECONDS
        watched.slots.found_database_away()
        slot.hold(OWN_SECONDS)  # it tries again, so it is never late
        assert watched.moment < 10_000, "it goes on for ever"
        return False

    watched.watchdog._closed.wait = next_tick  # type: ignore[method-assign,assignment]
    with watched.slots.work() as slot:
        slot.hold(180)
        watched.watchdog._let_calls_end()
    assert 180 + HELD_SECONDS <= watched.moment - 1000 < 180 + HELD_SECONDS + 10


ENDS = """
import threading, time
from worker.slots import Slots
from worker import watchdog
watchdog.TICK_SECONDS, watchdog.BEAT_SECONDS = 0.02, 0.1
slots, stopping = Slots(2), threading.Event()
def call():
    with slots.work() as slot:
        slot.hold(60)
        stopping.wait(60)
        time.sleep(0.5)  # who does not wait for it ends before
        print("the call came to its end", stopping.is_set(), flush=True)
        slot.end()
threading.Thread(target=call).start()
threading.Thread(target=lambda: slots.work().__enter__(), daemon=True).start()
watchdog.Watchdog(turns=lambda: 1, stopping=stopping, slots=slots).start()
threading.Event().wait()
"""


def test_it_ends_the_process_once_its_calls_have_ended_and_says_why_with_every_stack() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=ROOT, env={"PATH": os.defpath}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == STUCK == 70
    assert done.stdout == "the call came to its end True\n"
    assert done.stderr.startswith("WARNING this worker is stuck: the heartbeat has stood still for 0 s; it ends with")
    assert "in call" in done.stderr and "Thread 0x" in done.stderr
