"""The hosted backend against a vendor on loopback that says, byte for byte, what each test wrote down."""

import base64
import gzip
import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from local.web import free_port
from shared.catalogue import DEFAULT_MODEL
from shared.inspector import Inspector, InspectorAway
from shared.logs import TextFormatter
from shared.picture import Facts
from tests.kept import Kept
from tests.shared.pictures import jpeg_of_size, whole
from tests.worker.stub_vendor import Script, StubVendor, answer, saying, saying_and_closing
from worker import deadline
from worker.backends import dataoorts
from worker.backends.base import Backend, Billed, Failure, Kind, Picture, Read, Request, Unjudged
from worker.backends.dataoorts import LONGEST_ANSWER, Dataoorts
from worker.deadline import Call, Watchdog, WatchedSession

KEY = "dk-canary/4+f9Q=&x7Z1mP0aB"
PNG = whole("PNG", 512, 512)
INPUT: dict[str, Any] = {
    "prompt": "a lighthouse at dusk",
    "negative_prompt": None,
    "width": 512,
    "height": 512,
    "num_steps": 20,
    "guidance": 7.5,
    "seed": 7,
}
REQUEST = Request("job_1", DEFAULT_MODEL, INPUT)


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    inspector = Inspector()
    inspector.load()
    yield inspector
    inspector.close()


Connect = Callable[..., Dataoorts]


@pytest.fixture
def connect(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Backends that share one inspector, and leave it open."""
    monkeypatch.setattr(inspector, "close", lambda: None)
    monkeypatch.setattr(deadline, "IDLE_SECONDS", 600.0)  # so that no machine is too slow to use a connection again
    made: list[Dataoorts] = []

    def make(url: str, deadline_seconds: float = 20, **options: Any) -> Dataoorts:
        options = {"inspector": inspector} | options
        made.append(Dataoorts(url, KEY, deadline_seconds=deadline_seconds, **options))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def ask(backend: Backend, request: Request = REQUEST) -> Picture | Failure:
    (outcome,) = backend.generate([request], lambda *_: None, lambda _: False)
    return outcome


def picture(outcome: Picture | Failure) -> Picture:
    assert isinstance(outcome, Picture), outcome
    return outcome


def failure(outcome: Picture | Failure) -> tuple[Kind, Billed]:
    assert isinstance(outcome, Failure), outcome
    return outcome.kind, outcome.billed


def body_of(request: bytes) -> Any:
    return json.loads(request.partition(b"\r\n\r\n")[2])


# What is sent.


def test_a_picture_is_asked_for_in_the_vendors_words_with_the_key(connect: Connect) -> None:
    with StubVendor(saying(answer(200, PNG))) as vendor:
        picture(ask(connect(vendor.url)))
    head, _, body = vendor.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /api/v1 HTTP/1.1"
    assert f"Authorization: Bearer {KEY}".encode() in lines
    assert b"Content-Type: application/json" in lines
    data = {name: value for name, value in INPUT.items() if name != "negative_prompt"}
    assert json.loads(body) == {"model": DEFAULT_MODEL, "data": data}


def test_parameters_take_the_vendors_names(connect: Connect) -> None:
    given = {"prompt": "a cat", "num_steps": 4, "seed": 1}
    with StubVendor(saying(answer(200, whole("JPEG", 1024, 1024)))) as vendor:
        made = picture(ask(connect(vendor.url), Request("job_1", "black-forest-labs/flux-1-schnell", given)))
    assert body_of(vendor.requests[0])["data"] == {"prompt": "a cat", "steps": 4, "seed": 1}
    assert (made.content_type, made.width, made.warnings) == ("image/jpeg", 1024, ())


def test_width_and_height_are_sent_even_if_the_job_does_not_name_them(connect: Connect) -> None:
    with StubVendor(saying(answer(200, PNG))) as vendor:
        picture(ask(connect(vendor.url), Request("job_1", DEFAULT_MODEL, {"prompt": "a cat", "negative_prompt": ""})))
    data = body_of(vendor.requests[0])["data"]
    assert (data["width"], data["height"]) == (512, 512)
    assert "negative_prompt" not in data and "seed" not in data


@pytest.mark.parametrize(
    "request_", [Request("job_1", "no/such-model", INPUT), Request("job_1", DEFAULT_MODEL, {**INPUT, "strength": 1})]
)
def test_what_the_catalogue_does_not_have_is_refused_without_asking(request_: Request, connect: Connect) -> None:
    with StubVendor(saying(answer(200, PNG))) as vendor:
        outcome = ask(connect(vendor.url), request_)
    assert failure(outcome) == (Kind.rejected, Billed.no) and vendor.requests == []
    assert isinstance(outcome, Failure) and not outcome.asked, "and the breaker learns nothing from it"


def test_netrc_does_not_replace_the_key(connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("default login mallory password mallory\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with StubVendor(saying(answer(200, PNG))) as vendor:
        backend = connect(vendor.url)
        backend._session.trust_env = True  # as for a vendor that is not on loopback
        picture(ask(backend))
    assert KEY.encode() in vendor.requests[0]


def test_a_proxy_of_the_environment_serves_the_real_vendor_and_never_loopback(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubVendor(saying(answer(200, PNG))) as proxy, StubVendor(saying(answer(200, PNG))) as vendor:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/api/v1"))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        picture(ask(connect(vendor.url)))
        assert (len(vendor.requests), len(proxy.requests)) == (1, 0)
        picture(ask(connect("http://vendor.invalid/api/v1")))
    assert proxy.requests[0].startswith(b"POST http://vendor.invalid/api/v1 ")


def test_cookies_are_not_kept(connect: Connect) -> None:
    with StubVendor(saying(answer(200, PNG, "Set-Cookie: a=b; Path=/"))) as vendor:
        backend = connect(vendor.url)
        ask(backend)
        ask(backend)
    assert len(vendor.requests) == 2
    assert b"cookie:" not in vendor.requests[1].lower()


# What comes back.


def test_a_picture_is_kept_as_received_with_its_true_type_size_and_hash(connect: Connect) -> None:
    jpeg = whole("JPEG", 512, 512)
    with StubVendor(saying(answer(200, jpeg, "Content-Type: image/png"))) as vendor:
        made = picture(ask(connect(vendor.url)))
    assert made == Picture.of(jpeg, "image/jpeg", 512, 512) and made.read() == jpeg
    assert made.sha256 == hashlib.sha256(jpeg).hexdigest()


def test_a_picture_of_another_size_is_kept_with_a_warning(connect: Connect) -> None:
    with StubVendor(saying(answer(200, whole("PNG", 1024, 768)))) as vendor:
        made = picture(ask(connect(vendor.url)))
    assert (made.width, made.height) == (1024, 768)
    assert [warning.code for warning in made.warnings] == ["size_differs"]
    assert "512x512" in made.warnings[0].message and "1024x768" in made.warnings[0].message


def chunked(body: bytes, *headers: str) -> bytes:
    head = "\r\n".join(["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", *headers, "", ""]).encode()
    parts = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])


def gzipped(body: bytes) -> bytes:
    return answer(200, gzip.compress(body), "Content-Encoding: gzip")


WAYS_TO_SEND = {
    "chunked": saying(chunked(PNG)),
    "compressed, though asked not to": saying(gzipped(PNG)),
    "without a length, until the end": saying_and_closing(b"HTTP/1.0 200 OK\r\n\r\n" + PNG),
    "after some 100 Continue": saying(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + answer(200, PNG)),
    "in many small parts": saying(
        *(content[i : i + 99] for content in [answer(200, PNG)] for i in range(0, len(content), 99))
    ),
}


@pytest.mark.parametrize("script", WAYS_TO_SEND.values(), ids=WAYS_TO_SEND.keys())
def test_a_picture_arrives_in_every_way_that_http_knows(script: Script, connect: Connect) -> None:
    with StubVendor(script) as vendor:
        assert picture(ask(connect(vendor.url))).read() == PNG


BOMB = gzip.compress(b"\x89PNG\r\n\x1a\n" + b"\0" * (LONGEST_ANSWER * 8))

DELIVERED_AND_NO_PICTURE = {
    "cut short by the vendor": answer(200, PNG[:-500]),
    "cut JPEG": answer(200, whole("JPEG", 512, 512)[:-500]),
    "GIF": answer(200, whole("GIF", 64, 64), "Content-Type: image/gif"),
    "huge size in the header": answer(200, jpeg_of_size(60_000, 60_000)),
    "base64 of HTML": answer(200, json.dumps({"result": {"image": "PGh0bWw+"}}).encode()),
    "gzip bomb": answer(200, BOMB, "Content-Encoding: gzip"),
    "gzip bomb, chunked": chunked(BOMB, "Content-Encoding: gzip"),
    "gzip in gzip": answer(200, gzip.compress(BOMB), "Content-Encoding: gzip, gzip"),
    "broken gzip": answer(200, b"\x1f\x8b\x08\x00garbage" * 10, "Content-Encoding: gzip"),
    "too long": answer(200, PNG + b"\0" * LONGEST_ANSWER),
}


@pytest.mark.parametrize("content", DELIVERED_AND_NO_PICTURE.values(), ids=DELIVERED_AND_NO_PICTURE.keys())
def test_what_was_delivered_and_is_no_whole_picture_is_bad_output_and_billed(content: bytes, connect: Connect) -> None:
    before = psutil.Process().memory_info().rss
    with StubVendor(saying(content)) as vendor:
        assert failure(ask(connect(vendor.url))) == (Kind.bad_output, Billed.yes)
    assert psutil.Process().memory_info().rss - before < 200_000_000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed_nor_its_body_read_to_the_end(
    status: int, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off, real = list[Call](), Call.cut_off

    def note(call: Call) -> None:
        cut_off.append(call)
        real(call)

    monkeypatch.setattr(Call, "cut_off", note)
    with StubVendor(saying(answer(200, PNG))) as elsewhere:
        content = answer(status, b"x" * 300_000, f"Location: {elsewhere.url}", length=10**12)
        with StubVendor(saying(content)) as vendor:
            assert failure(ask(connect(vendor.url, deadline_seconds=60))) == (Kind.auth_failed, Billed.no)
    assert cut_off == [], "who reads on for the rest of its body does so until the deadline"
    assert elsewhere.connections == 0
    assert len(vendor.requests) == 1


def test_an_error_whose_text_breaks_off_is_told_by_its_status(connect: Connect) -> None:
    with StubVendor(saying_and_closing(answer(429, b"slow", "Retry-After: 7", length=900))) as vendor:
        outcome = ask(connect(vendor.url))
    assert failure(outcome) == (Kind.rate_limited, Billed.no)
    assert isinstance(outcome, Failure) and outcome.retry_after == 7


def test_an_endless_error_text_is_not_read_to_its_end(connect: Connect) -> None:
    with StubVendor(saying(answer(500, b"x" * 300_000, length=10**12))) as vendor:
        assert failure(ask(connect(vendor.url))) == (Kind.transient, Billed.no)


# When nothing comes back.


def test_a_refused_connection_was_not_accepted(connect: Connect) -> None:
    assert failure(ask(connect(f"http://127.0.0.1:{free_port()}/"))) == (Kind.not_accepted, Billed.no)


@pytest.mark.parametrize(
    "url",
    ["http://vendor.invalid/", "https://vendor.invalid/", "http://[::1]:1/", "http://" + "x" * 70 + ".com/"],
)
def test_a_name_or_address_that_leads_nowhere_was_not_accepted(url: str, connect: Connect) -> None:
    assert failure(ask(connect(url, connect_seconds=2))) == (Kind.not_accepted, Billed.no)


def test_a_resolver_that_does_not_answer_is_left_waiting(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo
    over, answered = threading.Event(), threading.Event()

    def silent(host: Any, *rest: Any, **options: Any) -> Any:
        if options:  # a literal address is asked for with flags, and needs no resolver
            return resolve(host, *rest, **options)
        over.wait(60)
        answered.set()
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    assert failure(ask(connect("http://vendor.test/", connect_seconds=0.3))) == (Kind.not_accepted, Billed.no)
    assert not answered.is_set()
    over.set()


def test_a_server_that_does_not_speak_tls_was_not_accepted(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def speak_plainly() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer(400, b"this is plain HTTP"))

        pool.submit(speak_plainly)
        url = f"https://localhost:{server.getsockname()[1]}/"
        assert failure(ask(connect(url))) == (Kind.not_accepted, Billed.no)


def reset(connection: socket.socket, _: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


BROKEN_OFF = {
    "closed without an answer": saying_and_closing(b""),
    "reset without an answer": reset,
    "half a status line": saying_and_closing(b"HTTP/1.1 20"),
    "half the body": saying_and_closing(answer(200, PNG[:5000], length=len(PNG))),
    "half the chunks": saying_and_closing(chunked(PNG)[:9000]),
    "not HTTP": saying_and_closing(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a header of a million characters": saying_and_closing(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000),
    "a thousand headers": saying_and_closing(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n"),
    "a chunk size that is none": saying_and_closing(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
}


@pytest.mark.parametrize("script", BROKEN_OFF.values(), ids=BROKEN_OFF.keys())
def test_after_the_request_was_sent_a_break_leaves_the_bill_unknown(script: Script, connect: Connect) -> None:
    with StubVendor(script) as vendor:
        assert failure(ask(connect(vendor.url))) == (Kind.transient, Billed.unknown)
    assert len(vendor.requests) == 1  # nobody asked twice behind our back


def test_an_answer_that_ends_in_its_headers_is_an_empty_one(connect: Connect) -> None:
    with StubVendor(saying_and_closing(b"HTTP/1.1 200 OK\r\nContent-Type: ima")) as vendor:
        assert failure(ask(connect(vendor.url))) == (Kind.bad_output, Billed.unknown)


# The deadline.


def silent(connection: socket.socket, _: bytes) -> None:
    connection.recv(1)


def dripping(start: bytes, drop: bytes, pause: float = 0.02) -> Script:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(drop)
            if pause:
                time.sleep(pause)

    return script


NEVER_DONE = {
    "accepts and is silent": silent,
    "drips the status line": dripping(b"", b"H"),
    "drips headers": dripping(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
    "drips one endless header": dripping(b"HTTP/1.1 200 OK\r\nX-A: ", b"b"),
    "drips the body": dripping(answer(200, PNG[:100], length=len(PNG)), b"\0"),
    "drips a body without length": dripping(b"HTTP/1.0 200 OK\r\n\r\n" + PNG, b"\0"),
    "drips chunks": dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n\0\r\n"),
    "drips a chunk's size": dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "100 Continue for ever": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a flood of 100 Continue": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, pause=0),
}


@pytest.mark.parametrize("script", NEVER_DONE.values(), ids=NEVER_DONE.keys())
def test_whoever_is_never_done_is_cut_off_at_the_deadline(script: Script, connect: Connect) -> None:
    started = time.monotonic()
    with StubVendor(script) as vendor:
        outcome = ask(connect(vendor.url, deadline_seconds=0.25))
        assert time.monotonic() - started > 0.2
    assert failure(outcome) == (Kind.transient, Billed.unknown)


def test_a_kept_alive_connection_is_cut_off_too(connect: Connect) -> None:
    with StubVendor(saying(answer(200, PNG))) as vendor:
        backend = connect(vendor.url)
        picture(ask(backend))
        backend._deadline_seconds = 0.25
        vendor.script = dripping(answer(200, PNG[:100], length=len(PNG)), b"\0")
        assert failure(ask(backend)) == (Kind.transient, Billed.unknown)
    assert vendor.connections == 1


def test_a_call_past_its_deadline_leaves_alone_a_connection_that_it_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "IDLE_SECONDS", 600.0)
    watchdog, session = Watchdog(), WatchedSession(4)
    with StubVendor(saying(answer(200, PNG))) as vendor, watchdog.call(60) as first, ThreadPoolExecutor(1) as pool:
        assert session.post(vendor.url, data=b"{}").content == PNG

        def slowly(connection: socket.socket, _: bytes) -> None:
            watchdog.hurry(first, 0)
            while not first.expired:
                time.sleep(0.01)
            time.sleep(0.1)
            connection.sendall(answer(200, PNG))

        def second() -> bytes:
            with watchdog.call(60):
                return session.post(vendor.url, data=b"{}").content

        vendor.script = slowly
        assert pool.submit(second).result(60) == PNG
        assert vendor.connections == 1
    session.close()
    watchdog.close()


def test_a_vendor_that_never_accepts_is_cut_off(connect: Connect) -> None:
    with socket.socket() as full, ThreadPoolExecutor(1) as pool:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        crowd = [socket.socket() for _ in range(4)]
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        backend = connect(f"http://127.0.0.1:{full.getsockname()[1]}/", connect_seconds=0.5)
        outcome = pool.submit(ask, backend).result(60)  # the kernel alone would try for two minutes
        assert failure(outcome) == (Kind.not_accepted, Billed.no)
        for one in crowd:
            one.close()


def test_a_tls_handshake_that_drips_is_cut_off_before_anything_was_sent(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                try:
                    connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")  # the start of a long ServerHello
                    while True:
                        connection.sendall(b"\0")
                        time.sleep(0.02)
                except OSError:
                    return

        pool.submit(drip)
        url = f"https://localhost:{server.getsockname()[1]}/"
        assert failure(ask(connect(url, deadline_seconds=0.5))) == (Kind.not_accepted, Billed.no)
        server.shutdown(socket.SHUT_RDWR)  # ends the waiting for somebody whose time was over before he came


def test_a_name_with_one_dead_address_is_reached_by_the_other(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubVendor(saying(answer(200, PNG))) as vendor:
        monkeypatch.setattr(deadline, "_resolve", lambda *_: ["::1", "127.0.0.1"])
        picture(ask(connect(vendor.url.replace("127.0.0.1", "localhost"))))


# Connections.


def test_a_busy_connection_is_reused(connect: Connect) -> None:
    with StubVendor(saying(answer(200, PNG))) as vendor:
        backend = connect(vendor.url)
        for _ in range(3):
            picture(ask(backend))
    assert (vendor.connections, len(vendor.requests)) == (1, 3)


def test_an_idle_connection_is_not_used_again(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "IDLE_SECONDS", 0.0)
    with StubVendor(saying(answer(200, PNG))) as vendor:
        backend = connect(vendor.url)
        picture(ask(backend))
        picture(ask(backend))
    assert vendor.connections == 2


def test_a_connection_that_was_closed_after_the_last_answer_is_replaced(connect: Connect) -> None:
    closed = threading.Event()

    def script(connection: socket.socket, request: bytes) -> None:
        saying_and_closing(answer(200, PNG))(connection, request)
        closed.set()

    with StubVendor(script) as vendor:
        backend = connect(vendor.url)
        picture(ask(backend))
        assert closed.wait(60)
        picture(ask(backend))
    assert vendor.connections == 2


def test_a_reused_connection_that_breaks_leaves_the_bill_unknown_and_is_not_tried_again(connect: Connect) -> None:
    with StubVendor(saying(answer(200, PNG))) as vendor:
        backend = connect(vendor.url)
        picture(ask(backend))
        vendor.script = reset
        assert failure(ask(backend)) == (Kind.transient, Billed.unknown)
    assert len(vendor.requests) == 2


def test_no_descriptor_is_left_behind(connect: Connect) -> None:
    scripts = [saying(answer(200, PNG)), saying(answer(500)), saying_and_closing(answer(200, b"<html>")), reset, silent]
    before = psutil.Process().num_fds()
    with StubVendor(scripts[0]) as vendor:
        backend = connect(vendor.url, deadline_seconds=0.2)
        for script in scripts * 2:
            vendor.script = script
            ask(backend)
        backend.close()
    assert psutil.Process().num_fds() <= before


def test_200_threads_ask_at_once_and_each_gets_its_own_picture(connect: Connect) -> None:
    all_here = threading.Barrier(200)

    def draw(connection: socket.socket, request: bytes) -> None:
        seed = body_of(request)["data"]["seed"]
        all_here.wait(60)  # nobody gets a picture before 200 have asked for one
        connection.sendall(answer(200, whole("PNG", 16 + seed, 8)))

    with StubVendor(draw) as vendor, ThreadPoolExecutor(200) as pool:
        backend = connect(vendor.url, deadline_seconds=60, slots=200)
        requests = [Request(f"job_{seed}", DEFAULT_MODEL, {**INPUT, "seed": seed}) for seed in range(400)]
        outcomes = list(pool.map(lambda request: ask(backend, request), requests))
    assert [picture(outcome).width for outcome in outcomes] == [16 + seed for seed in range(400)]
    assert vendor.connections <= 200


# The key.


def echo(connection: socket.socket, request: bytes) -> None:
    """An error page that shows the request, as some do."""
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    body = {
        "errors": [{"code": 5006, "message": f"Bad input: {' '.join(sorted(lines))} {'x' * 200} {KEY} {KEY.upper()}"}]
    }
    connection.sendall(answer(400, json.dumps(body).encode()))


def echo_in_header(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nnonsense " + KEY.encode() + b"\r\nX " + KEY.encode() + b"\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    "script", [echo, echo_in_header, saying_and_closing(KEY.encode() + b" 200\r\n"), silent, reset]
)
def test_the_key_appears_in_no_message_log_repr_or_traceback(
    script: Script, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with StubVendor(script) as vendor:
        backend = connect(vendor.url, deadline_seconds=0.5)
        outcome = ask(backend)
    assert isinstance(outcome, Failure)
    assert [outcome.__traceback__, outcome.__cause__, outcome.__context__] == [None] * 3
    shown = [outcome.message, repr(outcome), str(outcome), repr(backend), repr(vars(backend)), caplog.text]
    shown += traceback.format_exception(outcome)
    assert not [text for text in shown if "canary" in text.lower()]


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII") as refusal:
        Dataoorts("http://127.0.0.1/", key)
    assert not key.strip() or key not in str(refusal.value)


def test_the_prompt_neither_appears_in_messages_and_logs_nor_decides_what_an_error_means(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "Invalid API key: quota exceeded (nsfw)"
    body = json.dumps({"error": f"could not draw '{prompt}'"}).encode()
    with StubVendor(saying(answer(200, body))) as vendor:
        outcome = ask(connect(vendor.url), Request("job_1", DEFAULT_MODEL, {**INPUT, "prompt": prompt}))
    assert failure(outcome) == (Kind.bad_output, Billed.no)
    assert "quota" not in caplog.text + str(outcome)


def test_a_part_of_the_prompt_that_the_vendor_repeats_does_not_pass_for_a_wrong_key(connect: Connect) -> None:
    body = json.dumps({"error": "Unsupported prompt: 'an invalid api key on a bl...'"}).encode()
    with StubVendor(saying(answer(400, body))) as vendor:
        request = Request("job_1", DEFAULT_MODEL, {**INPUT, "prompt": "an invalid api key on a blackboard"})
        assert failure(ask(connect(vendor.url), request)) == (Kind.rejected, Billed.no)


# The contract.


def test_a_fault_of_ours_is_an_outcome_too_and_its_log_does_not_show_the_key(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError(f"a bug with {KEY}")

    monkeypatch.setattr("worker.backends.dataoorts.judge_answer", broken)
    with StubVendor(saying(answer(200, PNG))) as vendor:
        assert failure(ask(connect(vendor.url))) == (Kind.internal, Billed.unknown)
    lines = [TextFormatter("worker").format(record) for record in caplog.records]
    assert "RuntimeError" in "".join(lines) and "judge_answer" in "".join(lines) and KEY not in "".join(lines)


def as_json(data: bytes) -> bytes:
    return json.dumps({"result": {"image": base64.b64encode(data).decode()}, "success": True}).encode()


@pytest.mark.parametrize(
    ("body", "received"), [(PNG, PNG), (as_json(PNG), PNG), (PNG[:-9], PNG[:-9])], ids=["raw", "JSON", "cut short"]
)
def test_what_was_received_is_handed_over_before_it_is_judged(
    connect: Connect, inspector: Inspector, monkeypatch: pytest.MonkeyPatch, body: bytes, received: bytes
) -> None:
    order: list[tuple[str, bytes]] = []
    inspect = inspector.inspect_in_turn

    def judge(read: Read) -> Facts:
        order.append(("judged", read()))
        return inspect(read)

    def keep(data: bytes) -> Read:
        order.append(("received", data))
        return lambda: data

    monkeypatch.setattr(inspector, "inspect_in_turn", judge)
    request = replace(REQUEST, received=keep)
    with StubVendor(saying(answer(200, body))) as vendor:
        ask(connect(vendor.url), request)
    assert order == [("received", received), ("judged", received)]


def bytes_in_hand() -> list[int]:
    """How many bytes the functions of the worker hold that lead to here, if they are enough for a picture."""
    frame, found = sys._getframe(), []
    while (outer := frame.f_back) is not None:
        frame = outer
        if frame.f_globals["__name__"].startswith("worker."):
            held = [value for value in frame.f_locals.values() if isinstance(value, bytes | bytearray | memoryview)]
            found += [len(value) for value in held if len(value) > 1000]
    return found


def test_from_its_arrival_on_a_picture_is_read_from_where_it_is_safe_and_takes_no_memory_while_it_waits(
    connect: Connect, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect, held = inspector.inspect_in_turn, []
    safe = whole("JPEG", 512, 512)  # another one, so that it is told from what came

    def judge(read: Read) -> Facts:
        held.append(bytes_in_hand())
        return inspect(read)

    monkeypatch.setattr(inspector, "inspect_in_turn", judge)
    with StubVendor(saying(answer(200, PNG))) as vendor:
        made = picture(ask(connect(vendor.url), replace(REQUEST, received=lambda data: lambda: safe)))
    assert held == [[]]
    assert made.read() is safe and made == Picture.of(safe, "image/jpeg", 512, 512)


def test_a_picture_that_comes_slowly_keeps_the_others_from_us_for_a_moment_only(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataoorts, "RECEIVED_AT_ONCE", 1)
    monkeypatch.setattr(dataoorts, "PATIENCE_SECONDS", 0.05)
    with StubVendor(saying(answer(200, PNG))) as vendor:
        backend = connect(vendor.url)
        assert isinstance(backend, Dataoorts)
        with backend._room.place(60):  # the one place is taken
            assert picture(ask(backend)).read() == PNG


@pytest.mark.parametrize(
    "said", [answer(503, b"busy"), answer(200, b"<html>"), answer(200, b'{"result": {"image": "%%%"}}')]
)
def test_what_is_no_picture_is_not_handed_over(connect: Connect, said: bytes) -> None:
    received = Kept()
    with StubVendor(saying(said)) as vendor:
        failure(ask(connect(vendor.url), replace(REQUEST, received=received.keep)))
    assert received == []


def test_a_picture_that_nobody_can_judge_now_is_paid_and_can_be_judged_later(
    connect: Connect, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: Read) -> Any:
        raise InspectorAway("no process")

    received = Kept()
    small = replace(REQUEST, input={"width": 256, "height": 256}, received=received.keep)
    with StubVendor(saying(answer(200, PNG))) as vendor:
        backend = connect(vendor.url)
        with monkeypatch.context() as broken:
            broken.setattr(inspector, "inspect_in_turn", away)
            outcome = ask(backend, small)
            assert isinstance(outcome, Unjudged)
            assert failure(outcome) == (Kind.transient, Billed.yes)
            with pytest.raises(Unjudged):
                backend.judge(small, received[0])
        judged = backend.judge(small, received[0])
    assert (judged.read(), judged.content_type, judged.width) == (PNG, "image/png", 512)
    assert judged.sha256 == hashlib.sha256(PNG).hexdigest()
    assert [warning.code for warning in judged.warnings] == ["size_differs"]
    assert len(vendor.requests) == 1


def test_a_picture_of_a_model_that_is_gone_is_judged_all_the_same(connect: Connect) -> None:
    backend = connect("http://127.0.0.1:1/")
    assert backend.judge(Request("job_1", "of yesterday", {}), PNG).warnings == ()
    with pytest.raises(Failure, match="unfit") as caught:
        backend.judge(Request("job_1", "of yesterday", {}), PNG[:-9])
    assert not isinstance(caught.value, Unjudged)
    assert failure(caught.value) == (Kind.bad_output, Billed.yes)


def test_one_picture_a_call(connect: Connect) -> None:
    backend = connect("http://127.0.0.1:1/")
    assert backend.generate([], lambda *_: None, lambda _: False) == []
    with pytest.raises(ValueError, match="one picture"):
        backend.generate([REQUEST, REQUEST], lambda *_: None, lambda _: False)


def test_an_attempt_is_bounded_by_the_call_and_the_judging(connect: Connect, inspector: Inspector) -> None:
    backend = connect("http://127.0.0.1:1/", deadline_seconds=120)
    assert 120 + inspector.bound_seconds < backend.attempt_seconds < 200


def test_it_is_fit_to_work_until_it_is_closed() -> None:
    backend: Backend = Dataoorts("http://127.0.0.1:1/", KEY)
    backend.load()
    assert backend.health() is None
    backend.close()
    assert backend.health()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_calls_in_a_forked_process_have_a_deadline_too(connect: Connect) -> None:
    ours, theirs = socket.socketpair()
    with StubVendor(dripping(b"", b"H")) as vendor, ours, theirs:
        backend = connect(vendor.url, deadline_seconds=0.3)
        assert failure(ask(backend))[0] == Kind.transient  # the watchdog's thread runs here now
        pid = os.fork()
        if pid == 0:
            theirs.sendall(str(failure(ask(backend))[1]).encode())
            os._exit(0)
        ours.settimeout(60)
        assert ours.recv(16) == b"unknown"
        os.waitpid(pid, 0)


def test_half_a_prompt_that_the_vendor_repeats_stands_in_no_log(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"error": "no pictures of Marigold Fitzwilliam… (truncated)"}).encode()
    prompt = "a portrait of Marigold Fitzwilliam in her garden"
    with StubVendor(saying(answer(400, body))) as vendor:
        ask(connect(vendor.url), Request("job_1", DEFAULT_MODEL, {**INPUT, "prompt": prompt}))
    assert "no pictures of [prompt] [prompt]" in caplog.text and "Marigold" not in caplog.text
