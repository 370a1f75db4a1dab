"""An HTTP client that costs little, so that what is measured is the server: one keep-alive connection, raw."""

import asyncio
from typing import NamedTuple

#: Read at once: a large picture comes in few pieces.
BUFFER_BYTES = 256 * 1024


class Answer(NamedTuple):
    """One answer; `head` in lower case, `size` of the body in bytes, `body` empty unless it was to be kept."""

    status: int
    head: bytes
    size: int
    body: bytes


class Connection(asyncio.BufferedProtocol):
    """Asks, and reads the answer, one at a time. Answers must have a Content-Length, as all that we measure have."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._asked: asyncio.Future[Answer] | None = None
        self._head = b""
        self._missing = self._size = 0
        self._body = bytearray()
        self.is_closed = False

    @classmethod
    async def open(cls, port: int, *, keep: bool = True) -> "Connection":
        """Connect to loopback. `keep`: whether bodies are kept, or only counted."""
        _, connection = await asyncio.get_running_loop().create_connection(lambda: cls(keep), "127.0.0.1", port)
        return connection

    async def ask(self, request: bytes) -> Answer:
        """Send it and wait for the answer. Raises ConnectionError if the server hangs up."""
        if self.is_closed:
            raise ConnectionResetError
        self._asked = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._asked

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if self._asked is not None and not self._asked.done():
            self._asked.set_exception(error or ConnectionResetError())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, count: int) -> None:
        if self._head:
            self._take(self._view[:count])
            return
        self._filled += count
        end = self._buffer.find(b"\r\n\r\n", 0, self._filled)
        if end < 0:
            return
        self._head = bytes(self._view[:end]).lower()
        length = self._head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        self._missing = self._size = int(length or 0)
        rest = self._view[end + 4 : self._filled]
        self._filled = 0
        self._take(rest)

    def _take(self, part: memoryview) -> None:
        self._missing -= len(part)
        if self._keep:
            self._body += part
        if self._missing <= 0:
            answer = Answer(int(self._head[9:12]), self._head, self._size, bytes(self._body))
            self._head = b""
            self._body.clear()
            if self._asked is not None and not self._asked.done():
                self._asked.set_result(answer)


def request(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """A request as it goes over the wire; `headers`: further lines, each with its line end."""
    if body:
        headers += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode() + body
