"""The child processes that judge pictures: a picture that crashes or hangs its decoder harms its own job alone.

A few children, each judging one picture at a time; a thread that finds none free waits in a queue. A child that dies
or takes too long is ended and replaced. Children end by themselves when this process ends, even by `kill -9`: the
socket between us closes. After a fork the new process starts children of its own.
"""

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.picture import CONTENT_TYPES, MOST_BYTES, Facts, Unfit

COMMAND = (sys.executable, "-m", "shared.picture")
ROOT = Path(__file__).resolve().parent.parent  # where `-m shared.picture` is found
START_SECONDS = 10.0  # for a child that takes another's place, while somebody waits for it
LOAD_SECONDS = 30.0  # for the first ones: everything starts at once then, and a busy machine takes its time
LONGEST_ANSWER = 4096  # bytes; an answer says why in one line


class InspectorAway(Exception):
    """The picture was not judged, through no fault of its own: no child could be started, or none came free."""


class _ChildGone(Exception):
    """The child did not take the picture: it had died before."""


def _start(command: Sequence[str], theirs: socket.socket, ours: socket.socket) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd=ROOT)
    except OSError:
        ours.close()
        raise


class _Child:
    def __init__(self, command: Sequence[str], seconds: float) -> None:
        """Start one and wait until it is ready, for so long; raises InspectorAway."""
        try:
            # One socket in place of two pipes: `sendall` and `recv` with a timeout are bounded on both ways.
            self.socket, theirs = socket.socketpair()
            with theirs:
                self.process = _start(command, theirs, self.socket)
        except OSError as error:
            raise InspectorAway(f"no process to judge pictures could be started: {error.strerror}") from error
        try:
            self._receive(time.monotonic() + seconds)
        except (OSError, EOFError) as error:
            self.end()
            raise InspectorAway("the process that judges pictures did not become ready") from error

    def judge(self, data: bytes, seconds: float) -> Facts:
        """Raises Unfit, also when the decoder crashed or hung; _ChildGone when it was dead before it had the picture.

        After Unfit from a crash the child is ended; `alive` tells.
        """
        deadline = time.monotonic() + seconds
        try:
            self.socket.settimeout(seconds)
            self.socket.sendall(len(data).to_bytes(4, "big") + data)
        except TimeoutError:
            self.end()
            raise Unfit(f"judging the picture took more than {seconds:g} seconds") from None
        except OSError:
            # It decodes only what it has read to the end: this picture can't have been the cause.
            self.end()
            raise _ChildGone from None
        try:
            return _facts(self._receive(deadline))
        except TimeoutError:
            self.end()
            raise Unfit(f"judging the picture took more than {seconds:g} seconds") from None
        except (OSError, EOFError):
            self.end()
            raise Unfit("the picture crashed its decoder") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, Unfit):
                raise
            self.end()  # it talks nonsense: whatever happened to it, it is not our program any more
            raise Unfit("the picture confused its decoder") from None

    @property
    def alive(self) -> bool:
        return self.socket.fileno() >= 0 and self.process.poll() is None

    def end(self) -> None:
        """At once. An idle child would end by itself, a hanging one would not."""
        self.socket.close()
        self.process.kill()
        self.process.wait()

    def _receive(self, deadline: float) -> bytes:
        length = int.from_bytes(self._receive_exactly(4, deadline), "big")
        if length > LONGEST_ANSWER:
            raise EOFError
        return self._receive_exactly(length, deadline)

    def _receive_exactly(self, count: int, deadline: float) -> bytes:
        parts = b""
        while len(parts) < count:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))  # 0 would mean: do not block
            part = self.socket.recv(count - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts


def _facts(answer: bytes) -> Facts:
    """Read an answer as if a stranger had written it: the child may have been taken over by a picture."""
    fields = json.loads(answer)
    if "unfit" in fields:
        raise Unfit(str(fields["unfit"]))
    content_type, width, height = fields["content_type"], fields["width"], fields["height"]
    turned = fields["turned"]
    if content_type not in CONTENT_TYPES.values() or type(width) is not int or type(height) is not int:
        raise TypeError
    if turned is not None and type(turned) is not bool:
        raise TypeError
    return Facts(content_type, width, height, turned)


class Inspector:
    """Judges pictures in `children` processes; safe to call from any number of threads.

    `seconds` bounds the judging of one picture, `wait_seconds` the wait for a child that is free. `command` is the
    child's program. Children are started when first needed, or by `load`.
    """

    def __init__(
        self,
        children: int = 2,
        seconds: float = 10.0,
        wait_seconds: float = 20.0,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._children = children
        self._seconds = seconds
        self._wait_seconds = wait_seconds
        self._command = command
        self._begin()
        ref = weakref.ref(self)  # what is registered at fork stays registered for ever

        def after_fork() -> None:
            if inspector := ref():
                inspector._leave_to_the_parent()

        os.register_at_fork(after_in_child=after_fork)

    @property
    def bound_seconds(self) -> float:
        """The longest that one inspect() takes."""
        return self._wait_seconds + 2 * START_SECONDS + self._seconds

    def load(self) -> None:
        """Start all children now; raises InspectorAway if one does not become ready."""
        taken: list[_Child | None] = []
        with self._loading:  # two that load at once would wait for each other's children
            try:
                for index in range(self._children):
                    taken.append(self._take())
                    taken[index] = self._ready(taken[index], LOAD_SECONDS)
            finally:
                for child in taken:
                    self._give_back(child)

    def health(self) -> str | None:
        """None, or why no picture can be judged."""
        return "the inspector is closed" if self._closed else None

    def inspect(self, data: bytes) -> Facts:
        """What `data` is; raises Unfit if it is not one whole picture, InspectorAway if that can't be told."""
        return self.inspect_in_turn(lambda: data)

    def inspect_in_turn(self, read: Callable[[], bytes]) -> Facts:
        """The same, of what `read` gives: called once a child is free, so that those who wait for one take no memory.
        Raises what `read` does."""
        child = self._take()
        try:
            data = read()
            if not data or len(data) > MOST_BYTES:
                raise Unfit(f"the picture is empty or has more than {MOST_BYTES} bytes")
            for _ in range(2):
                child = self._ready(child)
                with contextlib.suppress(_ChildGone):
                    return child.judge(data, self._seconds)
            raise InspectorAway("the processes that judge pictures keep dying")
        except Unfit:
            if self._closed:  # it was close() that ended the child
                raise InspectorAway("the inspector is closed") from None
            raise
        finally:
            self._give_back(child)

    def close(self) -> None:
        """End the children; a judging that runs now fails. Nothing can be judged afterwards."""
        self._closed = True
        with self._lock:
            running = list(self._running)
        for child in running:
            # Wakes the thread that uses the child, if there is one, and that thread ends it.
            with contextlib.suppress(OSError):
                child.socket.shutdown(socket.SHUT_RDWR)
        for _ in range(self._children):
            with contextlib.suppress(queue.Empty):
                self._end(self._idle.get(timeout=1))
        for _ in range(self._children):
            self._idle.put(None)  # wakes the threads that wait for a child

    def _begin(self) -> None:
        self._closed = False
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._running: set[_Child] = set()
        # None stands for a child that is not started yet. Last in, first out: the second one starts when it is needed.
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(self._children):
            self._idle.put(None)

    def _leave_to_the_parent(self) -> None:
        # Our copies of the sockets only: the children and their answers belong to the process that we came from.
        inherited, closed = self._running, self._closed
        for child in inherited:
            child.socket.close()
        self._begin()
        self._closed = closed

    def _take(self) -> _Child | None:
        try:
            child = self._idle.get(timeout=self._wait_seconds)
        except queue.Empty:
            raise InspectorAway(f"no process to judge pictures came free in {self._wait_seconds:g} seconds") from None
        if self._closed:
            self._give_back(child)
            raise InspectorAway("the inspector is closed")
        return child

    def _ready(self, child: _Child | None, seconds: float = START_SECONDS) -> _Child:
        if child is not None and child.alive:
            return child
        self._end(child)
        child = _Child(self._command, seconds)
        with self._lock:  # close() sets the flag first and then takes the lock: one of us sees the other
            self._running.add(child)
            closed = self._closed
        if closed:
            self._end(child)
            raise InspectorAway("the inspector is closed")
        return child

    def _give_back(self, child: _Child | None) -> None:
        if child is not None and (self._closed or not child.alive):
            self._end(child)
            child = None
        self._idle.put(child)

    def _end(self, child: _Child | None) -> None:
        if child is not None:
            child.end()
            with self._lock:
                self._running.discard(child)
