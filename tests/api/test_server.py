"""How long a client may take to send its request, and that what is answered may take longer."""

import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from gunicorn.http.errors import ConfigurationProblem, InvalidResponseHeader  # type: ignore[import-untyped]

from api import server
from api.server import TimelyReader
from local.web import free_port
from tests.api.people import KEY
from tests.api.test_gunicorn import PATIENCE, gunicorn
from tests.service import eventually


@pytest.mark.parametrize(
    ("sent", "alive", "others", "requests"),
    [(2, True, 0, 3), (0, True, 0, 1), (2, False, 0, 1), (2, True, 1, 1)],
    ids=["more comes at once", "nothing comes", "it is to stop", "others wait for a thread"],
)
def test_the_next_request_of_a_client_who_asks_at_once_is_answered_by_the_same_thread(
    sent: int, alive: bool, others: int, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[bytes] = []

    def answer(_worker: object, connection: SimpleNamespace) -> bool:
        answered.append(connection.sock.recv(1, socket.MSG_DONTWAIT) if answered else b"")
        return True  # the connection may be used again

    monkeypatch.setattr("api.server.ThreadWorker.handle", answer)
    worker = object.__new__(server.Worker)
    worker.cfg, worker.alive = SimpleNamespace(is_ssl=False), alive
    client, ours = socket.socketpair()
    with client, ours, ThreadPoolExecutor(1) as worker.tpool:
        done = threading.Event()
        for _ in range(1 + others):
            worker.tpool.submit(done.wait)
        eventually("one of them is at work", lambda: worker.tpool._work_queue.qsize() == others)
        client.sendall(b"x" * sent)
        assert worker.handle(SimpleNamespace(parser="made before", sock=ours)) is True
        done.set()
    assert len(answered) == requests


@pytest.mark.parametrize(
    ("processes", "connections", "left_for"),
    [(2, 0, 0.0), (2, 5, 0.0005), (2, 600, 0.002), (1, 600, None)],
    ids=["it has none", "it has some", "it has many", "there is no other"],
)
def test_who_has_many_connections_leaves_the_next_one_to_the_others_for_a_moment(
    processes: int, connections: int, left_for: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[object] = []
    monkeypatch.setattr("api.server.ThreadWorker.accept", lambda _worker, listener: did.append(listener))
    monkeypatch.setattr("api.server.time", SimpleNamespace(sleep=lambda seconds: did.append(pytest.approx(seconds))))
    worker = object.__new__(server.Worker)
    worker.cfg, worker.nr_conns = SimpleNamespace(workers=processes), connections
    worker.accept("listener")
    assert did == [*([] if left_for is None else [left_for]), "listener"]


HEAD = b"POST /v1/jobs HTTP/1.1\r\nHost: darkroom\r\nAuthorization: Bearer %b\r\nContent-Type: application/json\r\n"
THREADS = 3
#: gunicorn waits for 2 s.
WAITS_LONG_FOR_THE_END = "import gunicorn.util\ngunicorn.util.close_graceful.__defaults__ = (3600.0, 65536)"


def test_whatever_is_sent_must_be_taken_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.server.ANSWER_SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    with server.TimelySocket(ours.family, ours.type, ours.proto, fileno=ours.detach()) as sends, theirs:
        assert sends.send(b"HTTP/1.1 100 Continue") == 21 and theirs.recv(100) == b"HTTP/1.1 100 Continue"
        for send in (sends.send, sends.sendall):
            with pytest.raises(ConnectionResetError):
                send(b"x" * 1_000_000)
            assert sends.gettimeout() is None
        sends.settimeout(0.02)  # whoever sends a stream has his own
        with pytest.raises(ConnectionResetError):
            sends.sendall(b"x" * 1_000_000)
        assert sends.gettimeout() == 0.02


@pytest.mark.parametrize("error", [InvalidResponseHeader("a secret"), ConfigurationProblem("b"), ValueError("c")])
def test_a_fault_of_ours_is_not_told_as_the_clients(error: Exception) -> None:
    worker = object.__new__(server.Worker)
    worker.log = logging.getLogger("gunicorn.error")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker.handle_error(None, ours, None, error)
        answer = theirs.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 500 ") and b'"code": "internal"' in answer and b"secret" not in answer


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, TimelyReader]]:
    """A client's end, and the one that reads from it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs, TimelyReader(ours)


def test_what_comes_in_time_is_read_and_the_socket_is_as_it_was(line: tuple[socket.socket, TimelyReader]) -> None:
    client, reader = line
    client.sendall(b"GET / ")
    reader.allow(PATIENCE)
    assert reader.read() == b"GET / " and reader.sock.gettimeout() is None, "answers have no limit"


def test_drips_do_not_prolong_it(line: tuple[socket.socket, TimelyReader]) -> None:
    client, reader = line
    done = threading.Event()

    def drip() -> None:
        while not done.wait(0.01):
            client.send(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        reader.allow(0.2)
        with pytest.raises(TimeoutError):
            reader.read(1_000_000)
    finally:
        done.set()
        dripping.join()
    assert reader.sock.gettimeout() is None


def test_who_sends_much_has_longer(line: tuple[socket.socket, TimelyReader], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SLOWEST", 1)
    client, reader = line
    reader.allow(0.1)
    client.sendall(b"x" * 600)
    assert len(reader.read(600)) == 600
    sending = threading.Timer(0.3, client.sendall, [b"y"])
    sending.start()
    assert reader.read(1) == b"y"
    sending.join()


def test_a_shorter_limit_of_somebody_else_is_kept(line: tuple[socket.socket, TimelyReader]) -> None:
    _, reader = line
    reader.allow(3600)
    reader.sock.settimeout(0.01)
    with pytest.raises(TimeoutError):
        reader.read()
    assert reader.sock.gettimeout() == 0.01


@pytest.fixture
def port(sqlite_url: str, redis_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """One process of three threads, that has less patience than usual."""
    hurried = tmp_path / "hurried.conf.py"
    hurried.write_text(
        f"exec(open({str(Path('api/gunicorn.conf.py').absolute())!r}).read())\n"
        "import api.server\n"
        "api.server.HEAD_SECONDS, api.server.BODY_SECONDS, api.server.ANSWER_SECONDS = 1.0, 1.0, 1.0\n"
        "api.server.SLOWEST = 10_000_000\n"
        "keepalive = 3600\n"  # who comes back for more may take his time
        f"{getattr(request, 'param', '')}\n"
    )
    port = free_port()
    options = ("-c", str(hurried), "--workers", "1", "--threads", str(THREADS), "--graceful-timeout", "3600")
    with gunicorn(
        port,
        *options,
        DARKROOM_DATABASE_URL=sqlite_url,
        DARKROOM_REDIS_URL=redis_url,
        DARKROOM_API_KEY=KEY,
        DARKROOM_SECRET_KEY="s" * 32,
    ) as process:
        eventually("it answers", lambda: process.poll() is not None or _answers(port), 60)
        yield port
        # However many are still sending: the grace is an hour, and none of them has that long.
        half_sent = [] if hasattr(request, "param") else [_begin(port, HEAD[:40]) for _ in range(THREADS)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in process.communicate()[1]
        for client in half_sent:
            client.close()


def _answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE).ok
    except requests.ConnectionError:  # it listens before it answers
        return False


def _begin(port: int, sent: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    client.sendall(sent)
    return client


def _rest(client: socket.socket) -> bytes:
    """All that is still sent to it, until the other end closes."""
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.slow
def test_half_sent_heads_in_every_thread_are_cut_off_and_the_others_are_answered(port: int) -> None:
    half_sent = [_begin(port, HEAD[:40]) for _ in range(2 * THREADS)]
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE).status_code == 200
    assert [_rest(client) for client in half_sent] == [b""] * 2 * THREADS


@pytest.mark.slow
@pytest.mark.parametrize(
    "begun", [b"Content-Length: 50\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n9\r\n{"], ids=["length", "chunks"]
)
def test_a_half_sent_body_is_answered_and_cut_off(port: int, begun: bytes) -> None:
    answer = _rest(_begin(port, HEAD % KEY.encode() + begun))
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code": "too_slow"' in answer


@pytest.mark.slow
@pytest.mark.parametrize("more", [b"", b"Expect: 100-continue\r\n"], ids=["answers", "and 100 Continue"])
def test_unread_answers_in_every_thread_are_cut_off_and_the_others_are_answered(port: int, more: bytes) -> None:
    asked = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: darkroom\r\n" + more + b"\r\n"
    with ExitStack() as stack:
        for _ in range(THREADS):
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", port))
            deaf.sendall(10 * asked)  # 15 MB of answers: more than the system takes for who does not read
            assert deaf.recv(1) == b"H"

        def all_are_hung_up_on() -> bool:
            theirs = [each for each in psutil.net_connections("tcp4") if each.laddr[1:] == (port,)]
            return psutil.CONN_ESTABLISHED not in {each.status for each in theirs}

        eventually("all are hung up on", all_are_hung_up_on, 60)
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("port", [WAITS_LONG_FOR_THE_END], indirect=True, ids=[""])
def test_who_does_not_hang_up_holds_up_one_thread_and_not_the_one_that_watches_all(port: int) -> None:
    with _begin(port, b"GET /healthz HTTP/1.1\r\nHost: darkroom\r\nConnection: close\r\n\r\n") as lingering:
        assert b"".join(iter(lambda: lingering.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE).status_code == 200


@pytest.mark.slow
def test_who_waits_for_a_job_and_who_comes_back_for_more_is_not_cut_off(port: int) -> None:
    # Each request in one piece: between two, this process may stand still for longer than it may take to come.
    asked = HEAD % KEY.encode() + b'Prefer: wait=3\r\nContent-Length: 30\r\n\r\n{"input": {"prompt": "a cat"}}'
    began = time.monotonic()
    with _begin(port, asked) as client:
        answer = HTTPResponse(client)
        answer.begin()
        answer.read()
        assert answer.status == 202 and time.monotonic() - began > 2, "longer than a request may take to come"
        path = urlsplit(answer.headers["Location"]).path.encode()
        client.sendall(b"GET %b HTTP/1.1\r\nHost: darkroom\r\nAuthorization: Bearer %b\r\n\r\n" % (path, KEY.encode()))
        answer = HTTPResponse(client)
        answer.begin()
        assert answer.status == 200
