"""Sends one webhook: a POST to a URL that a client chose, which must lead nowhere the operator does not want.

The host is resolved once; if any of its addresses is forbidden, nothing is dialled; else only these addresses are
(`addresses.py` judges, `deadline.py` dials). There is no redirect to follow, no proxy or .netrc of the environment, no
cookie and no decompression, because none of the libraries that know such things is used: each post is a connection of
its own, closed after it. A kept connection would save a handshake for the few receivers with many webhooks, and could
serve a host whose name has meanwhile another, forbidden address.

As soon as an answer's head is there, its status is the outcome: the receiver has decided. What of its body arrives in
time and within bounds is shown to people; a body that drips, breaks off or never ends takes nothing back, because
sending again would deliver twice what the receiver said it took.
"""

import http.client
import io
import logging
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import Any

import certifi
from urllib3 import HTTPHeaderDict
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NameResolutionError, NewConnectionError

from shared.webhook_url import BadUrl, Target, read_url
from worker.addresses import Network, why_forbidden
from worker.deadline import Call, Watchdog, _WatchedConnection, _WatchedTLSConnection

log = logging.getLogger(__name__)

SECONDS = 15.0  # for a whole post, from resolving the name to the last byte that is read
CONNECT_SECONDS = 5.0  # of these, for resolving and dialling
MOST_READ = 64 * 1024  # bytes of an answer, with its head and framing; 100 Continue counts too
BODY_SECONDS = 3.0  # for the body of an answer whose head has come: it is only shown
SHOWN = 1024  # bytes of an answer's body that are kept

#: What decides about the connection is ours to say.
_OURS = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "expect"}


class Trouble(StrEnum):
    forbidden_address = "forbidden_address"  # the host has an address that webhooks must not be sent to
    bad_url = "bad_url"  # the URL can be read in more than one way, or not at all
    unresolvable = "unresolvable"  # the host's name has no address, or none was said in time
    refused = "refused"  # no address of the host takes a connection on this port
    tls = "tls"  # the other side is not the one that the URL names, or can't speak TLS
    timeout = "timeout"  # the head of an answer did not come in time
    broken = "broken"  # the connection broke before the head of an answer, or what came is not HTTP


class NotDelivered(Exception):
    """There was no answer. `message` is for the receiver's owner: without the URL, and without addresses behind a name.

    The exception holds no cause: the libraries' errors hold the request, and with it what the URL's path keeps secret.
    """

    def __init__(self, kind: Trouble, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Answer:
    """What the receiver said, whatever it is: a redirect is an answer too."""

    status: int
    headers: Mapping[str, str]  # names in any case
    start: bytes  # of the body, as sent: not decompressed; at most SHOWN bytes
    seconds: float  # the whole post


class _Forbidden(Exception):
    """Raised by the judge of addresses; none of the network's errors, so that no library takes it for one."""


class _TooMuch(Exception):
    """More than MOST_READ bytes came."""


class Poster:
    """Posts webhooks; any number of threads may call, `connections` of them are served at once, the others wait.

    `allowed`: the operator's exceptions (DARKROOM_WEBHOOK_ALLOW). `seconds`, `connect_seconds`: see the constants.
    Certificates are held against the machine's own authorities (a company's among them) and certifi's list, which is
    there even where the machine has none. Raises OSError or ssl.SSLError where neither can be read.
    """

    def __init__(
        self,
        allowed: Sequence[Network],
        connections: int,
        *,
        seconds: float = SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._allowed = tuple(allowed)
        self._seconds = seconds
        self._connect_seconds = min(connect_seconds, seconds)
        self._free = threading.BoundedSemaphore(connections)
        self._watchdog = Watchdog()
        self._closed = False
        self._tls = ssl.create_default_context()
        self._tls.load_verify_locations(certifi.where())

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The receiver's answer. Raises NotDelivered, and ValueError for headers that are not the caller's to set."""
        if taken := _OURS & {name.lower() for name in headers}:
            raise ValueError(f"not the caller's to set: {', '.join(sorted(taken))}")
        try:
            target = read_url(url)
        except BadUrl as error:
            raise NotDelivered(Trouble.bad_url, str(error)) from None
        with self._free:
            if self._closed:
                raise NotDelivered(Trouble.broken, _SHUTDOWN)
            started = time.monotonic()
            with self._watchdog.call(self._seconds, self._judge_addresses) as call:
                outcome = self._outcome(target, body, headers, call)
            if isinstance(outcome, NotDelivered):
                raise outcome
            status, received, start = outcome
            return Answer(status, received, start, time.monotonic() - started)

    def close(self) -> None:
        """Break off every open post (`broken`); later ones are refused."""
        self._closed = True
        self._watchdog.close()

    def _outcome(
        self, target: Target, body: bytes, headers: Mapping[str, str], call: Call
    ) -> tuple[int, Mapping[str, str], bytes] | NotDelivered:
        """Returned, not raised: a raised error would take the libraries' one along as its context."""
        try:
            return self._ask(target, body, headers, call)
        except _Forbidden:
            message = (
                f"{target.host} is, or has among its addresses, one that webhooks must not be sent to;"
                " a receiver inside the network has to be allowed by the operator"
            )
            return NotDelivered(Trouble.forbidden_address, message)
        except _TooMuch:
            message = f"no end of the answer's head within {MOST_READ} bytes"
        except (HTTPError, OSError, http.client.HTTPException) as error:
            if self._closed:
                message = _SHUTDOWN
            elif call.expired:
                return NotDelivered(Trouble.timeout, f"no answer within {self._seconds:g} seconds")
            else:
                return self._judge(error, target)
        return NotDelivered(Trouble.broken, message)

    def _ask(
        self, target: Target, body: bytes, headers: Mapping[str, str], call: Call
    ) -> tuple[int, Mapping[str, str], bytes]:
        connection: HTTPConnection
        if target.scheme == "https":
            connection = _WatchedTLSConnection(
                target.host, target.port, timeout=self._connect_seconds, ssl_context=self._tls
            )
        else:
            connection = _WatchedConnection(target.host, target.port, timeout=self._connect_seconds)
        with closing(connection):
            connection.connect()
            connection.timeout = self._seconds  # the watchdog comes first; this is for a wait that it can't end
            connection.sock.settimeout(self._seconds)
            with suppress(BrokenPipeError, ConnectionResetError):  # some answer before they have read all
                connection.request(
                    "POST",
                    target.path,
                    body,
                    {"User-Agent": "darkroom", "Accept": "*/*", **headers} | _LAST,
                    preload_content=False,
                )
            return self._read(connection, call)

    def _read(self, connection: HTTPConnection, call: Call) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and the body's start. After the head nothing is an error any more (see the top of the file).

        Asked of http.client itself: urllib3's answer would log the URL with headers it can't read, and could inflate.
        """
        connection.response_class = _BoundedResponse
        response = http.client.HTTPConnection.getresponse(connection)
        assert isinstance(response, _BoundedResponse)
        if response.bounded.ended:  # http.client takes the end of a connection for the end of a head
            response.close()
            raise http.client.RemoteDisconnected("")
        self._watchdog.hurry(call, BODY_SECONDS)
        start = b""
        with closing(response), suppress(_TooMuch, OSError, http.client.HTTPException):
            while part := response.read1(MOST_READ):
                start += part[: SHOWN - len(start)]
        return response.status, HTTPHeaderDict(response.getheaders()), start

    def _judge_addresses(self, addresses: list[str]) -> None:
        for text in addresses:
            address = ip_address(text.partition("%")[0])
            if reason := why_forbidden(address, self._allowed):
                log.warning("no webhook to %s: it is %s", address, reason)
                raise _Forbidden

    def _judge(self, error: Exception, target: Target) -> NotDelivered:
        """Of an error that is not ours, only its kind is told: its text may hold addresses and the request."""
        place = f"{target.host}, port {target.port}"
        match error:
            case NameResolutionError():
                return NotDelivered(Trouble.unresolvable, f"the name {target.host} could not be resolved")
            case NewConnectionError():  # a kind of ConnectTimeoutError to urllib3, so it comes first
                return NotDelivered(Trouble.refused, f"{place} takes no connection")
            case ConnectTimeoutError():
                message = f"no connection to {place} within {self._connect_seconds:g} seconds"
                return NotDelivered(Trouble.timeout, message)
            case ssl.SSLCertVerificationError():
                return NotDelivered(Trouble.tls, f"the certificate of {place} is not accepted: {error.verify_message}")
            case ssl.SSLError():
                return NotDelivered(Trouble.tls, f"no TLS with {place} ({error.reason or type(error).__name__})")
            case TimeoutError():
                return NotDelivered(Trouble.timeout, f"{place} fell silent")
            case http.client.RemoteDisconnected():
                return NotDelivered(Trouble.broken, f"{place} closed the connection without an answer")
            case http.client.HTTPException():
                return NotDelivered(Trouble.broken, f"what {place} answered is not HTTP ({type(error).__name__})")
            case _:
                return NotDelivered(Trouble.broken, f"the connection to {place} broke ({type(error).__name__})")


_SHUTDOWN = "we were shutting down"
_LAST = {"Accept-Encoding": "identity", "Connection": "close"}


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.bounded = _Bounded(sock.makefile("rb", buffering=0))
        self.fp = io.BufferedReader(self.bounded)


class _Bounded(io.RawIOBase):
    """What comes over a connection, up to MOST_READ bytes. http.client alone would keep 100 headers of 64 kB each."""

    def __init__(self, raw: socket.SocketIO) -> None:
        self._raw = raw
        self._left = MOST_READ
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._left == 0:
            raise _TooMuch
        count = self._raw.readinto(memoryview(buffer)[: self._left])
        self._left -= count or 0
        self.ended = count == 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
