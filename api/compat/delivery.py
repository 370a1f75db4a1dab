"""Whether an answer reaches its client, as far as a server can know."""

import errno
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator

from api.connection import has_hung_up

#: For how long a client that takes its answer slowly, or not at all, is waited for.
PATIENCE = 60.0  # seconds

#: So little may be under way to a client that reads: what its kernel has not acknowledged yet.
UNDER_WAY = 4096  # bytes


class Delivery:
    """The body of an answer that is for one client alone.

    Its last byte is held back until the client has taken the rest, and `taken` is called just before that byte: so a
    client that has its answer can't ask for the next before this one counts as delivered, and one that is connected
    but reads no more does not get it counted. urllib3's Retry is such a one: it closes the connection that timed out
    only after its pause, right before it repeats the request. `lost` is called if `taken` turns out to be wrong.
    """

    def __init__(
        self, data: bytes, connection: socket.socket | None, taken: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        self._data = data
        self._connection = connection
        self._taken, self._lost = taken, lost
        self._is_open = False

    def __iter__(self) -> Iterator[bytes]:
        yield self._data[:-1]
        if not self._is_read():
            # What Gunicorn takes for the usual end of a client, without a word.
            raise BrokenPipeError(errno.EPIPE, "the client does not read its answer")
        self._taken()
        self._is_open = True
        yield self._data[-1:]
        self._is_open = False  # asked for more: the last byte was written

    def close(self) -> None:
        """The server is done with it, whatever came of it."""
        if self._is_open:
            self._lost()

    def _is_read(self) -> bool:
        deadline = time.monotonic() + PATIENCE
        while not has_hung_up(self._connection):
            if _under_way(self._connection) <= UNDER_WAY:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return False


def _under_way(connection: socket.socket | None) -> int:
    """How many bytes were written that the other side's kernel has not taken. 0 where that can't be told."""
    if connection is None:
        return 0
    try:
        answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(struct.calcsize("i")))
    except OSError:
        return 0
    return int(struct.unpack("i", answer)[0])
