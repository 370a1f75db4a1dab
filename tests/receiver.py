"""A receiver of webhooks on loopback: keeps what it was sent, and behaves as badly as it is told to."""

import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Letter:
    """What came in one POST; `at` by this process's clock."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def told(self) -> Any:
        return json.loads(self.body)


#: What a receiver does with a POST that it has read.
Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        receiver = self.server.receiver
        receiver._keep(Letter(self.path, headers, body, time.monotonic()))
        self.close_connection = True
        receiver.behaviours.get(self.path, receiver.behaviour)(self)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """All in one piece: who waits for no more than 3 s between the head and the body never waits."""
        connection, self.wfile = self.wfile, io.BytesIO()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        whole, self.wfile = self.wfile.getvalue() + body, connection
        self.wfile.write(whole)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def takes(handler: Handler) -> None:
    handler.answer(204)


def says(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    return lambda handler: handler.answer(status, body, **headers)


def hangs(handler: Handler) -> None:
    handler.server.receiver.closed.wait(60)


def drips(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    with _until_gone():
        while not handler.server.receiver.closed.wait(0.5):
            handler.wfile.write(b"X-Slow: y\r\n")


def floods(handler: Handler) -> None:
    """An answer of 10 GB, as far as anybody reads it."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    with _until_gone():
        for _ in range(10_000):
            handler.wfile.write(bytes(1_000_000))


def resets(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@contextmanager
def _until_gone() -> Iterator[None]:
    with suppress(OSError):
        yield


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    receiver: "Receiver"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Receiver:
    """Listens from its making to `close()`. `letters`: all that came, in order."""

    def __init__(self, behaviour: Behaviour = takes, port: int = 0) -> None:
        self.behaviour = behaviour
        self.behaviours: dict[str, Behaviour] = {}  # by path
        self.letters: list[Letter] = []
        self.closed = threading.Event()
        self._came = threading.Condition()
        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.receiver = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def _keep(self, letter: Letter) -> None:
        with self._came:
            self.letters.append(letter)
            self._came.notify_all()

    def wait_for(self, enough: Callable[[list[Letter]], bool], seconds: float = 60) -> list[Letter]:
        """What came by the time that it is enough; fails if it never is."""
        with self._came:
            assert self._came.wait_for(lambda: enough(self.letters), seconds), f"{len(self.letters)} came"
            return list(self.letters)

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
