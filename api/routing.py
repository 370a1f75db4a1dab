"""Which backend a submitted job waits for: what is known of them, kept at hand, and the policy of shared/routing.py.

Nothing is looked up for one job: workers and queues are counted now and then (forecast.py, depth.py), and the breakers
are read from Redis by a thread (breaker_watch.py), so that a Redis that is slow or away holds up no submission.
"""

import threading
from collections.abc import Mapping
from typing import Any

from api.breaker_watch import BreakerWatch
from api.depth import Depth
from api.forecast import Forecast
from shared import routing
from shared.routing import AUTO, Choice, RoutingReason
from shared.settings import Settings


class Router:
    """Chooses, by what was known a moment ago."""

    def __init__(self, settings: Settings, depth: Depth, forecast: Forecast, watch: BreakerWatch) -> None:
        self._settings = settings
        self._depth = depth
        self._forecast = forecast
        self._watch = watch
        self._choosing = threading.Lock()

    def look(self) -> None:
        """Find out what `choose` goes by, if it is time. Call it while no connection is held. Raises AWAY."""
        self._depth.look()
        if len(self._settings.backends) > 1:
            self._watch.look()
        else:
            self._watch.ask()  # it is no choice, but tells when to come back

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
