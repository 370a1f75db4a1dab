"""Room: how many are inside at once, and that nobody waits for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor

from worker.room import Room


def test_no_more_are_inside_at_once_than_there_are_places() -> None:
    room, lock = Room(3), threading.Lock()
    inside, most = 0, 0
    full = threading.Barrier(3)

    def go_in(_: int) -> None:
        nonlocal inside, most
        with room.place(60):
            with lock:
                inside += 1
                most = max(most, inside)
            full.wait(30)  # nobody leaves before three are inside, so a fourth could be seen
            with lock:
                inside -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(go_in, range(12)))
    assert most == 3


def test_whoever_waits_for_too_long_goes_on_without_a_place() -> None:
    room = Room(1)
    with room.place(60), room.place(0.01):
        pass
    with room.place(60):  # and gave back none that it did not have: else the semaphore would say so
        pass
