"""The vendor's own books: how many calls came, how many were in flight at once, how many pictures went out."""

import threading
import time
from collections.abc import Callable
from typing import Any

#: More prompts than this are counted in the totals only.
MOST_PROMPTS = 10_000


class Books:
    """Safe to use from many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watchers = 0
        self._in_flight = 0
        self.reset()

    def reset(self) -> None:
        """Start again from zero; calls in flight stay counted as such."""
        with self._changed:
            self._calls = self._pictures = 0
            self._most_in_flight = self._in_flight
            self._by_prompt: dict[str, int] = {}

    def came(self) -> None:
        with self._changed:
            self._calls += 1
            self._in_flight += 1
            self._most_in_flight = max(self._most_in_flight, self._in_flight)
            self._tell()

    def asked(self, prompt: str) -> None:
        with self._changed:
            if prompt in self._by_prompt or len(self._by_prompt) < MOST_PROMPTS:
                self._by_prompt[prompt] = self._by_prompt.get(prompt, 0) + 1

    def went(self, pictures: int) -> None:
        """A call ends. Said just before the last bytes go out: a client that has its answer finds itself counted."""
        with self._changed:
            self._in_flight -= 1
            self._pictures += pictures
            self._tell()

    def take_back(self, pictures: int) -> None:
        """The last bytes could not be sent after all."""
        with self._changed:
            self._pictures -= pictures
            self._tell()

    def read(self) -> dict[str, Any]:
        """`calls` counts every POST, refused ones too; `pictures` whole painted pictures written in full."""
        with self._changed:
            return self._read()

    def wait_until(self, is_so: Callable[[dict[str, Any]], bool], timeout: float) -> dict[str, Any]:
        """The books as soon as they are so. Raises TimeoutError with what they were after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._watchers += 1
            try:
                while not is_so(books := self._read()):
                    if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                        raise TimeoutError(f"after {timeout} s: {books}")
                return books
            finally:
                self._watchers -= 1

    def _tell(self) -> None:
        if self._watchers:
            self._changed.notify_all()

    def _read(self) -> dict[str, Any]:
        return {
            "calls": self._calls,
            "in_flight": self._in_flight,
            "most_in_flight": self._most_in_flight,
            "pictures": self._pictures,
            "by_prompt": dict(self._by_prompt),
        }
