"""The sandbox's HTTP side: reading requests, sending answers (badly, on demand), the control routes.

A thread a connection, HTTP/1.1 with keep-alive. Requests are read here and not by `http.server`: its header parser
costs more than all the rest of a call, and a load test is to measure us and not the stand-in.
"""

import base64
import contextlib
import json
import math
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import ThreadingHTTPServer
from socketserver import StreamRequestHandler, TCPServer
from types import TracebackType
from typing import Any, Self

from sandbox.answers import answer, phrase
from sandbox.books import Books
from sandbox.box import Box
from sandbox.pictures import Pictures
from sandbox.troubles import NONE, BadTrouble, Rule, Rules, Troubles, split_prompt
from sandbox.wire import BAD_INPUT, Answer, VendorError, check_key, error_answer, json_answer, read_call

LONGEST_LINE = 16 * 1024
MOST_HEADERS = 100
LARGEST_BODY = 64 * 1024 * 1024
#: The last piece of an answer; the books are closed before it goes out.
LAST_PIECE = 64 * 1024


class Gone(Exception):
    """The connection is over: the client left, the request is beyond repair, or a trouble ended it."""


class Server(ThreadingHTTPServer):
    """Holds what all connections share; each connection is served by a `Connection`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4096

    def __init__(self, address: tuple[str, int]) -> None:
        self.pictures = Pictures()
        self.rules = Rules()
        self.books = Books()
        self.box = Box(self.pictures, self.rules)
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()
        super().__init__(address, Connection)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own would ask DNS for the host's name

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not self.stopping.is_set():
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        """End every open connection, and so whatever waits on one."""
        self.stopping.set()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.box.interrupt()  # not before: what is half-drawn would still be sent, as a whole answer


class Connection(StreamRequestHandler):
    """One client's connection, request after request."""

    disable_nagle_algorithm = True
    server: Server
    _in_books = False

    def handle(self) -> None:
        with contextlib.suppress(Gone, ConnectionError, TimeoutError):
            while self._one_request():
                pass

    def _one_request(self) -> bool:
        """Read one request and answer it; whether another may follow."""
        line = self.rfile.readline(LONGEST_LINE)
        if not line:
            return False
        try:
            method, target, version = line.decode("latin-1").split()
        except ValueError:
            raise Gone from None
        headers = self._headers()
        keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        path = target.partition("?")[0]
        body = self._body(headers)
        if path == "/api/v1" and method == "POST":
            self._call(headers.get("authorization", ""), body)
        elif path.startswith("/sdapi/"):
            self._send(*self.server.box.answer(method, target, headers.get("authorization", ""), body, self._wait))
        else:
            reply = control(self.server, method, path, body)
            self._send(reply if method != "HEAD" else replace(reply, body=b""))
        return keep

    def _headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        for _ in range(MOST_HEADERS):
            line = self.rfile.readline(LONGEST_LINE)
            if line in (b"\r\n", b"\n"):
                return headers
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon:
                raise Gone
            headers[name.lower()] = value.strip()
        raise Gone

    def _body(self, headers: dict[str, str]) -> bytes:
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not re.fullmatch(r"[0-9]{1,9}", length) or int(length) > LARGEST_BODY:
            self._send(error_answer(411, BAD_INPUT, f"Content-Length, at most {LARGEST_BODY}, is required"))
            raise Gone
        if headers.get("expect", "").lower() == "100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Gone
        return body

    def _call(self, authorization: str, body: bytes) -> None:
        """One call of the vendor."""
        self.server.books.came()
        self._in_books = True
        try:
            troubles = NONE
            try:
                check_key(authorization)
                wish = read_call(body)
                self.server.books.asked(wish.prompt)
                drawn, own = split_prompt(wish.prompt)
                troubles = self.server.rules.take(wish.prompt, own)
                self._wait(troubles)
                reply = answer(replace(wish, prompt=drawn), troubles, self.server.pictures)
            except BadTrouble as error:
                reply = error_answer(400, BAD_INPUT, f"Sandbox: {error}")
            except VendorError as error:
                reply = error_answer(error.status, error.code, error.message)
            self._send(reply, troubles)
        finally:
            self._close_books(0)

    def _close_books(self, pictures: int) -> None:
        if self._in_books:
            self._in_books = False
            self.server.books.went(pictures)

    def _wait(self, troubles: Troubles) -> None:
        """The troubles that come before any answer."""
        self._pause(troubles.delay)
        if troubles.hang is not None:
            self.connection.settimeout(None if math.isinf(troubles.hang) else troubles.hang)
            self.connection.recv(1)  # returns when the client goes
            raise Gone
        if troubles.reset == "before":
            self._reset()

    def _pause(self, seconds: float) -> None:
        if seconds and self.server.stopping.wait(seconds):
            raise Gone

    def _reset(self) -> None:
        """Close with a TCP RST instead of a FIN: that is what no lingering means."""
        self._close_books(0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()
        raise Gone

    def _send(self, reply: Answer, troubles: Troubles = NONE) -> None:
        head, body = _head(reply), reply.body
        if troubles.truncate is not None:
            body = body[: int(len(body) * troubles.truncate)]
        if troubles.reset == "body":
            body = body[: len(body) // 2]
        if troubles.drip_headers:
            self._drip(head, 1.0)
            head = b""
        if troubles.drip is not None:
            self.connection.sendall(head)
            self._drip(body[:-1], troubles.drip)
            head, body = b"", body[-1:]
        data = head + body
        if len(data) > LAST_PIECE:
            self.connection.sendall(memoryview(data)[:-LAST_PIECE])
            data = data[-LAST_PIECE:]
        self._close_books(reply.pictures)
        try:
            self.connection.sendall(data)
        except OSError:
            self.server.books.take_back(reply.pictures)
            raise
        if troubles.reset == "body":
            self._reset()
        if troubles.truncate is not None:
            raise Gone

    def _drip(self, data: bytes, rate: float) -> None:
        """Send at `rate` bytes a second, in steps of a tenth of a second or a byte, whichever is longer."""
        step = max(1, int(rate / 10))
        for start in range(0, len(data), step):
            self.connection.sendall(data[start : start + step])
            self._pause(step / rate)


def _head(reply: Answer) -> bytes:
    lines = [f"HTTP/1.1 {reply.status} {phrase(reply.status)}", "Server: darkroom-sandbox"]
    lines += [f"Content-Type: {reply.content_type}", f"Content-Length: {len(reply.body)}"]
    lines += [f"{name}: {value}" for name, value in reply.headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def control(server: Server, method: str, path: str, body: bytes) -> Answer:
    """The routes that the vendor does not have, and the answers to what nobody has."""
    routes: dict[str, dict[str, Callable[[], Answer]]] = {
        "/api/v1": {"POST": lambda: error_answer(405, BAD_INPUT, "POST")},
        "/healthz": {"GET": lambda: json_answer(200, {"status": "ok"})},
        "/sandbox/calls": {
            "GET": lambda: json_answer(200, server.books.read()),
            "DELETE": lambda: _done(server.books.reset),
        },
        "/sandbox/box/calls": {
            "GET": lambda: json_answer(200, server.box.books.read()),
            "DELETE": lambda: _done(server.box.books.reset),
        },
        "/sandbox/troubles": {
            "GET": lambda: json_answer(200, {"rules": server.rules.listed()}),
            "PUT": lambda: _add_rule(server.rules, body),
            "DELETE": lambda: _done(server.rules.clear),
        },
    }
    if path not in routes:
        return error_answer(404, 7003, f"No route for {path}")
    if method not in routes[path]:
        allowed = ", ".join(routes[path])
        return error_answer(405, 7001, f"Method {method} not available for {path}", (("Allow", allowed),))
    return routes[path][method]()


def _done(work: Callable[[], None]) -> Answer:
    work()
    return json_answer(200, {"done": True})


def _add_rule(rules: Rules, body: bytes) -> Answer:
    try:
        wanted = json.loads(body)
        if not isinstance(wanted, dict) or not isinstance(wanted.get("troubles"), dict):
            raise BadTrouble('the body must be {"troubles": {...}, "calls": N or null, "match": "..." or null}')
        if unknown := wanted.keys() - {"troubles", "calls", "match"}:
            raise BadTrouble(f"unknown field {min(unknown)!r}; known: troubles, calls, match")
        rules.add(Rule(**wanted))
    except BadTrouble as error:
        return json_answer(400, {"error": str(error)})
    except (ValueError, RecursionError):
        return json_answer(400, {"error": "the body is not valid JSON"})
    return json_answer(200, {"rules": rules.listed()})


class Sandbox:
    """The sandbox inside one's own process, for tests: `with Sandbox() as sandbox: post(sandbox.url, ...)`.

    Listens from the start (port 0: a free one), serves from `start()` on. Raises OSError if the port is taken.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = Server((host, port))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.box_url = f"http://{host}:{self._server.server_address[1]}"
        self.url = f"{self.box_url}/api/v1"

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening and end every connection, whatever it waits for. May be called twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.hang_up()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def box(self) -> Box:
        """The machine with a GPU that it stands in for too, behind `box_url`."""
        return self._server.box

    def calls(self) -> dict[str, Any]:
        """The same as `GET /sandbox/calls`."""
        return self._server.books.read()

    def reset_calls(self) -> None:
        self._server.books.reset()

    def wait_until(self, is_so: Callable[[dict[str, Any]], bool], timeout: float = 10.0) -> dict[str, Any]:
        """Wait for the calls to be so, e.g. `lambda calls: calls["in_flight"] == 3`; TimeoutError otherwise."""
        return self._server.books.wait_until(is_so, timeout)

    def trouble(self, *, match: str | None = None, calls: int | None = None, **troubles: Any) -> None:
        """Add a rule, as `PUT /sandbox/troubles` does; `image` may be plain bytes. Raises BadTrouble."""
        if isinstance(troubles.get("image"), bytes):
            troubles["image"] = base64.b64encode(troubles["image"]).decode()
        self._server.rules.add(Rule(troubles, calls, match))

    def clear(self) -> None:
        """Forget all rules."""
        self._server.rules.clear()
