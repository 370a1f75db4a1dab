"""How long a client may take to send its request. gunicorn's threads wait for ever, a drip at a time: as many half-sent
heads as there are threads, from anybody, would be the end of the service.

What is answered has no limit here: waits and streams are as long as they are.
"""

import select
import socket
import time
from typing import Any

from gunicorn.http.errors import NoMoreData  # type: ignore[import-untyped]
from gunicorn.http.parser import RequestParser  # type: ignore[import-untyped]
from gunicorn.http.unreader import SocketUnreader  # type: ignore[import-untyped]
from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]

#: From a head's first byte to its end. Less than the grace of a server that is told to stop (gunicorn.conf.py), so that
#: none of them outlasts it.
HEAD_SECONDS = 20.0
#: For a body; and a second more for so many bytes of it as came: the largest one, over a slow line, takes minutes.
BODY_SECONDS = 60.0
SLOWEST = 100_000
#: So long a thread that has answered waits for the next request of the same client, before the connection goes back to
#: the one thread that watches them all: that way and back costs more than most answers, and a client that asks again
#: at once need not wait for it.
LINGER_SECONDS = 0.01


class TimelyReader(SocketUnreader):  # type: ignore[misc]  # gunicorn comes without types
    """Reads from a client's socket for as long as it was allowed to. Raises TimeoutError then."""

    def __init__(self, client: socket.socket) -> None:
        super().__init__(client)
        self.allow(HEAD_SECONDS)

    def allow(self, seconds: float) -> None:
        """What follows must come within these."""
        self._until = time.monotonic() + seconds

    def chunk(self, size_hint: int | None = None) -> bytes:
        before = self.sock.gettimeout()  # whoever throws a rest away has set his own
        left = max(self._until - time.monotonic(), 0.001)  # 0 would be another mode of the socket
        self.sock.settimeout(left if before is None else min(before, left))
        try:
            data: bytes = super().chunk(size_hint)
        finally:
            self.sock.settimeout(before)
        self._until += len(data) / SLOWEST
        return data


class TimelyParser(RequestParser):  # type: ignore[misc]
    """The requests of one connection."""

    unreader: SocketUnreader

    def __init__(self, config: Any, client: socket.socket, address: Any) -> None:
        super().__init__(config, client, address)
        self.unreader = TimelyReader(client)

    def __next__(self) -> Any:
        self.unreader.allow(HEAD_SECONDS)
        try:
            request = super().__next__()
        except TimeoutError:
            raise NoMoreData from None  # as if it had hung up: without an answer, and without a line in the log
        self.unreader.allow(BODY_SECONDS)
        return request


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threads, which nobody holds up by sending slowly. TLS is the proxy's business, not covered here."""

    def handle(self, connection: Any) -> Any:
        if self.cfg.is_ssl:
            return super().handle(connection)
        if connection.parser is None:
            connection.parser = TimelyParser(self.cfg, connection.sock, connection.client)
        kept = super().handle(connection)
        # Not while others wait for a thread: whoever asks without a pause would keep his for ever.
        while kept is True and self.alive and self.tpool._work_queue.empty() and _sends_more(connection.sock):
            kept = super().handle(connection)
        return kept


def _sends_more(client: socket.socket) -> bool:
    soon = select.poll()
    soon.register(client, select.POLLIN)
    return bool(soon.poll(LINGER_SECONDS * 1000))
