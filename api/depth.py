"""How deep the queues are, and who is turned away for it: without a bound, a flood is found out by its age."""

import math
import threading
import time
from collections.abc import Sequence

from api.errors import Refused
from api.forecast import Forecast
from shared.database import Database
from shared.load import queued

#: Bounds of the Retry-After of a refusal, in seconds.
SOONEST, LATEST = 1, 3600


class Depth:
    """A bound for the jobs that wait for one backend.

    Nobody counts a hundred thousand rows for each submission: they are counted now and then, and this process' own are
    added meanwhile. So several processes together may exceed it by what the others took in a few seconds.
    """

    #: Between two counts, in seconds: while it is far from full; and while it is not, or somebody chooses by them.
    FAR_SECONDS, NEAR_SECONDS = 5.0, 1.0
    #: A million rows take a moment: a count is followed by so many times as long without one.
    REST = 50

    def __init__(self, database: Database, forecast: Forecast, backends: Sequence[str], most: int) -> None:
        self._database = database
        self._forecast = forecast
        self._most = most
        self._known = dict.fromkeys(backends, 0)
        self._look_at = 0.0
        self._looking = threading.Lock()
        self._taking = threading.Lock()

    def look(self) -> None:
        """Count, if it is time. Call it while no connection is held. Raises AWAY."""
        if time.monotonic() < self._look_at or not self._looking.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            self._forecast.look()
            with self._database.read() as connection:
                for backend in self._known:
                    # More than the bound: how many are too many says how long it takes.
                    self._known[backend] = queued(connection, backend, at_most=2 * self._most)
            near = len(self._known) > 1 or any(2 * waiting > self._most for waiting in self._known.values())
            pause = self.NEAR_SECONDS if near else self.FAR_SECONDS
            self._look_at = time.monotonic() + max(pause, self.REST * (time.monotonic() - began))
        finally:
            self._looking.release()

    def known(self, backend: str) -> int:
        """How many wait for this backend, as far as this process knows."""
        return self._known[backend]

    def is_full(self, backend: str) -> bool:
        return self._known[backend] >= self._most

    def take_place(self, backend: str) -> None:
        """One more waits for this backend. Raises Refused if there is no room for it."""
        with self._taking:
            excess = self._known[backend] + 1 - self._most
            if excess <= 0:
                self._known[backend] += 1
                return
        seconds = self._forecast.seconds_for(backend, excess)
        after = str(min(max(math.ceil(seconds), SOONEST), LATEST))
        detail = f"{self._most:,} jobs or more wait for {backend} already. Nothing was accepted."
        raise Refused("queue_full", detail, headers={"Retry-After": after})
