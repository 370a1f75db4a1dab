"""Which backend a submitted job waits for: what is known of them, kept at hand, and the policy of shared/routing.py.

Nothing is looked up for one job: workers and queues are counted now and then (forecast.py, depth.py), and the breakers
are read from Redis by a thread of its own, so that a Redis that is slow or away holds up no submission.
"""

import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from api.depth import Depth
from api.forecast import Forecast
from shared import routing
from shared.breaker import BreakerBoard, Standing
from shared.courier import Courier
from shared.routing import AUTO, Choice, RoutingReason
from shared.settings import Settings


class BreakerWatch(Courier):
    """How the breakers stood a moment ago."""

    #: They are read so often, at most.
    REST_SECONDS = 1.0
    #: What is older than this is not believed: who asks then waits for news, but no longer than `PATIENCE_SECONDS`.
    BELIEVED_SECONDS = 3.0
    PATIENCE_SECONDS = 0.05

    def __init__(self, board: BreakerBoard, backends: tuple[str, ...]) -> None:
        super().__init__("breakers")
        self._board = board
        self._backends = backends
        self._wanted = False
        self._known: Mapping[str, Standing | None] = {}
        self._read_at = -math.inf

    def look(self) -> None:
        """Have them read, if it is time. Call it while no connection is held."""
        if time.monotonic() - self._read_at < self.REST_SECONDS:
            return
        with self._wake:
            self._wanted = True
            self._send()
            self._wake.wait_for(self._is_fresh, self.PATIENCE_SECONDS)

    def of(self, backend: str) -> Standing | None:
        """None while nothing is known."""
        return self._known.get(backend) if self._is_fresh() else None

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._read_at < self.BELIEVED_SECONDS

    def _waiting(self) -> bool:
        return self._wanted

    def _run_errands(self) -> float:
        known = self._board.read(self._backends)
        with self._wake:
            self._known, self._read_at, self._wanted = known, time.monotonic(), False
            self._wake.notify_all()
        return self.REST_SECONDS


class Router:
    """Chooses, by what was known a moment ago."""

    def __init__(self, settings: Settings, depth: Depth, forecast: Forecast, breakers: BreakerBoard) -> None:
        self._settings = settings
        self._depth = depth
        self._forecast = forecast
        self._watch = BreakerWatch(breakers, settings.backends)
        self._choosing = threading.Lock()

    def look(self) -> None:
        """Find out what `choose` goes by, if it is time. Call it while no connection is held. Raises AWAY."""
        self._depth.look()
        if len(self._settings.backends) > 1:
            self._watch.look()

    def choose(self, model: str, asked: str, input: Mapping[str, Any]) -> Choice | None:
        """The backend whose queue such a job waits in, as it was asked for. None: no backend here can do it."""
        backends = routing.able(self._settings.backends, model, input)
        if asked != AUTO:
            return Choice(asked, RoutingReason.asked) if asked in backends else None
        if len(backends) == 1:
            return Choice(backends[0], RoutingReason.only_one)
        return routing.choose(
            [
                routing.candidate(
                    backend,
                    model,
                    self._settings.prices,
                    self._watch.of(backend),
                    self._forecast.known(backend),
                    self._depth.known(backend),
                    full=self._depth.is_full(backend),
                )
                for backend in backends
            ]
        )

    def place(self, model: str, asked: str, input: Mapping[str, Any]) -> Choice | None:
        """Choose, and take the place. Raises Refused if there is no room for it."""
        with self._choosing:  # or two that choose at once find the same last place
            choice = self.choose(model, asked, input)
            if choice is not None:
                self._depth.take_place(choice.backend)
        return choice

    def close(self) -> None:
        self._watch.close()
