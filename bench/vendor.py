"""The vendor's stand-in for measuring: the sandbox's wire format from one event loop, and a book of arrivals.

Cheaper than the sandbox (no thread a connection), so that what is measured is not the stand-in; and it knows when each
call came. `python -m bench.vendor` listens on a free port of loopback and prints it.

    POST /api/v1     the vendor's call. A prompt that starts with HELD is answered only after a release; of one that
                     starts with HALF, half the picture comes at once, and the rest after a release
    PUT /wish        {"delay": seconds, "bytes": size of the pictures}; begins a new book
    GET /book        {"calls", "in_flight", "most_in_flight", "arrivals": {prompt: time.monotonic()}, "by_prompt"}
    GET /calls       how many came, as a bare number
    PUT /answers     {KIND: base64}: these bytes come in place of a picture for prompts that are KIND and one more word
    POST /release    answer what is held
    GET /small, /large    an answer of a few bytes, of a large picture: what the load generator can do at most
"""

import asyncio
import json
import sys
import time
from base64 import b64decode
from collections import Counter
from functools import cache
from typing import Any

from sandbox.answers import noise

#: Prompts that start so wait for a release.
HELD = "held"
#: Prompts that start so get half their picture, and the rest after a release.
HALF = "half"
#: Width and height of every picture, in pixels: enough for 1.2 MB of noise.
SIDE = 640
LARGE = 1_200_000
#: What the book tells.
NAMES = ("calls", "in_flight", "most_in_flight", "arrivals", "by_prompt")


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
        self.answers: dict[str, bytes] = {}
        self.held: list[Vendor] = []
        self.in_flight = 0
        self._begin()

    def _begin(self) -> None:
        self.calls = 0
        self.most_in_flight = self.in_flight
        self.arrivals: dict[str, float] = {}
        self.by_prompt: Counter[str] = Counter()

    def wish(self, delay: float, size: int) -> None:
        self.delay, self.picture = delay, picture(size)
        self._begin()

    def came(self, prompt: str) -> None:
        self.arrivals[prompt] = time.monotonic()
        self.by_prompt[prompt] += 1
        self.calls += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def release(self) -> None:
        held, self.held = self.held, []
        for connection in held:
            connection.deliver()

    def read(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NAMES}


class Vendor(asyncio.Protocol):
    """One connection, a request at a time."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._received = b""
        self._waiting = False  # an answer is owed
        self._prompt = ""

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
            case "GET /calls":
                self._answer(str(self._book.calls).encode())
            case "PUT /answers":
                self._book.answers |= {kind: b64decode(text) for kind, text in json.loads(body).items()}
                self._answer(b"{}")
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
        self._prompt = prompt
        if prompt.startswith(HALF):
            self._transport.write(self._halves()[0])
        if prompt.startswith((HELD, HALF)):
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
            if self._prompt.startswith(HALF):
                self._transport.write(self._halves()[1])
            else:
                kind = self._prompt.rpartition(" ")[0]
                self._answer(self._book.answers.get(kind, self._book.picture), "image/png")

    def _halves(self) -> tuple[bytes, bytes]:
        whole = _head(len(self._book.picture), "image/png") + self._book.picture
        return whole[: len(whole) // 2], whole[len(whole) // 2 :]

    def _answer(self, body: bytes, content_type: str = "application/json", status: str = "200 OK") -> None:
        self._transport.write(_head(len(body), content_type, status))
        self._transport.write(body)


def _head(length: int, content_type: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n".encode()


async def _serve() -> None:
    book = Book()
    server = await asyncio.get_running_loop().create_server(lambda: Vendor(book), "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
