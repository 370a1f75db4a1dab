"""Errands to Redis, run from a thread of their own: nobody waits for Redis, and its absence fails nobody."""

import threading
from abc import ABC, abstractmethod


class Courier(ABC):
    """One thread, started by its first errand: threads don't survive the fork that makes a server's processes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @abstractmethod
    def _waiting(self) -> bool:
        """Whether there is an errand."""

    @abstractmethod
    def _run_errands(self) -> float:
        """Take what waits (under `self._wake`) and deliver it; how many seconds to rest then. It raises nothing."""

    def _send(self) -> None:
        """There is an errand now. Call it with `self._wake` held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._wake.notify()

    def close(self) -> None:
        """Deliver what is left, if Redis takes it at once, and stop."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=3)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting() or self._closed)
                if not self._waiting():
                    return
            rest = self._run_errands()
            if rest:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed, timeout=rest)
