"""Leases that ran out: whose holder is gone, and whose is only late."""

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Row

#: What had a lease that ran out: its id, its fence, and that lease.
Lapsed = tuple[str, int, datetime]


class Lapses:
    """A lease must be seen lapsed twice before what it was for is rescued.

    After an outage of the database the workers, which try every second then, renew first.
    """

    #: How far apart it must be seen, in seconds.
    PAUSE_SECONDS = 5.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_seen: dict[Lapsed, float] = {}

    def rescue(self, look: Callable[[], Iterable[Row[Any]]], rescue: Callable[[Row[Any]], None]) -> None:
        """Rescue what was seen lapsed before, of all that `look` finds: rows with `id`, `fence` and `lease_until`.

        If either fails, because the database is away, what was seen until then counts no more.
        """
        before, self._first_seen = self._first_seen, {}
        rows = look()
        seen, moment = {}, self._clock()
        for row in rows:
            lapsed = (row.id, row.fence, row.lease_until)
            seen[lapsed] = before.get(lapsed, moment)
            if moment - seen[lapsed] >= self.PAUSE_SECONDS:
                rescue(row)
        self._first_seen = seen
