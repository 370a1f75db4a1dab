"""Posting to URLs that others chose. What was really dialled is seen by an audit hook, not by the code under test."""

import gzip
import ipaddress
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.receiver import Handler, Receiver, drips, floods, hangs, resets, says
from worker import posting
from worker.addresses import Network
from worker.posting import Answer, NotDelivered, Poster, Trouble

LOOPBACK: list[Network] = [ipaddress.ip_network("127.0.0.1/32")]


class Dialled:
    """Every address that this process connects to, but for what threads of earlier tests still do."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.watching = False
        self.others: set[threading.Thread] = set()
        sys.addaudithook(self._see)  # for ever: it can't be taken away

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching or event != "socket.connect" or threading.current_thread() in self.others:
            return
        if isinstance(arguments[1], tuple):
            self.addresses.append(str(arguments[1][0]))


DIALLED = Dialled()


@pytest.fixture(autouse=True)
def dialled() -> Iterator[list[str]]:
    """Whatever a test does, nothing was dialled but the one address of loopback that is allowed."""
    DIALLED.addresses = []
    DIALLED.others = set(threading.enumerate()) - {threading.current_thread()}
    DIALLED.watching = True
    yield DIALLED.addresses
    DIALLED.watching = False
    assert set(DIALLED.addresses) <= {"127.0.0.1"}  # as it stands here: who judges addresses is not asked


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver(says(200, b"thanks"))
    yield receiver
    receiver.close()


@pytest.fixture
def poster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poster]:
    """Patient: nothing is cut off because this machine stood still."""
    monkeypatch.setattr(posting, "BODY_SECONDS", 60.0)
    poster = Poster(LOOPBACK, 4, seconds=60, connect_seconds=60)
    yield poster
    poster.close()


@pytest.fixture
def hasty() -> Iterator[Poster]:
    poster = Poster(LOOPBACK, 4, seconds=0.5)
    yield poster
    poster.close()


def resolve(monkeypatch: pytest.MonkeyPatch, answers: Callable[[], list[str]]) -> list[str]:
    """Names resolve to these addresses; returns the names that were asked for."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def fake(host: str, port: int, *rest: Any, **named: Any) -> Any:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if named.get("flags", 0) & socket.AI_NUMERICHOST:
                raise socket.gaierror(socket.EAI_NONAME, "a name") from None
            asked.append(host)
            return [entry for address in answers() for entry in real(address, port, 0, socket.SOCK_STREAM)]
        return real(host, port, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", fake)
    return asked


def trouble(poster: Poster, url: str) -> NotDelivered:
    with pytest.raises(NotDelivered) as raised:
        poster.post(url, b"{}", {})
    return raised.value


def test_a_post_arrives_whole_and_its_answer_comes_back(poster: Poster, receiver: Receiver) -> None:
    answer = poster.post(
        receiver.url + "/a?b=c", b'{"a": 1}', {"webhook-id": "evt_1", "Content-Type": "application/json"}
    )
    assert (answer.status, answer.start) == (200, b"thanks")
    [letter] = receiver.letters
    assert (letter.path, letter.body, letter.id) == ("/a?b=c", b'{"a": 1}', "evt_1")
    assert letter.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert letter.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.2",
        "10.0.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "0.0.0.0",  # noqa: S104
        "224.0.0.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.2]",
        "[::7f00:1]",
        "[::ffff:0:7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fc00::1]",
        "[fec0::1]",
        "[ff02::1]",
    ],
)
def test_no_forbidden_address_is_dialled_however_it_is_written(host: str, poster: Poster, dialled: list[str]) -> None:
    assert trouble(poster, f"http://{host}:9/").kind == Trouble.forbidden_address
    assert dialled == []


@pytest.mark.parametrize("url", ["http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://good\\@evil/"])
def test_a_url_that_could_be_read_in_two_ways_is_not_called(url: str, poster: Poster, dialled: list[str]) -> None:
    assert trouble(poster, url).kind == Trouble.bad_url
    assert dialled == []


def test_localhost_by_name_is_judged_by_its_addresses(poster: Poster, dialled: list[str]) -> None:
    closed = Poster([], 1, seconds=60, connect_seconds=60)
    assert trouble(closed, "http://localhost:9/").kind == Trouble.forbidden_address
    closed.close()
    assert dialled == []


@pytest.mark.parametrize("bad", ["169.254.169.254", "10.0.0.1", "::1", "::ffff:10.0.0.1"])
@pytest.mark.parametrize("first", [True, False])
def test_a_name_with_one_forbidden_address_is_not_called_at_all(
    bad: str, first: bool, poster: Poster, receiver: Receiver, dialled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, lambda: [bad, "127.0.0.1"] if first else ["127.0.0.1", bad])
    failure = trouble(poster, f"http://mixed.example:{receiver.port}/")
    assert failure.kind == Trouble.forbidden_address
    assert bad not in failure.message and "127.0.0.1" not in failure.message
    assert dialled == []


def test_a_name_that_resolves_differently_a_moment_later_leads_to_the_judged_address(
    poster: Poster, receiver: Receiver, dialled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([["127.0.0.1"], ["169.254.169.254"], ["169.254.169.254"]])
    asked = resolve(monkeypatch, lambda: next(answers))
    assert poster.post(f"http://rebound.example:{receiver.port}/", b"{}", {}).status == 200
    assert asked == ["rebound.example"]
    assert receiver.letters[0].headers["host"] == f"rebound.example:{receiver.port}"
    assert trouble(poster, f"http://rebound.example:{receiver.port}/").kind == Trouble.forbidden_address
    assert set(dialled) == {"127.0.0.1"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("to", ["http://169.254.169.254/latest", "/elsewhere", "file:///etc/passwd"])
def test_a_redirect_is_an_answer_and_never_followed(
    status: int, to: str, poster: Poster, receiver: Receiver, dialled: list[str]
) -> None:
    receiver.behaviour = says(status, b"over there", Location=to)
    assert poster.post(receiver.url, b"{}", {}).status == status
    assert len(receiver.letters) == len(dialled) == 1


def test_the_environment_lends_neither_proxies_nor_passwords(
    poster: Poster, receiver: Receiver, dialled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://10.9.8.7:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    assert poster.post(receiver.url, b"{}", {}).status == 200
    assert "authorization" not in receiver.letters[0].headers
    assert dialled == ["127.0.0.1"]


def test_no_cookie_and_no_connection_outlives_a_post(poster: Poster, receiver: Receiver, dialled: list[str]) -> None:
    receiver.behaviour = says(200, Set_Cookie="a=b")
    poster.post(receiver.url, b"{}", {})
    poster.post(receiver.url, b"{}", {})
    assert "cookie" not in receiver.letters[1].headers
    assert len(dialled) == 2


def continues(handler: Handler) -> None:
    while not handler.server.receiver.closed.wait(0.05):
        try:
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        except OSError:
            return


@pytest.mark.parametrize("behaviour", [hangs, drips, continues])
def test_who_does_not_answer_in_time_is_cut_off(behaviour: Any, hasty: Poster, receiver: Receiver) -> None:
    receiver.behaviour = behaviour
    assert trouble(hasty, receiver.url).kind == Trouble.timeout


def test_a_host_that_accepts_and_never_speaks_tls_is_cut_off(hasty: Poster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert trouble(hasty, f"https://127.0.0.1:{silent.getsockname()[1]}/").kind == Trouble.timeout


def test_a_resolver_that_never_answers_is_not_waited_for(hasty: Poster, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def never() -> list[str]:
        done.wait(60)
        return []

    resolve(monkeypatch, never)
    assert trouble(hasty, "http://slow.example/").kind in (Trouble.timeout, Trouble.unresolvable)
    done.set()


def test_an_answer_that_drips_its_body_has_said_what_counts(
    poster: Poster, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "BODY_SECONDS", 0.2)

    def drip(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 1000\r\n\r\n")
        hangs(handler)

    receiver.behaviour = drip
    assert poster.post(receiver.url, b"{}", {}).status == 202


def test_of_ten_gigabytes_no_more_than_the_start_is_read(
    poster: Poster, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real, me = socket.SocketIO.readinto, threading.get_ident()

    def counted(stream: socket.SocketIO, buffer: Any) -> int | None:
        count = real(stream, buffer)
        if threading.get_ident() == me:  # the receiver reads too
            read.append(count or 0)
        return count

    monkeypatch.setattr(socket.SocketIO, "readinto", counted)
    receiver.behaviour = floods
    assert poster.post(receiver.url, b"{}", {}).start == bytes(1024)
    assert sum(read) == 65_536


def test_a_compressed_answer_is_not_inflated(poster: Poster, receiver: Receiver) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    receiver.behaviour = says(200, bomb, Content_Encoding="gzip")
    assert poster.post(receiver.url, b"{}", {}).start == bomb[: posting.SHOWN]


def flood_of_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(5000)) + b"\r\n")


def nonsense(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9\r\n")


@pytest.mark.parametrize("behaviour", [resets, flood_of_headers, nonsense])
def test_what_is_no_http_answer_is_a_broken_connection(behaviour: Any, poster: Poster, receiver: Receiver) -> None:
    receiver.behaviour = behaviour
    assert trouble(poster, receiver.url).kind == Trouble.broken


def test_a_closed_port_and_an_unknown_name_say_so(poster: Poster, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # a port that is held, and that nobody listens at
        taken.bind(("127.0.0.1", 0))
        assert trouble(poster, f"http://127.0.0.1:{taken.getsockname()[1]}/").kind == Trouble.refused

    def unknown() -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    resolve(monkeypatch, unknown)
    assert trouble(poster, "http://nowhere.example/").kind == Trouble.unresolvable


def test_a_certificate_of_another_name_or_of_nobody_is_refused(poster: Poster, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=other.example", "-addext", "subjectAltName=DNS:other.example"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    try:
        subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not there")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        failure = trouble(poster, f"https://127.0.0.1:{server.getsockname()[1]}/")
        thread.join(60)
    assert failure.kind == Trouble.tls
    assert "self-signed" in failure.message


def test_posts_from_many_threads_get_each_its_own_answer(poster: Poster, receiver: Receiver) -> None:
    def echo(handler: Handler) -> None:
        handler.answer(200, handler.path.encode())

    receiver.behaviour = echo
    answers: dict[int, Answer] = {}

    def post(number: int) -> None:
        answers[number] = poster.post(f"{receiver.url}/{number}", b"{}", {})

    threads = [threading.Thread(target=post, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number: answer.start for number, answer in answers.items()} == {n: b"/%d" % n for n in range(40)}
