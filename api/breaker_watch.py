"""How the breakers stood a moment ago, for those who can't wait for Redis: who chooses a backend, and who says when to
come back."""

import math
import time
from collections.abc import Mapping

from shared.breaker import BreakerBoard, Standing
from shared.courier import Courier


class BreakerWatch(Courier):
    """They are read by a thread of its own."""

    #: Between two readings, in seconds, at least.
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

    def ask(self) -> None:
        """Have them read, if it is time. Nobody waits for it."""
        if time.monotonic() - self._read_at < self.REST_SECONDS:
            return
        with self._wake:
            self._wanted = True
            self._send()

    def look(self) -> None:
        """The same, and wait a moment for news if there were none lately. Call it while no connection is held."""
        self.ask()
        if not self._is_fresh():
            with self._wake:
                self._wake.wait_for(self._is_fresh, self.PATIENCE_SECONDS)

    def of(self, backend: str) -> Standing | None:
        """None while nothing is known."""
        return self._known.get(backend) if self._is_fresh() else None

    def open_for(self, backend: str) -> float:
        """In how many seconds this backend is tried again, if its breaker was open when it was read last; else 0."""
        standing = self._known.get(backend)
        return 0.0 if standing is None else max(standing.open_for - (time.monotonic() - self._read_at), 0.0)

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
