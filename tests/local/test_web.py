"""Asking servers of this machine."""

import socket

from local.web import LOOPBACK, free_port


def test_a_free_port_is_none_that_a_connection_gets_by_chance() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        for _ in range(20):
            with socket.create_connection(server.getsockname()) as client:
                given = client.getsockname()[1]
            assert free_port() < given


def test_a_port_that_somebody_has_is_not_free() -> None:
    with socket.create_server((LOOPBACK, free_port())) as server:
        taken = server.getsockname()[1]
        assert all(free_port() != taken for _ in range(100))
