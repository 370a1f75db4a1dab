"""Log lines as a process writes them, for tests: through the service's own handler."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared import logs


class Lines(io.StringIO):
    """What was written so far."""

    def as_json(self, *, logger: str = "") -> list[dict[str, Any]]:
        """Each line as an object; fails if one is none. `logger`: of this one alone."""
        lines = [json.loads(line) for line in self.getvalue().splitlines()]
        return [line for line in lines if line["logger"].startswith(logger)]


@contextmanager
def written(log_format: str = "json", level: int = logging.INFO) -> Iterator[Lines]:
    """What is logged in the block, as a process named `test` writes it."""
    lines = Lines()
    handler = logs.handler(log_format, "test")
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(lines)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
