"""Another machine's GPU whose server is broken or hostile: byte for byte what each test wrote down."""

import base64
import gzip
import json
import logging
import socket
import threading
import time
import traceback
from typing import Any

import pytest

from tests.shared.pictures import animated, jpeg_of_size, whole
from tests.worker.boxes import AUTH, Connect, Told, ask, connect, failure, inspector, picture, request
from tests.worker.stub_vendor import Script, StubVendor, answer, saying, saying_and_closing
from worker.backends import automatic1111_server
from worker.backends.base import Failure, Kind

__all__ = ("connect", "inspector")  # fixtures

PNG = whole("PNG", 256, 256)
JSON = "Content-Type: application/json"


def drawn(data: bytes = PNG, **more: Any) -> bytes:
    content = {"images": [base64.b64encode(data).decode()], "parameters": {}, "info": '{"seed": 7}'}
    return json.dumps(content | more).encode()


def server(draw: Script, progress: Script | None = None) -> StubVendor:
    """A server that does this when it is to draw, and beside it tells nothing, or so."""

    def script(connection: socket.socket, request: bytes) -> None:
        if request.startswith((b"POST /sdapi/v1/txt2img ", b"POST /sdapi/v1/img2img ")):
            draw(connection, request)
        elif progress is not None:
            progress(connection, request)
        else:
            connection.sendall(answer(404, b'{"detail": "Not Found"}'))

    return StubVendor(script)


def url_of(vendor: StubVendor) -> str:
    return vendor.url.removesuffix("/api/v1")


def asked_of(vendor: StubVendor) -> list[bytes]:
    return [request for request in vendor.requests if b"2img " in request.partition(b"\r\n")[0]]


# What is sent.


def test_what_is_sent_names_every_number_no_script_and_keeps_nothing_there(connect: Connect) -> None:
    with server(saying(answer(200, drawn()))) as vendor:
        picture(ask(connect(url_of(vendor), AUTH, "a checkpoint")))
    (sent,) = asked_of(vendor)
    head, _, body = sent.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /sdapi/v1/txt2img HTTP/1.1\r\n") and b"Content-Type: application/json" in head
    assert f"Authorization: Basic {base64.b64encode(AUTH.encode()).decode()}".encode() in head
    assert json.loads(body) == {
        "prompt": "a lighthouse at dusk",
        "negative_prompt": "",
        "steps": 20,
        "cfg_scale": 7.5,
        "width": 256,
        "height": 256,
        "seed": 7,
        "sampler_name": "Euler",
        "batch_size": 1,
        "n_iter": 1,
        "send_images": True,
        "save_images": False,
        "do_not_save_samples": True,
        "do_not_save_grid": True,
        "override_settings": {"sd_model_checkpoint": "a checkpoint"},
        "override_settings_restore_afterwards": False,
    }


def test_an_image_and_its_mask_are_sent_as_pictures_of_our_own(connect: Connect) -> None:
    start, mask = whole("JPEG", 300, 200, comment=b"somewhere"), whole("PNG", 300, 200, "L")
    with server(saying(answer(200, drawn()))) as vendor:
        picture(ask(connect(url_of(vendor)), request(start, mask, strength=0.4)))
    (sent,) = asked_of(vendor)
    assert sent.startswith(b"POST /sdapi/v1/img2img ")
    body = json.loads(sent.partition(b"\r\n\r\n")[2])
    assert (body["denoising_strength"], body["mask_blur"], body["inpaint_full_res"]) == (0.4, 0, False)
    assert (body["inpainting_mask_invert"], body["inpainting_fill"]) == (0, 1)
    for data in (body["mask"], *body["init_images"]):
        assert base64.b64decode(data)[1:4] == b"PNG" and b"somewhere" not in base64.b64decode(data)


def test_no_proxy_of_the_environment_and_no_netrc_gets_between(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "netrc").write_text("default login mallory password mallory\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with server(saying(answer(200, drawn()))) as vendor:
        picture(ask(connect(url_of(vendor))))
    assert not [request for request in vendor.requests if b"Authorization" in request]


def test_cookies_are_not_kept(connect: Connect) -> None:
    with server(saying(answer(200, drawn(), "Set-Cookie: who=you"))) as vendor:
        backend = connect(url_of(vendor))
        picture(ask(backend)), picture(ask(backend))
    assert not [request for request in vendor.requests if b"Cookie" in request]


# What comes back.

HOSTILE = {
    "a picture that is a bomb": drawn(jpeg_of_size(60000, 60000)),
    "an animation": drawn(animated("PNG")),
    "a picture that is a web page": drawn(b"<html>"),
    "an empty picture": drawn(b""),
    "pictures that are none": drawn(images=None),
    "a picture that is a number": drawn(images=[7]),
    "a picture that is an address": drawn(images=["http://127.0.0.1:9/a.png"]),
    "a picture of lone surrogates": b'{"images": ["\\ud800\\ud800\\ud800"], "info": ""}',
    "a list": b"[]",
    "a million values": b'{"images": [' + b"0," * 1_000_000 + b"0]}",
    "brackets without end": b"[" * 100_000,
    "half its JSON": drawn()[:-20],
    "text": b"all is well",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_not_one_whole_picture_is_bad_output(body: bytes, connect: Connect) -> None:
    with server(saying(answer(200, body, JSON))) as vendor:
        assert failure(ask(connect(url_of(vendor)))) == Kind.bad_output


@pytest.mark.parametrize("info", [None, 7, "", "{", "[]", '{"seed": "7"}', '{"seed": true}', "\ud800", "[" * 50_000])
def test_what_it_says_of_the_picture_may_be_anything(info: Any, connect: Connect) -> None:
    with server(saying(answer(200, drawn(info=info), JSON))) as vendor:
        assert picture(ask(connect(url_of(vendor), AUTH, "a checkpoint"))).warnings == ()


def test_a_name_of_a_model_is_shown_in_one_short_line(connect: Connect) -> None:
    info = json.dumps({"sd_model_name": "x\0\n\ud800" * 1000})
    with server(saying(answer(200, drawn(info=info), JSON))) as vendor:
        (warning,) = picture(ask(connect(url_of(vendor), AUTH, "a checkpoint"))).warnings
    assert warning.code == "model_differs" and warning.message.isprintable() and len(warning.message) < 200


def test_an_answer_without_end_is_not_read_to_its_end(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic1111_server, "LONGEST_ANSWER", 100_000)
    with server(dripping(b"HTTP/1.0 200 OK\r\n\r\n", b"x" * 65536, pause=0)) as vendor:
        assert failure(ask(connect(url_of(vendor)))) == Kind.bad_output
    bomb = gzip.compress(bytes(10_000_000))
    with server(saying(answer(200, bomb, "Content-Encoding: gzip"))) as vendor:
        assert failure(ask(connect(url_of(vendor)))) == Kind.bad_output
    with server(dripping(b"HTTP/1.0 500 X\r\n\r\n", b"x" * 65536, pause=0)) as vendor:
        assert failure(ask(connect(url_of(vendor)))) == Kind.transient


def reset(connection: socket.socket, _: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


BROKEN_OFF = {
    "closed without an answer": saying_and_closing(b""),
    "reset without an answer": reset,
    "half a status line": saying_and_closing(b"HTTP/1.1 20"),
    "half the body": saying_and_closing(answer(200, drawn()[:500], length=len(drawn()))),
    "not HTTP": saying_and_closing(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a header of a million characters": saying_and_closing(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000),
}


@pytest.mark.parametrize("script", BROKEN_OFF.values(), ids=BROKEN_OFF.keys())
def test_a_connection_that_breaks_is_a_passing_failure_and_nobody_asks_twice(script: Script, connect: Connect) -> None:
    with server(script) as vendor:
        assert failure(ask(connect(url_of(vendor)))) == Kind.transient
    assert len(asked_of(vendor)) == 1


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
    "drips the body": dripping(answer(200, drawn()[:100], length=10**6), b"A"),
    "drips a body without length": dripping(b"HTTP/1.0 200 OK\r\n\r\n", b"A"),
    "100 Continue for ever": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("script", NEVER_DONE.values(), ids=NEVER_DONE.keys())
def test_whoever_is_never_done_is_cut_off_at_the_deadline(script: Script, connect: Connect) -> None:
    with server(script) as vendor:
        outcome = ask(connect(url_of(vendor), deadline_seconds=0.3))
    assert failure(outcome) == Kind.transient and "no whole answer in 0.3 seconds" in str(outcome)


def test_a_server_that_never_accepts_is_cut_off(connect: Connect) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        crowd = [socket.socket() for _ in range(4)]
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        backend = connect(f"http://127.0.0.1:{full.getsockname()[1]}", connect_seconds=0.3)
        assert failure(ask(backend)) == Kind.not_accepted
        for one in crowd:
            one.close()


# How far it is.


def state(**changes: Any) -> dict[str, Any]:
    now = {"job": "x", "job_count": 1, "job_timestamp": "1", "sampling_step": 3, "sampling_steps": 20} | changes
    return {"progress": 0.1, "state": now | {"interrupted": False, "skipped": False}, "current_image": None}


STRANGE = {
    "silence": silent,
    "a web page": saying(answer(200, b"<html>")),
    "an error": saying(answer(500, b"{}")),
    "no state": saying(answer(200, b'{"state": null}')),
    "a redirect": saying(answer(302, b"", "Location: http://127.0.0.1:9/")),
    "too much": dripping(b"HTTP/1.0 200 OK\r\n\r\n", b"x" * 65536, pause=0),
}


@pytest.mark.parametrize("progress", STRANGE.values(), ids=STRANGE.keys())
def test_a_server_that_does_not_tell_how_far_it_is_draws_all_the_same(
    progress: Script, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic1111_server, "QUESTION_SECONDS", 0.3)
    monkeypatch.setattr(automatic1111_server, "LONGEST_ANSWER", 10_000_000)
    told = Told()
    with server(saying(answer(200, drawn())), progress) as vendor:
        picture(ask(connect(url_of(vendor)), told=told))
    assert told.news == []


class Reporter:
    """A server that is idle until it is asked to draw, tells these states while it does, and then ends."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self.states = list(states)
        self.drawing = threading.Event()
        self.told_all = threading.Event()

    def draw(self, connection: socket.socket, _: bytes) -> None:
        self.drawing.set()
        assert self.told_all.wait(60)
        connection.sendall(answer(200, drawn()))

    def progress(self, connection: socket.socket, _: bytes) -> None:
        now = state(job="", job_count=0)
        if self.drawing.is_set():
            now = self.states.pop(0) if self.states else state()
            if not self.states:
                self.told_all.set()
        connection.sendall(answer(200, json.dumps(now).encode()))


def hear(connect: Connect, *states: dict[str, Any]) -> list[tuple[int, int, bytes | None]]:
    reporter, told = Reporter(*states), Told()
    with server(reporter.draw, reporter.progress) as vendor:
        picture(ask(connect(url_of(vendor)), told=told))
    return told.news


def test_steps_that_are_none_are_not_told(connect: Connect) -> None:
    strange = [("3", "20"), (None, None), (3, 0), (3, -1), (True, True)]
    states = [state(sampling_step=step, sampling_steps=steps) for step, steps in strange]
    states += [state(sampling_step=-5), state(sampling_step=99), state(sampling_step=99)]
    assert [news[:2] for news in hear(connect, *states)][:2] == [(0, 20), (20, 20)]


def test_a_preview_that_is_no_small_picture_is_not_shown(connect: Connect) -> None:
    shown = [b"GIF89a", jpeg_of_size(60000, 60000), whole("PNG", 2304, 2304, "L"), PNG[:100]]
    previews = [base64.b64encode(data).decode() for data in shown] + ["????", "A" * (9 * 1024 * 1024)]
    states = [state(sampling_step=step) | {"current_image": text} for step, text in enumerate(previews)]
    news = hear(connect, *states, state() | {"current_image": base64.b64encode(PNG).decode()}, state())
    assert [preview for *_, preview in news][: len(previews)] == [None] * len(previews)
    assert any(preview is not None for *_, preview in news)


def test_from_the_moment_on_in_which_something_else_is_drawn_nothing_is_told(connect: Connect) -> None:
    states = [state(), state(job_timestamp="2", sampling_step=4), state(sampling_step=5), state(sampling_step=6)]
    assert hear(connect, *states) == [(3, 20, None)]


# Secrets.


def echo(connection: socket.socket, request: bytes) -> None:
    """An error page that shows the request, as some do."""
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    words = f"{' '.join(sorted(lines))} {AUTH} {AUTH.partition(':')[2].upper()}"
    connection.sendall(answer(400, json.dumps({"error": "ValueError", "detail": words, "errors": words}).encode()))


def echo_in_header(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nnonsense " + AUTH.encode() + b"\r\nX " + AUTH.encode() + b"\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("script", [echo, echo_in_header, silent, reset])
def test_the_password_appears_in_no_message_log_repr_or_traceback(
    script: Script, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with server(script) as vendor:
        backend = connect(url_of(vendor), AUTH, deadline_seconds=0.5)
        outcome = ask(backend)
    assert isinstance(outcome, Failure)
    assert [outcome.__traceback__, outcome.__cause__, outcome.__context__] == [None] * 3
    shown = [outcome.message, repr(outcome), repr(backend), caplog.text, *traceback.format_exception(outcome)]
    encoded = base64.b64encode(AUTH.encode()).decode()[:20]
    assert not [text for text in shown if "canary" in text.lower() or encoded in text]
