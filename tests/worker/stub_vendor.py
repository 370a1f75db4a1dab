"""A vendor of a few lines: a real socket on loopback that says, byte for byte, what a test wrote down."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

#: What the vendor does on a connection once it has read a whole request.
Script = Callable[[socket.socket, bytes], None]


def answer(status: int, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    """The bytes of one HTTP answer; `length` lies about the body."""
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def saying(*parts: bytes) -> Script:
    """Send this, in so many parts, and wait for the next request on the same connection."""

    def script(connection: socket.socket, _: bytes) -> None:
        for part in parts:
            connection.sendall(part)

    return script


def saying_and_closing(content: bytes) -> Script:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)

    return script


class StubVendor:
    """Serves until the end of its `with`. Notes every connection and every request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.over = threading.Event()  # set at the end: scripts that go on for ever look at it
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/api/v1"

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(60)  # what it accepted last is to be closed too
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            while request := self._read(connection):
                self.requests.append(request)
                self.script(connection, request)

    def _read(self, connection: socket.socket) -> bytes:
        received = b""
        while True:
            head, found, body = received.partition(b"\r\n\r\n")
            if found:
                lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
                if not lengths or len(body) >= int(lengths[0].split(b":")[1]):
                    return received
            part = connection.recv(65536)
            if not part:
                return b""
            received += part
