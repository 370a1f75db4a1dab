"""The connection that a request came over, where the server tells: Gunicorn does. It is only looked at."""

import socket

from flask import request


def connection_of_request() -> socket.socket | None:
    # Gunicorn's threads block while they serve, so nobody else reads from it meanwhile.
    connection: socket.socket | None = request.environ.get("gunicorn.socket")
    return connection


def has_hung_up(connection: socket.socket | None) -> bool:
    """Whether the client has closed it. False where that can't be told."""
    if connection is None:
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ValueError:  # TLS knows no flags
        return False
    except OSError:
        return True
