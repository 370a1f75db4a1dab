"""The breakers of all backends, in the sweep's log: who gets no jobs, and why, and when it gets them again."""

import logging
from collections.abc import Sequence

from shared.breaker import BreakerBoard, Standing, State

log = logging.getLogger(__name__)


class BreakerLog:
    """Each change is said once."""

    def __init__(self, board: BreakerBoard, backends: Sequence[str]) -> None:
        self._board = board
        self._backends = backends
        self._known: dict[str, Standing] = {}

    def look(self) -> None:
        for backend, standing in self._board.read(self._backends).items():
            if standing is None:
                continue
            before = self._known.get(backend)
            self._known[backend] = standing
            if standing.state == State.closed:
                if before is not None and before.state != State.closed:
                    log.warning("%s: its breaker is closed again (it was %s)", backend, before.reason)
            elif before is None or before.reason != standing.reason:
                log.warning("%s: its breaker is open (%s): its jobs wait", backend, standing.reason)
