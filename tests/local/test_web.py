"""Asking servers of this machine."""

import socket
from types import SimpleNamespace

import pytest

from local.web import LOOPBACK, free_port


def test_a_free_port_is_none_that_a_connection_gets_by_chance() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        for _ in range(20):
            with socket.create_connection(server.getsockname()) as client:
                given = client.getsockname()[1]
            assert free_port() < given


def test_a_port_that_somebody_has_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, free_port())) as server:
        taken, other = server.getsockname()[1], free_port()
        drawn = iter([taken, taken, other])
        monkeypatch.setattr("local.web._ANY", SimpleNamespace(randrange=lambda *_: next(drawn)))
        assert free_port() == other
