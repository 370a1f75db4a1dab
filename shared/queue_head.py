"""Where a backend's queue begins, so that not every look at it walks there again.

What is claimed leaves an entry in the queue's index, which PostgreSQL clears away when nobody can see it any more.
While somebody reads an old state of the database (a dump, a forgotten transaction) it can clear none, and each look
walks over all of them: beside a snapshot that was a minute old a claim took twice as long (docs/reliability.md,
"A long queue").
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Row

#: A place in the queue: a job's rank and id.
Place = tuple[int, str]
#: Before every job.
BEGINNING: Place = (-(2**63), "")


class QueueHead:
    """The place at which a look found the first job, for as long as it is believed.

    A job that enters before that place meanwhile, as one that was put off does, is found so much later; but at once
    where fewer rows are found than were asked for.
    """

    BELIEVED_SECONDS = 1.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._place = BEGINNING
        self._until = self._clock()

    def look(self, find: Callable[[Place], Sequence[Row[Any]]], asked: int) -> Sequence[Row[Any]]:
        """The first rows of the queue, with `rank` and `id`. `find` finds up to `asked` of them from a place on."""
        if self._clock() < self._until:
            rows = find(self._place)
            if len(rows) == asked:
                return rows
        began = self._clock()
        rows = find(BEGINNING)
        is_long = bool(rows) and len(rows) == asked  # else its end is in sight
        self._place = (rows[0].rank, rows[0].id) if is_long else BEGINNING
        self._until = began + self.BELIEVED_SECONDS if is_long else began
        return rows
