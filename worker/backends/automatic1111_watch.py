"""Looking at the server while a picture of ours is drawn: how far it is, whether it is still wanted, whose it is.

The server tells what it draws, not for whom: it has a web page too, and other people may use it. So what it draws
counts as ours only if it drew nothing just before we asked, and ever since the same one thing. Until then, and from the
first doubt on, nothing is told of how far it is (a preview may be somebody else's picture) and nothing is interrupted.
What remains: somebody who asks within the same few milliseconds as we do, before us. One call of ours is under way at a
time.
"""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from worker.backends.automatic1111_answers import State
from worker.backends.automatic1111_server import Server
from worker.deadline import Call

log = logging.getLogger(__name__)

#: Between two looks at the server, and between two at whether it is still wanted, in seconds.
LOOK_SECONDS = 1.0
WANTED_SECONDS = 0.2
#: How long a server that was told to stop may take to answer: it still decodes what there is.
STOPPING_SECONDS = 10.0

#: Told of step, steps, and the preview in base64 if there is one.
Tell = Callable[[int, int, str | None], None]


class Ownership:
    """Whether what the server draws is ours. `before`: what it was at just before we asked; None: nobody knows."""

    def __init__(self, before: State | None) -> None:
        self._possible = before is not None and before.idle
        self._since: str | None = None

    def sees(self, state: State) -> bool:
        """Whether what it is at now is ours, as far as can be known."""
        if not self._possible:
            return False
        if self._since is None and not state.idle:
            self._since = state.since
        elif self._since is not None and (state.idle or state.since != self._since):
            self._possible = False  # it has ended, or was not ours
        return self._possible and not state.idle

    def ended(self, after: State) -> bool:
        """After our answer came: whether what it tells is still about ours."""
        return after.idle or (self._since is not None and after.since == self._since)


class Watch:
    """A thread beside the one that waits for the picture, from `with` to the end of it.

    `canceled`: the picture is not wanted any more, and its call was given up. `broken_off`: somebody interrupted it.
    """

    def __init__(self, server: Server, call: Call, tell: Tell, is_canceled: Callable[[], bool]) -> None:
        self._server = server
        self._call = call
        self._tell = tell
        self._is_canceled = is_canceled
        self._ownership = Ownership(server.state())
        self._over = threading.Event()
        self._question: Call | None = None
        self._told: tuple[int, int, str | None] | None = None
        self._thread = threading.Thread(target=self._watch, name="automatic1111-watch", daemon=True)
        self.canceled = False
        self.broken_off = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        question = self._question
        if question is not None and not self.canceled:
            self._server.watchdog.hurry(question, 0)  # a server that is slow to tell keeps no picture waiting
        self._thread.join()
        if self._call.expired and not self.canceled:
            self._interrupt()  # nobody waits for it any more

    def look_back(self) -> None:
        """After the answer: `broken_off` once more, since the last look was before its end."""
        after = self._server.state()
        if after is not None and after.broken_off and self._ownership.ended(after):
            self.broken_off = True

    def _watch(self) -> None:
        try:
            next_look = time.monotonic()
            while not self._over.wait(WANTED_SECONDS):
                if self._is_canceled():
                    self._give_up()
                    return
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + LOOK_SECONDS
                    self._look()
        except Exception:  # news of a picture is not worth the picture
            log.exception("nobody looks at the server any more")

    def _look(self) -> None:
        state = self._server.state(self._began, preview=True)
        if state is None or not self._ownership.sees(state) or self._over.is_set():
            return
        self.broken_off = self.broken_off or state.broken_off
        news = (max(0, min(state.step, state.steps)), state.steps, state.preview)
        if state.steps > 0 and news != self._told:
            self._told = news
            self._tell(*news)

    def _began(self, call: Call) -> None:
        self._question = call
        if self._over.is_set():  # set before it was known what to cut off
            self._server.watchdog.hurry(call, 0)

    def _give_up(self) -> None:
        self.canceled = True
        self._server.watchdog.hurry(self._call, STOPPING_SECONDS if self._interrupt() else 0)

    def _interrupt(self) -> bool:
        """Stop the server if it draws ours; whether it was told to. Never what may be somebody else's."""
        state = self._server.state()
        return state is not None and self._ownership.sees(state) and self._server.interrupt()
