"""What the slots of this process do, so that whoever watches them (worker/watchdog.py) sees whether anything moves.

Nothing here waits for anybody but for a lock that is held for a few lines: it must be able to tell of a deadlock.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: What a slot may need for a step of our own: to find its next job, to store what came. The database's own limits (30 s
#: for a connection, 15 s for a statement, 8 s for a lock) end it before, and who waits for others sees them end.
OWN_SECONDS = 40.0


class Slot:
    """One slot at work: its step, and how long that one may take. Its own thread alone changes it."""

    def __init__(self, slots: "Slots") -> None:
        self._slots = slots
        self.step = 0
        self.limit_seconds = OWN_SECONDS
        self.holds_one = False

    def hold(self, limit_seconds: float) -> None:
        """It has a job or a delivery now, and works at it for so long at most."""
        self._next(limit_seconds, holds_one=True)

    def end(self) -> None:
        """That one is done with, and the slot looks for the next."""
        self._slots.count_done()
        self._next(OWN_SECONDS, holds_one=False)

    def _next(self, limit_seconds: float, *, holds_one: bool) -> None:
        self.step, self.limit_seconds, self.holds_one = self.step + 1, limit_seconds, holds_one
        self._slots.moved()


class Slots:
    """All of them. `moves` may miss one when two threads count at once: that it changes is what matters."""

    def __init__(self, count: int) -> None:
        self.count = count
        #: Steps that began or ended; what was ended since the start; steps that found the database away.
        self.moves = 0
        self.done = 0
        self.away = 0
        #: Tickets that came.
        self.asked = 0
        self._working: set[Slot] = set()
        self._own = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def work(self) -> Iterator[Slot]:
        """A ticket came: a slot is at work for as long as the block runs."""
        slot = Slot(self)
        with self._lock:
            self.asked += 1
            self._working.add(slot)  # no move: tickets go on coming while all who got one wait in vain
        self._own.slot = slot
        try:
            yield slot
        finally:
            with self._lock:
                self._working.discard(slot)
            self._own.slot = None
            self.moved()

    def hold(self, limit_seconds: float = OWN_SECONDS) -> None:
        """The slot of this thread, if it is one, begins another step with what it has: one of our own, or so long."""
        slot: Slot | None = getattr(self._own, "slot", None)
        if slot is not None:
            slot.hold(limit_seconds)

    def moved(self) -> None:
        """Something goes on."""
        self.moves += 1

    def count_done(self) -> None:
        with self._lock:
            self.done += 1

    def found_database_away(self) -> None:
        """A slot holds what it has until the database is back: that is no deadlock."""
        self.away += 1
        self.moved()

    def at_work(self) -> list[Slot]:
        with self._lock:
            return list(self._working)

    def in_hand(self) -> int:
        return sum(slot.holds_one for slot in self.at_work())
