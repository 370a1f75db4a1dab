"""Claims for hundreds of threads: one transaction at a time, for all the threads that wait for it."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from itertools import zip_longest

from shared import jobs
from shared.database import AWAY, Database
from shared.jobs import Claim, Terms

log = logging.getLogger(__name__)


class _Place:
    """A thread's place in the queue for a job."""

    served = False
    claim: Claim | None = None


class Claims:
    """Takes the next jobs of a backend. One claim at a time also keeps two suspects (jobs.claim) out of one process."""

    #: Jobs that one transaction takes: it holds SQLite's one writer for as long.
    AT_MOST = 32

    def __init__(
        self, database: Database, backend: str, terms: Terms, more: Callable[[int], None] = lambda jobs: None
    ) -> None:
        """`more`: called after a claim that left nobody without a job, with how many it took: there may be more."""
        self._more = more
        self._database = database
        self._backend = backend
        self._terms = terms
        self._waiting: deque[_Place] = deque()
        self._turn = threading.Lock()

    def next(self) -> Claim | None:
        """The next job, or None if there is none or the database is away."""
        place = _Place()
        self._waiting.append(place)
        with self._turn:
            while not place.served:
                self._serve([self._waiting.popleft() for _ in range(min(len(self._waiting), self.AT_MOST))])
        return place.claim

    def _serve(self, places: list[_Place]) -> None:
        claims: list[Claim] = []
        try:
            with self._database.write() as tx:
                taken = jobs.claim(tx, self._backend, self._terms, limit=len(places))
            claims = taken  # once they are committed: what stands in no book is nobody's, and not called for
        except AWAY as error:
            log.warning("no job could be claimed, the database is away (%s)", type(error).__name__)  # the sweep rings
        finally:
            for place, claim in zip_longest(places, claims):
                place.claim, place.served = claim, True
        if len(claims) == len(places):
            self._more(len(claims))
