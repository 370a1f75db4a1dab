"""The sandbox holds its calls until it is told to answer: for what is to happen before that, however long it takes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sandbox.server import Sandbox
from sandbox.troubles import Troubles


@contextmanager
def held(sandbox: Sandbox) -> Iterator[None]:
    """Calls that come while the block runs are answered at its end. (A worker waits 120 s for one.)"""
    rules, over = sandbox._server.rules, threading.Event()
    take = rules.take

    def take_at_the_end(prompt: str, own: dict[str, Any]) -> Troubles:
        over.wait()
        return take(prompt, own)

    with patch.object(rules, "take", take_at_the_end):
        try:
            yield
        finally:
            over.set()
