"""A TCP proxy that breaks things on demand: what a network between two processes can be like on a bad day.

It passes everything to a port of loopback, from an event loop in a thread of its own. What it does wrong is changed
while it runs, for both directions or one. Data that were swallowed never come, so a connection that has lost some
stays silent for ever, as after a cable was pulled; connections made later are well.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

LARGEST_PIECE = 64 * 1024
#: Pieces on their way in one direction of a connection, before its sender has to wait.
MOST_PIECES = 64
#: With this, closing a socket sends a reset in place of a good-bye.
NO_LINGER = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Toxics:
    """What goes wrong in one direction."""

    latency: float = 0.0  # seconds by which everything is late
    slice_bytes: int = LARGEST_PIECE  # nothing larger is passed on at once
    bytes_per_second: float = 0.0  # 0: as fast as it goes
    black_hole: bool = False  # everything is taken, nothing passed on


WELL = Toxics()
BLACK_HOLE = Toxics(black_hole=True)


class FaultProxy:
    """`with FaultProxy(port) as proxy:` listens on `proxy.port` of loopback and passes everything on to `port`."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._to_server = self._to_client = WELL
        self._accepting: asyncio.Task[None] | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._served: set[asyncio.Task[None]] = set()
        #: Bytes that were swallowed so far, both ways.
        self.lost = 0
        self._thread.start()
        self.port = 0
        self.accept()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up on everybody, and end the thread. May be called twice."""
        if self._thread.is_alive():
            self.refuse()
            self._do(self._hang_up())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def disturb(self, *, to_server: Toxics = WELL, to_client: Toxics = WELL) -> None:
        """These toxics from now on and no others, for open connections and new ones."""
        self._to_server, self._to_client = to_server, to_client

    def heal(self) -> None:
        """Nothing goes wrong any more, except on connections that have lost data."""
        self.disturb()

    def reset(self) -> None:
        """Cut every open connection with a TCP reset, on both sides."""
        self._do(self._reset())

    def refuse(self) -> None:
        """Connections are refused from now on. Those that are open stay; one that was just being made may not."""
        self._do(self._refuse())

    def accept(self) -> None:
        """Take connections (again, at the same port)."""
        self._do(self._accept())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it in the proxy's thread, and wait for its end."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _accept(self) -> None:
        if self._accepting is None:
            listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
            listener.setblocking(False)
            self.port = int(listener.getsockname()[1])
            self._accepting = asyncio.create_task(self._take_all(listener))

    async def _refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
            self._accepting = None

    async def _take_all(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                task = asyncio.create_task(self._serve(client))
                self._served.add(task)
                task.add_done_callback(self._served.discard)

    async def _reset(self) -> None:
        for end in list(self._ends):
            _reset(end)

    async def _hang_up(self) -> None:
        served = list(self._served)
        for task in served:
            task.cancel()
        await asyncio.gather(*served, return_exceptions=True)

    async def _serve(self, accepted: socket.socket) -> None:
        """One connection, from its coming to the end of both directions."""
        questions, client = await asyncio.open_connection(sock=accepted)
        self._ends.add(client)
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            _reset(client)
            self._ends.discard(client)
            return
        self._ends.add(server)
        try:
            async with asyncio.TaskGroup() as both_ways:
                for source, target, toxics in (
                    (questions, server, lambda: self._to_server),
                    (answers, client, lambda: self._to_client),
                ):
                    # A queue in between, so that what is late does not make what follows later still.
                    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_PIECES)
                    both_ways.create_task(self._read(source, pieces, toxics))
                    both_ways.create_task(self._write(target, pieces, toxics))
        except* OSError:  # one side cut it off: so is the other
            _reset(client)
            _reset(server)
        finally:
            self._ends -= {client, server}
            client.close()
            server.close()

    async def _read(
        self, reader: asyncio.StreamReader, pieces: "asyncio.Queue[tuple[float, bytes]]", toxics: Callable[[], Toxics]
    ) -> None:
        lost_some = False
        while data := await reader.read(LARGEST_PIECE):
            lost_some = lost_some or toxics().black_hole
            if lost_some:
                self.lost += len(data)
            else:
                await pieces.put((self._loop.time() + toxics().latency, data))
        if lost_some or toxics().black_hole:
            await asyncio.Event().wait()  # the other side hears no good-bye either
        await pieces.put((0, b""))

    async def _write(
        self, writer: asyncio.StreamWriter, pieces: "asyncio.Queue[tuple[float, bytes]]", toxics: Callable[[], Toxics]
    ) -> None:
        while (piece := await pieces.get())[1]:
            due, data = piece
            await asyncio.sleep(due - self._loop.time())
            while data:
                now = toxics()
                part, data = data[: now.slice_bytes], data[now.slice_bytes :]
                writer.write(part)
                await writer.drain()
                if now.bytes_per_second:
                    await asyncio.sleep(len(part) / now.bytes_per_second)
                elif data:
                    await asyncio.sleep(0)  # or the pieces would be sent as one
        with contextlib.suppress(OSError):
            writer.write_eof()


def _reset(end: asyncio.StreamWriter) -> None:
    own = end.get_extra_info("socket")
    with contextlib.suppress(OSError):
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    end.transport.abort()
