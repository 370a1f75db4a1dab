"""The fault proxy: each thing that it can do wrong, and that it stops doing so."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
import redis

from shared.database import AWAY, Database
from tests.fault_proxy import BLACK_HOLE, FaultProxy, Toxics
from tests.servers import PostgresServer, RedisServer
from tests.service import eventually


class Echo(BaseRequestHandler):
    """Sends back what comes, until the good-bye, and then says good-bye too."""

    def handle(self) -> None:
        with suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with FaultProxy(server.server_address[1]) as proxy:
                yield proxy
        finally:
            server.shutdown()
            thread.join()


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=60)


def echoed(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    back = b""
    while len(back) < len(data) and (piece := client.recv(65536)):
        back += piece
    return back


def test_it_passes_everything_on_both_ways_and_says_good_bye(proxy: FaultProxy) -> None:
    data = bytes(range(256)) * 4096
    with connect(proxy) as client:
        sending = threading.Thread(target=client.sendall, args=(data,))
        sending.start()
        back = client.recv(65536)
        while len(back) < len(data):
            back += client.recv(65536)
        sending.join()
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert back == data


def test_latency_makes_everything_late_but_not_slow(proxy: FaultProxy) -> None:
    proxy.disturb(to_client=Toxics(latency=0.3))
    with connect(proxy) as client:
        began = time.monotonic()
        assert echoed(client, b"x" * 1_000_000) == b"x" * 1_000_000
        assert time.monotonic() - began >= 0.3
        proxy.heal()
        assert echoed(client, b"y") == b"y"


def test_a_slicer_sends_small_pieces(proxy: FaultProxy) -> None:
    proxy.disturb(to_client=Toxics(slice_bytes=3, bytes_per_second=0.01))  # the second one would come in minutes
    with connect(proxy) as client:
        client.sendall(b"abcdefgh")
        assert client.recv(65536) == b"abc"
    proxy.disturb(to_client=Toxics(slice_bytes=3, bytes_per_second=300))
    with connect(proxy) as client:
        assert echoed(client, b"abcdefgh") == b"abcdefgh"


def test_a_bandwidth_is_kept(proxy: FaultProxy) -> None:
    proxy.disturb(to_server=Toxics(bytes_per_second=1000, slice_bytes=100))
    with connect(proxy) as client:
        began = time.monotonic()
        assert echoed(client, b"x" * 500) == b"x" * 500
        assert time.monotonic() - began >= 0.4


def test_a_black_hole_takes_everything_and_what_it_took_never_comes(proxy: FaultProxy) -> None:
    with connect(proxy) as before, connect(proxy) as idle:
        assert echoed(before, b"well") == echoed(idle, b"well") == b"well"
        proxy.disturb(to_server=BLACK_HOLE, to_client=BLACK_HOLE)
        with connect(proxy) as during:  # a connection is made, and silent
            for client in (before, during):
                client.sendall(b"lost")
                client.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    client.recv(1)
            eventually("both were swallowed", lambda: proxy.lost == 2 * len(b"lost"))  # not read after the healing
            proxy.heal()
            for client in (before, during):
                client.sendall(b"lost as well")
                with pytest.raises(TimeoutError):
                    client.recv(1)
        with connect(proxy) as after:
            assert echoed(after, b"well again") == b"well again"
        assert echoed(idle, b"nothing was lost") == b"nothing was lost"


def test_a_black_hole_in_one_direction(proxy: FaultProxy) -> None:
    with connect(proxy) as client:
        proxy.disturb(to_client=BLACK_HOLE)
        client.sendall(b"heard, and the answer is lost")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_reset_is_one_and_new_connections_are_well(proxy: FaultProxy) -> None:
    with connect(proxy) as client:
        assert echoed(client, b"well") == b"well"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connect(proxy) as client:
        assert echoed(client, b"well") == b"well"


def test_it_refuses_and_accepts_again_at_the_same_port(proxy: FaultProxy) -> None:
    port = proxy.port
    with connect(proxy) as open_one:
        assert echoed(open_one, b"well") == b"well"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        assert echoed(open_one, b"still here") == b"still here"
    proxy.accept()
    with connect(proxy) as client:
        assert echoed(client, b"well") == b"well" and proxy.port == port


def test_a_target_that_is_not_there_resets() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen: a port that nobody else gets meanwhile
        port = nobody.getsockname()[1]
        with FaultProxy(port) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as client:
            client.recv(1)


def test_close_hangs_up_and_ends_the_thread(proxy: FaultProxy) -> None:
    with connect(proxy) as client:
        assert echoed(client, b"well") == b"well"
        proxy.disturb(to_server=BLACK_HOLE)
        client.sendall(b"lost")
        proxy.close()
        proxy.close()
        assert client.recv(1) == b""
    assert not any(thread.name == "fault proxy" for thread in threading.enumerate())


@pytest.mark.slow
def test_redis_and_postgresql_are_reached_through_it(redis_server: RedisServer) -> None:
    with FaultProxy(redis_server.port) as proxy, redis.Redis(port=proxy.port) as client:
        assert client.ping()
    postgres = PostgresServer()
    try:
        postgres.start(tcp=True)
        with FaultProxy(postgres.port) as proxy:
            database = Database(postgres.tcp_url("postgres", proxy.port))
            with database.read() as connection:
                assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
            proxy.refuse()
            proxy.reset()
            with pytest.raises(AWAY), database.read():
                pass
            database.close()
    finally:
        postgres.close()
