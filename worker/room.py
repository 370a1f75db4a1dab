"""The memory that pictures take: so many are read or written at once, and the others wait, but not for long.

It saves memory and nothing depends on it. A picture that waits for its turn to be received is not safe yet, and one
slow connection must not keep the others' from us: so after a while everybody goes on.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """Places for so many threads."""

    def __init__(self, places: int) -> None:
        self._places = threading.BoundedSemaphore(places)

    @contextmanager
    def place(self, patience_seconds: float) -> Iterator[None]:
        """Hold one while the block runs; go on without one if none came free in so long."""
        holds = self._places.acquire(timeout=patience_seconds)
        try:
            yield
        finally:
            if holds:
                self._places.release()
