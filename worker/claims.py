"""Claims for hundreds of threads: one transaction at a time, for all the threads that wait for it."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from itertools import zip_longest
from typing import Generic, TypeVar

from shared.database import AWAY

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Place(Generic[T]):
    """A thread's place in the queue for something to do."""

    served = False
    claim: T | None = None


class Claims(Generic[T]):
    """Takes what is next. One claim at a time also keeps two suspects (jobs.claim) out of one process."""

    #: What one transaction takes: it holds SQLite's one writer for as long.
    AT_MOST = 32

    def __init__(self, take: Callable[[int], list[T]], more: Callable[[int], None]) -> None:
        """`take` claims up to so many and commits: what stands in no book is nobody's, and nobody works at it.

        `more`: called after a claim that left nobody without, with how many there were: there may be more.
        """
        self._more = more
        self._take = take
        self._waiting: deque[_Place[T]] = deque()
        self._turn = threading.Lock()

    def next(self) -> T | None:
        """The next one, or None if there is none or the database is away."""
        place: _Place[T] = _Place()
        self._waiting.append(place)
        with self._turn:
            while not place.served:
                self._serve([self._waiting.popleft() for _ in range(min(len(self._waiting), self.AT_MOST))])
        return place.claim

    def _serve(self, places: list[_Place[T]]) -> None:
        claims: list[T] = []
        try:
            claims = self._take(len(places))
        except AWAY as error:
            log.warning("nothing could be claimed, the database is away (%s)", type(error).__name__)  # the sweep rings
        finally:
            for place, claim in zip_longest(places, claims):
                place.claim, place.served = claim, True
        if len(claims) == len(places):
            self._more(len(claims))
