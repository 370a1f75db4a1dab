"""The vendor's stand-in for measuring: the sandbox's wire format from one event loop, and a book of arrivals.

Cheaper than the sandbox (no thread a connection), so that what is measured is not the stand-in; and it knows when each
call came. `python -m bench.vendor` listens on a free port of loopback and prints it.

    POST /api/v1     the vendor's call. A prompt that starts with HELD is answered only after a release
    PUT /wish        {"delay": seconds, "bytes": size of the pictures}; begins a new book
    GET /book        {"calls", "in_flight", "most_in_flight", "arrivals": {prompt: time.monotonic()}}
    POST /release    answer what is held
    GET /small, /large    an answer of a few bytes, of a large picture: what the load generator can do at most
"""

import asyncio
import json
import sys
import time
from functools import cache
from typing import Any

from sandbox.answers import noise

#: Prompts that start so wait for a release.
HELD = "held"
#: Width and height of every picture, in pixels: enough for 1.2 MB of noise.
SIDE = 640
LARGE = 1_200_000


@cache
def picture(size: int) -> bytes:
    """A picture of about so many bytes. Painted when its size is wished for first, not when it is called for."""
    label = len(noise(SIDE, SIDE, size)) - size  # what the word SANDBOX takes
    return noise(SIDE, SIDE, max(size - label, 1))


class Book:
    """What is wished for, and what has come. One event loop uses it, so nothing is locked."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.picture = picture(20_000)
        self.held: list[Vendor] = []
        self.in_flight = 0
        self._begin()

    def _begin(self) -> None:
        self.calls = 0
        self.most_in_flight = self.in_flight
        self.arrivals: dict[str, float] = {}

    def wish(self, delay: float, size: int) -> None:
        self.delay, self.picture = delay, picture(size)
        self._begin()

    def came(self, prompt: str) -> None:
        self.arrivals[prompt] = time.monotonic()
        self.calls += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def release(self) -> None:
        held, self.held = self.held, []
        for connection in held:
            connection.deliver()

    def read(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("calls", "in_flight", "most_in_flight", "arrivals")}


class Vendor(asyncio.Protocol):
    """One connection, a request at a time."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._received = b""
        self._waiting = False  # an answer is owed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting:
            self._waiting = False
            self._book.in_flight -= 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length or 0):
            return
        self._received = b""
        method, path, _ = head.split(b" ", 2)
        self._serve(f"{method.decode()} {path.decode()}", body)

    def _serve(self, what: str, body: bytes) -> None:
        match what:
            case "POST /api/v1":
                self._call(str(json.loads(body)["data"]["prompt"]))
            case "PUT /wish":
                wish = json.loads(body)
                self._book.wish(wish["delay"], wish["bytes"])
                self._answer(b"{}")
            case "GET /book":
                self._answer(json.dumps(self._book.read()).encode())
            case "POST /release":
                self._book.release()
                self._answer(b"{}")
            case "GET /small":
                self._answer(b"{}")
            case "GET /large":
                self._answer(picture(LARGE), "image/png")
            case _:
                self._answer(b"{}", status="404 Not Found")

    def _call(self, prompt: str) -> None:
        self._book.came(prompt)
        self._waiting = True
        if prompt.startswith(HELD):
            self._book.held.append(self)
        elif self._book.delay:
            asyncio.get_running_loop().call_later(self._book.delay, self.deliver)
        else:
            self.deliver()

    def deliver(self) -> None:
        """The picture, unless the caller has gone."""
        if self._waiting:
            self._waiting = False
            self._book.in_flight -= 1
            self._answer(self._book.picture, "image/png")

    def _answer(self, body: bytes, content_type: str = "application/json", status: str = "200 OK") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode())
        self._transport.write(body)


async def _serve() -> None:
    book = Book()
    server = await asyncio.get_running_loop().create_server(lambda: Vendor(book), "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
