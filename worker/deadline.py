"""A total deadline for calls made with `requests`, whose own timeouts begin anew with every received byte.

One watchdog thread knows the open calls and shuts the connection of those that are past their deadline, in whatever
phase they are: the TLS handshake, the headers, the body. The phases without a connection are bounded by the connect
timeout, name resolution included. So a server that never accepts, says nothing, drips, or sends `100 Continue` for
ever is cut off in time.

Also here, because only the connection knows: whether any part of the request may have been sent (`Call.sent`), which
decides what an error costs; and that a connection that lay idle is not used again. A server may close an idle
connection in the moment in which we send on it, and then nobody knows whether it took the request. Busy connections
are reused, idle ones are not, so that this becomes rare; where it still happens, `sent` is true.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import allowed_gai_family, create_connection

#: Seconds. Far below the keep-alive time of the usual servers (5 s to 400 s).
IDLE_SECONDS = 2.0


class Call:
    """One call in progress. `sent`: some of the request may have left. `expired`: the watchdog cut it off."""

    def __init__(self, deadline: float, judge: Callable[[list[str]], None] | None = None) -> None:
        self.deadline = deadline  # time.monotonic()
        self.judge = judge
        self.sent = False
        self.expired = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    @property
    def seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def hold(self, connection: socket.socket) -> None:
        """From now on, cutting this call off means shutting this connection."""
        # A duplicate of our own: the descriptor of the original may be closed, and its number given to somebody
        # else's connection, in the moment in which the watchdog acts. TLS also wraps the original in another object.
        duplicate = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            self._drop()
            self._socket = duplicate
            expired = self.expired
        if expired:
            self.cut_off()

    def let_go(self) -> None:
        """The connection is somebody else's from now on."""
        with self._lock:
            self._drop()

    def cut_off(self) -> None:
        with self._lock:
            self.expired = True
            if self._socket is not None:
                with suppress(OSError):  # it may not be connected any more
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


_CALL: ContextVar[Call | None] = ContextVar("_CALL", default=None)


class Watchdog:
    """Cuts off calls that are past their deadline. Its thread starts with the first call, in this very process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: set[Call] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextmanager
    def call(self, seconds: float, judge: Callable[[list[str]], None] | None = None) -> Iterator[Call]:
        """What this thread does inside is one call, cut off after so many seconds.

        `judge` is given the addresses of the host before one of them is dialled, and raises if none is to be.
        """
        call = Call(time.monotonic() + seconds, judge)
        with self._changed:
            self._calls.add(call)
            if self._thread is None or not self._thread.is_alive():  # also after a fork, which takes no threads along
                self._thread = threading.Thread(target=self._watch, name="call-deadlines", daemon=True)
                self._thread.start()
            self._changed.notify()
        token = _CALL.set(call)
        try:
            yield call
        finally:
            _CALL.reset(token)
            with self._changed:
                self._calls.discard(call)
            call.let_go()

    def hurry(self, call: Call, seconds: float) -> None:
        """Cut this call off after so many seconds from now, if not before."""
        with self._changed:
            call.deadline = min(call.deadline, time.monotonic() + seconds)
            self._changed.notify()

    def close(self) -> None:
        """Cut off every open call and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for call in self._calls:
                    if call.deadline <= now and not call.expired:
                        call.cut_off()
                pending = [call.deadline for call in self._calls if not call.expired]
                self._changed.wait(max(min(pending) - now, 0.01) if pending else None)
            for call in self._calls:
                call.cut_off()


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """The addresses of a host. The system's resolver knows no timeout, so it is asked from a thread of its own."""
    family, stream = allowed_gai_family(), socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host, port, family, stream, flags=socket.AI_NUMERICHOST)
        return [str(entry[4][0]) for entry in found]
    except (OSError, UnicodeError):
        pass  # a name, then
    answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put([str(entry[4][0]) for entry in socket.getaddrinfo(host, port, family, stream)])
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise socket.gaierror(socket.EAI_AGAIN, "no answer in time") from None
    if isinstance(answer, OSError | UnicodeError):
        raise socket.gaierror(socket.EAI_NONAME, str(answer)) from None
    return answer


class _WatchedConnection(HTTPConnection):
    """Tells the call of this thread about its connection."""

    idle_since = float("inf")

    def _new_conn(self) -> socket.socket:
        call = _CALL.get()
        seconds = float(self.timeout) if isinstance(self.timeout, int | float) else 60.0
        if call is not None:
            seconds = min(seconds, call.seconds_left)
        deadline = time.monotonic() + seconds
        try:
            addresses = _resolve(self._dns_host, self.port or self.default_port, max(seconds, 0.001))
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        if call is not None and call.judge is not None:
            call.judge(addresses)
        problem: Exception = OSError("the name has no address")
        for index, address in enumerate(addresses):
            # A fair share for each: one dead address (often the IPv6 one) must not use up all the time.
            share = max((deadline - time.monotonic()) / (len(addresses) - index), 0.001)
            try:
                connection = create_connection(
                    (address, self.port or self.default_port),
                    share,
                    source_address=self.source_address,
                    socket_options=self.socket_options,
                )
            except OSError as error:
                problem = error
                continue
            connection.settimeout(self.timeout)
            if call is not None:
                call.hold(connection)
            return connection
        if isinstance(problem, TimeoutError):
            raise ConnectTimeoutError(self, f"Connection to {self.host} timed out") from problem
        raise NewConnectionError(self, f"Failed to establish a new connection: {problem}") from problem

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is None:
            self.connect()  # first, so that a failure to connect is not taken for one after the request was sent
        call = _CALL.get()
        if call is not None and self.sock is not None:
            call.hold(self.sock)
            call.sent = True
        super().request(*args, **kwargs)

    @property
    def is_connected(self) -> bool:
        return super().is_connected and time.monotonic() - self.idle_since < IDLE_SECONDS


class _WatchedTLSConnection(_WatchedConnection, HTTPSConnection):
    pass


class _LetGo(HTTPConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        call = _CALL.get()
        if call is not None:
            call.let_go()
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)


class _WatchedPool(_LetGo):
    ConnectionCls = _WatchedConnection


class _WatchedTLSPool(_LetGo, HTTPSConnectionPool):
    ConnectionCls = _WatchedTLSConnection


_POOLS = {"http": _WatchedPool, "https": _WatchedTLSPool}


class _WatchedAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: Any, **kwargs: Any) -> Any:
        if str(proxy).lower().startswith("socks"):
            raise requests.exceptions.InvalidProxyURL("SOCKS proxies are not supported")
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager


class WatchedSession(requests.Session):
    """A session for many threads whose calls obey the watchdog; never retries and never follows a redirect."""

    def __init__(self, connections: int, hosts: int = 4) -> None:
        super().__init__()
        adapter = _WatchedAdapter(pool_connections=hosts, pool_maxsize=connections, max_retries=0)
        self.mount("https://", adapter)
        self.mount("http://", adapter)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        # Even with allow_redirects=False, requests prepares the next request and for that reads the whole body of a
        # redirect, however long or compressed.
        return None
