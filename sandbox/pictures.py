"""The pictures already painted: kept by all that makes them, up to a number of bytes; nothing is painted twice."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

KEPT_BYTES = 64 * 1024 * 1024


class Pictures:
    """Safe to use from many threads. What is asked for while it is being painted is waited for."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._bytes = 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._painting: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()
        # As many painters as cores: hundreds at once would be no faster and take gigabytes.
        self._painters = threading.Semaphore(os.cpu_count() or 2)

    def get(self, key: Hashable, paint: Callable[[], bytes]) -> bytes:
        """The picture of this key; painted by the first that asks, and whatever `paint` raises is that one's."""
        while True:
            with self._lock:
                if (picture := self._kept.get(key)) is not None:
                    self._kept.move_to_end(key)
                    return picture
                if (done := self._painting.get(key)) is None:
                    done = self._painting[key] = threading.Event()
                    break
            done.wait()  # then look again: it is there, unless painting failed or it was pushed out
        try:
            with self._painters:
                picture = paint()
            self._keep(key, picture)
            return picture
        finally:
            with self._lock:
                del self._painting[key]
            done.set()

    def _keep(self, key: Hashable, picture: bytes) -> None:
        with self._lock:
            self._kept[key] = picture
            self._bytes += len(picture)
            while self._bytes > self._kept_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= len(oldest)
