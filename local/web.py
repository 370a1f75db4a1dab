"""Ask a server of this machine; without the proxies that the environment may name, which know nothing of loopback."""

import errno
import http.client
import json
import random
import socket
from dataclasses import dataclass
from typing import Any

LOOPBACK = "127.0.0.1"
#: Nobody else's sequence: processes that look for a port at once must not look at the same ones.
_ANY = random.Random()


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    content_type: str
    body: bytes

    def json(self) -> Any:
        """The body as JSON; ValueError when it is none."""
        return json.loads(self.body)


def ask(port: int, method: str, path: str, *, key: str = "", body: object = None, timeout: float = 5) -> Reply:
    """One request to 127.0.0.1. OSError or HTTPException when nobody answers."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    payload = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        payload = json.dumps(body).encode()
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout)
    try:
        connection.request(method, path, payload, headers)
        response = connection.getresponse()
        return Reply(response.status, response.getheader("Content-Type", ""), response.read())
    finally:
        connection.close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, nor gets by chance before a server has it.

    Systems give connections a port from 32768 upwards (Linux) or 49152 (macOS, RFC 6335), so that one of those may be
    taken in the moment between the question and the server's start.
    """
    while True:
        port = _ANY.randrange(10_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


def why_not(port: int) -> str | None:
    """Why a server can't have this port; None when it can."""
    with socket.socket() as probe:
        # As servers do it: connections of the last run that are still fading away are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error.strerror
    # macOS lets us have the port of somebody who listens on all addresses; then we would answer for each other.
    try:
        socket.create_connection((LOOPBACK, port), timeout=0.5).close()
    except OSError:
        return None
    return "somebody listens there"
