"""The memory that large bodies may take in one process: hundreds of them may come at once, and each passes through it
several times, as bytes, as text, as base64 and as a picture."""

import threading

#: In bytes.
MOST = 256_000_000
#: Of memory, for each byte of a body.
TIMES = 4
#: How long a request waits for others to be done, in seconds.
PATIENCE_SECONDS = 2.0


class Room:
    """Taken before a large body is read, and given back when nothing is left of it."""

    def __init__(self) -> None:
        self._free = MOST
        self._changed = threading.Condition()

    def take(self, length: int) -> int | None:
        """Room for a body of so many bytes: how much is to be given back. None if there was none, after a while."""
        amount = length * TIMES
        with self._changed:
            if not self._changed.wait_for(lambda: amount <= self._free, PATIENCE_SECONDS):
                return None
            self._free -= amount
        return amount

    def give_back(self, amount: int) -> None:
        with self._changed:
            self._free += amount
            self._changed.notify_all()
