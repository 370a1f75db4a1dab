"""A port at which connecting never ends: somebody listens and takes nobody in, and there is no room to wait."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil

#: More than the room in which the kernel lets callers wait who are not taken in.
FILLERS = 4


@contextmanager
def closed_door(port: int) -> Iterator[None]:
    """While the block runs, whoever calls this port of loopback hears nothing. Nobody else may listen there."""
    with ExitStack() as stack:
        stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=0))
        for _ in range(FILLERS):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield


def knocking(pid: int, port: int) -> int:
    """How many connections to this port a process and its children are trying to make."""
    process = psutil.Process(pid)
    found = 0
    for one in (process, *process.children(recursive=True)):
        with psutil.Process(one.pid).oneshot():
            found += sum(
                1
                for connection in one.net_connections("tcp")
                if connection.status == psutil.CONN_SYN_SENT and connection.raddr.port == port
            )
    return found
