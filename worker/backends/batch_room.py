"""How many jobs of one size share a call, and which further jobs are worth claiming.

Jobs of the same width and height can share each call of the model; how many, the card's memory decides. What ran out
of memory once is not tried again until the process restarts.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shared.catalogue import SIDE

Size = tuple[int, int]  # width, height; pixels

#: Pixels of a picture, and how many of at most that size share a call; above the last one, each is alone. At 512x512
#: a picture does not fill a card, at 1024x1024 a single one nearly does.
MOST_AT_ONCE: Mapping[int, int] = {512 * 512: 8, 768 * 768: 4, 1024 * 1024: 2}
SIZES_IN_HAND = 2  # the one that is drawn, and the one that is drawn next
PATIENCE_SECONDS = 20.0  # how long other sizes may keep a third one out


def size_of(input: Mapping[str, Any]) -> Size:
    """Of the picture that a job asks for."""
    return int(input.get("width") or SIDE.default or 0), int(input.get("height") or SIDE.default or 0)


class BatchRoom:
    """Any thread may ask; the engine lowers. `most_at_once`: as MOST_AT_ONCE. `clock`: seconds, never backwards."""

    def __init__(
        self,
        most_at_once: Mapping[int, int] = MOST_AT_ONCE,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if any(pixels < 1 or jobs < 1 for pixels, jobs in most_at_once.items()):
            raise ValueError("most_at_once maps pixels to jobs, both at least 1")
        self._most_at_once = sorted(most_at_once.items())
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._lowered: dict[Size, int] = {}
        self._kept_out: dict[Size, float] = {}  # since when

    def cap(self, size: Size) -> int:
        """How many jobs of this size share a call at most."""
        lowered = self._lowered.get(size)
        if lowered is not None:
            return lowered
        pixels = size[0] * size[1]
        return next((jobs for limit, jobs in self._most_at_once if pixels <= limit), 1)

    def lower(self, size: Size, cap: int) -> None:
        """So many were too many for the memory: from now on, at most `cap`."""
        self._lowered[size] = max(1, min(cap, self.cap(size)))

    def admission(self, in_hand: Iterable[Size]) -> Callable[[Size], bool]:
        """Whether a job of a size may be claimed beside those in hand; each True counts it as taken.

        At most two sizes are in hand, each up to its cap. While both are refilled for ever, a third would never get
        in: after PATIENCE_SECONDS of being refused it, and nothing else, is let in.
        """
        taken = Counter(in_hand)
        with self._lock:
            if not taken:
                self._kept_out.clear()  # whoever was kept out gets in now, or has gone elsewhere

        def admit(size: Size) -> bool:
            with self._lock:
                if size not in taken and len(taken) >= SIZES_IN_HAND:
                    self._kept_out.setdefault(size, self._clock())
                    return False
                if self._others_wait_too_long(size) or taken[size] >= self.cap(size):
                    return False
                taken[size] += 1
                self._kept_out.pop(size, None)
                return True

        return admit

    def _others_wait_too_long(self, size: Size) -> bool:
        patience_ends = self._clock() - self._patience_seconds
        return any(since < patience_ends for other, since in self._kept_out.items() if other != size)
