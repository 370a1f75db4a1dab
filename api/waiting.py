"""Waiting for a job without asking again and again: a few places a process, woken when the job moves.

Whoever waits takes a place first, then reads, then waits: so what happens in between is not missed. Every second or
two it reads again without having been woken, because a subscription can be silent for other reasons than silence.
No database connection is held while waiting.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from shared.announcements import Listener

T = TypeVar("T")

LONGEST_WAIT = 60  # seconds
READ_AGAIN = 1.5  # seconds, on average

_PREFERENCE = re.compile(r'\s*wait\s*=\s*(?:([0-9]{1,30})|"([0-9]{1,30})")\s*(?:;.*)?', re.IGNORECASE)


def preferred_wait(header: str | None) -> int | None:
    """The seconds of `Prefer: wait=N` (RFC 7240), at most 60. None if it is absent or makes no sense: then ignored."""
    for preference in (header or "").split(","):
        if match := _PREFERENCE.fullmatch(preference):
            return min(int(match[1] or match[2]), LONGEST_WAIT)
    return None


class Waiting:
    """The waiting places of this process, and the one subscription that wakes them."""

    def __init__(self, listen: Callable[[Callable[[str | None], None]], Listener], places: int) -> None:
        """`listen` makes the listener, given what it calls. `places`: how many may wait at once."""
        self._listener = listen(self.wake)
        self._free = threading.BoundedSemaphore(places)
        self._lock = threading.Lock()
        self._bells: dict[str, set[threading.Event]] = {}
        self._listening = False
        self._closed = False

    def until(self, job_id: str, seconds: float, read: Callable[[], T], enough: Callable[[T], bool]) -> tuple[T, bool]:
        """Read until it is enough, or the time is over. Returns what was read last, and whether there was a place."""
        with self._place(job_id) as bell:
            found = read()
            if bell is None:
                return found, False
            deadline = time.monotonic() + seconds
            while not enough(found) and not self._closed and (left := deadline - time.monotonic()) > 0:
                bell.wait(min(left, READ_AGAIN * random.uniform(0.7, 1.3)))
                bell.clear()
                found = read()
            return found, True

    def wake(self, job_id: str | None) -> None:
        """This job has moved; None: any may have."""
        with self._lock:
            if job_id is None:
                bells = {bell for waiting in self._bells.values() for bell in waiting}
            else:
                bells = set(self._bells.get(job_id, ()))
        for bell in bells:
            bell.set()

    def close(self) -> None:
        """The process stops: every wait ends now."""
        self._closed = True
        self._listener.close()
        self.wake(None)

    @contextmanager
    def _place(self, job_id: str) -> Iterator[threading.Event | None]:
        if self._closed or not self._free.acquire(blocking=False):
            yield None
            return
        bell = threading.Event()
        with self._lock:
            self._bells.setdefault(job_id, set()).add(bell)
            if not self._listening:
                # Not before: a thread does not survive the fork that made this process.
                self._listening = True
                self._listener.start()
        try:
            yield bell
        finally:
            with self._lock:
                self._bells[job_id].discard(bell)
                if not self._bells[job_id]:
                    del self._bells[job_id]
            self._free.release()
