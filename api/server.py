"""How long a client may take to send its request, to take the answer, and to hang up. gunicorn's threads wait for ever,
a drip at a time: as many half-sent heads, or unread answers, as there are threads, from anybody, would be the end of
the service. And it waits for those who don't hang up in the one thread that watches all connections.

How long an answer is worked at has no limit here: waits and streams are as long as they are.

And what is no request that gunicorn can read is told so in the words of errors.py, not by a page.
"""

import errno
import select
import socket
import time
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from gunicorn.http.errors import (  # type: ignore[import-untyped]
    ConfigurationProblem,
    ExpectationFailed,
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    NoMoreData,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.http.parser import RequestParser  # type: ignore[import-untyped]
from gunicorn.http.unreader import SocketUnreader  # type: ignore[import-untyped]
from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]
from uuid_utils import uuid7

from api.errors import KINDS, PROBLEM, problem

#: From a head's first byte to its end. Less than the grace of a server that is told to stop (gunicorn.conf.py), so that
#: none of them outlasts it.
HEAD_SECONDS = 20.0
#: For a body; and a second more for so many bytes of it as came: the largest one, over a slow line, takes minutes.
BODY_SECONDS = 60.0
#: For a part of an answer, however short; and a second more for so many bytes of it.
ANSWER_SECONDS = 20.0
SLOWEST = 100_000
#: So long a thread that has answered waits for the next request of the same client, before the connection goes back to
#: the one thread that watches them all: that way and back costs more than most answers, and a client that asks again
#: at once need not wait for it.
LINGER_SECONDS = 0.01
#: A process leaves a new connection to the others for so long for each connection that it has, and so long at most.
#: All of them are woken; who comes first gets it, and by chance one had most of them: clients that keep theirs open
#: were then answered by one process, and the other stood by. 32 of them submit a quarter more jobs a second.
LEAVE_SECONDS, MOST_LEFT_SECONDS = 0.0001, 0.002
_OURS = "internal", "It was written to the log under this request_id."
#: What is said of each kind of error that gunicorn finds; the last is the base of all that a client can do wrong.
_UNREAD = {
    InvalidResponseHeader: _OURS,
    InvalidResponseHeaderName: _OURS,
    ConfigurationProblem: _OURS,
    LimitRequestLine: ("uri_too_long", "The request's first line may have 8,190 bytes."),
    LimitRequestHeaders: ("headers_too_large", "There may be 100 headers, of 8,190 bytes each."),
    ExpectationFailed: ("expectation_failed", "`Expect: 100-continue` is, and nothing else."),
    UnsupportedTransferCoding: ("unknown_coding", "Send the body whole, or in chunks."),
    ParseException: ("malformed", "This is not HTTP/1.1 as RFC 9112 has it."),
}


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


class TimelySocket(socket.socket):
    """A client's connection, on which what is sent must be taken in time. Raises ConnectionResetError otherwise: as if
    the client had hung up, without a line in the log."""

    def send(self, data: Any, flags: int = 0) -> int:  # of gunicorn's `100 Continue`
        self.sendall(data, flags)
        return len(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        before = self.gettimeout()
        if before is None:  # whoever sends a stream has set his own
            self.settimeout(ANSWER_SECONDS + len(data) / SLOWEST)
        try:
            super().sendall(data, flags)
        except TimeoutError:
            raise ConnectionResetError(errno.ECONNRESET, "what was sent was not taken") from None
        finally:
            self.settimeout(before)


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
    """gunicorn's threads, which nobody holds up by being slow. TLS is the proxy's business, not covered here."""

    def accept(self, listener: Any) -> None:
        if self.cfg.workers > 1:
            time.sleep(min(self.nr_conns * LEAVE_SECONDS, MOST_LEFT_SECONDS))
        super().accept(listener)

    def handle(self, connection: Any) -> Any:
        if self.cfg.is_ssl:
            return super().handle(connection)
        if connection.parser is None:
            before: socket.socket = connection.sock
            connection.sock = TimelySocket(before.family, before.type, before.proto, fileno=before.detach())
            connection.parser = TimelyParser(self.cfg, connection.sock, connection.client)
        kept = super().handle(connection)
        # Not while others wait for a thread: whoever asks without a pause would keep his for ever.
        while kept is True and self.alive and self.tpool._work_queue.empty() and _sends_more(connection.sock):
            kept = super().handle(connection)
        if not kept:
            connection.close(graceful=True)  # 2 s at most
            connection.close = _is_closed  # gunicorn would do it once more, for all to wait for
        return kept

    def _keepalive_after(self, connection: Any, keepalive: bool) -> bool:
        # What is left of a body is thrown away after the answer: it is too late to answer that it can't be read.
        with suppress(ParseException):
            return bool(super()._keepalive_after(connection, keepalive))
        return False

    def handle_error(self, request: Any, client: socket.socket, address: Any, error: Exception) -> None:
        """Answer what never got as far as the app. The log names no more than the kind of error: its words may quote
        the request, with its key."""
        request_id = uuid7().hex
        code, detail = next((said for kind, said in _UNREAD.items() if isinstance(error, kind)), _OURS)
        if code == _OURS[0]:
            self.log.error("the request %s failed (%s)", request_id, type(error).__name__, exc_info=error)
        else:
            self.log.warning("the request %s could not be read (%s)", request_id, type(error).__name__)
        kind, body = KINDS[code], problem(code, detail, request_id).encode()
        head = (
            f"HTTP/1.1 {kind.status} {HTTPStatus(kind.status).phrase}\r\nContent-Type: {PROBLEM}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\nCache-Control: no-store\r\n"
            f"X-Content-Type-Options: nosniff\r\nX-Request-Id: {request_id}\r\n\r\n"
        )
        with suppress(OSError):  # it has hung up
            client.sendall(head.encode() + body)


def _is_closed(graceful: bool = False) -> None: ...


def _sends_more(client: socket.socket) -> bool:
    soon = select.poll()
    soon.register(client, select.POLLIN)
    return bool(soon.poll(LINGER_SECONDS * 1000))
