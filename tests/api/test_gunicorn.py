"""The API as it is started: gunicorn, its configuration, a real socket."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import requests
from gunicorn.config import Config  # type: ignore[import-untyped]

from api.app import STREAM_PLACES, WAITING_PLACES
from api.compat import dataoorts
from local.web import free_port
from shared.announcements import CHANNEL
from tests.api.people import KEY
from tests.servers import RedisServer
from tests.service import eventually

pytestmark = pytest.mark.slow

PATIENCE = 30.0  # seconds for an answer that comes at once, on a machine that is busy
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here."""
    return sqlite_url


@contextmanager
def gunicorn(
    port: int, *options: str, app: str = "api.app:create_app()", **environ: str
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "gunicorn", "-c", "api/gunicorn.conf.py", app, *options]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")} | environ
    command += ["--bind", f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        command, env=environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, however long a grace they have
        with process:  # waits, and closes its pipe
            pass


def answers(process: subprocess.Popen[str], port: int) -> bool:
    assert process.poll() is None
    with suppress(requests.RequestException):  # it listens before it answers
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).ok
    return False


@pytest.fixture(scope="module")
def one_server() -> Iterator[int]:
    """The port of a server whose stores are away: for what never gets as far as them."""
    port = free_port()
    settings = {
        "DARKROOM_API_KEY": KEY,
        "DARKROOM_SECRET_KEY": "s" * 32,
        "DARKROOM_DATABASE_URL": "sqlite:////nowhere/x",
    }
    with gunicorn(port, **settings) as process:
        assert process.stderr is not None
        threading.Thread(target=process.stderr.read, daemon=True).start()
        eventually("the API answers", lambda: answers(process, port), 60)
        yield port


@pytest.fixture
def server(
    database_url: str, redis_url: str, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    settings = {
        "DARKROOM_DATABASE_URL": database_url,
        "DARKROOM_REDIS_URL": redis_url,
        "DARKROOM_API_KEY": KEY,
        "DARKROOM_SECRET_KEY": "s" * 32,
    }
    with gunicorn(port, *getattr(request, "param", ()), **settings) as process:
        eventually("the API answers", lambda: answers(process, port), 60)
        yield process, port


# With a grace that no test waits for: what ends, ends by itself. And who comes back for more may take his time.
LONG = ("--graceful-timeout", "3600", "--keep-alive", "3600")


@pytest.mark.parametrize("server", [LONG], indirect=True, ids=["long grace"])
def test_it_serves_over_a_socket_and_ends_when_told(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    url = f"http://127.0.0.1:{port}/v1/jobs"
    with requests.Session() as session:
        response = session.post(url, json={"input": {"prompt": "a cat"}}, headers=HEADERS, timeout=PATIENCE)
        assert response.status_code == 202 and response.headers["Location"].startswith(f"{url}/job_")
        job = session.get(response.headers["Location"], headers=HEADERS, timeout=PATIENCE).json()
        assert job == response.json() | {"queue_position": 1}

        headers = HEADERS | {"Content-Type": "application/json"}
        chunked = session.post(
            url, data=iter([b'{"input": ', b'{"prompt": "a cat"}}']), headers=headers, timeout=PATIENCE
        )
        assert chunked.status_code == 202
        chunks = (b" " * 65536 for _ in range(16))
        assert session.post(url, data=chunks, headers=headers, timeout=PATIENCE).status_code == 413

    # Threads of both workers, each with a connection that stays open: none of it may hold up the end.
    with requests.Session() as session:
        threads = [threading.Thread(target=session.get, args=(url,), kwargs={"headers": HEADERS}) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        idle = socket.create_connection(("127.0.0.1", port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        idle.close()
    assert "Traceback" not in process.communicate()[1]


def test_waits_end_with_an_answer_when_it_is_told_to_stop(
    server: tuple[subprocess.Popen[str], int], redis_server: RedisServer
) -> None:
    """Else they would use up the grace (30 s), and be cut off without an answer: each asks for 60 s."""
    process, port = server
    url = f"http://127.0.0.1:{port}/v1/jobs"
    job = requests.post(url, json={"input": {"prompt": "a cat"}}, headers=HEADERS, timeout=PATIENCE).json()
    asked = (
        f"GET /v1/jobs/{job['id']} HTTP/1.1\r\nHost: darkroom\r\nAuthorization: Bearer {KEY}\r\n"
        "Prefer: wait=60\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    in_hand = b"HTTP/1.1 100 Continue\r\n\r\n"
    with ExitStack() as held:
        waits: list[socket.socket] = []

        def both_processes_wait() -> bool:
            # Each begins to listen with its first wait; which of them takes a connection is up to the kernel.
            waits.append(held.enter_context(socket.create_connection(("127.0.0.1", port), 90)))
            waits[-1].sendall(asked.encode())
            # A request that no thread has in hand yet when the signal comes is not answered, and need not be.
            assert waits[-1].recv(len(in_hand), socket.MSG_WAITALL) == in_hand
            return redis_server.client().pubsub_numsub(CHANNEL)[0][1] == 2

        eventually("requests wait in both processes", both_processes_wait, 60)
        process.send_signal(signal.SIGTERM)
        answers = [answer_on(client) for client in waits]
    assert {(status, body["status"]) for status, _, body in answers} == {(200, "queued")}
    assert process.wait(60) == 0 and "Traceback" not in process.communicate()[1]


def sent_raw(port: int, data: bytes) -> tuple[int, dict[str, str], Any]:
    """What the server says to these bytes before it closes the connection: status, headers, JSON."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(data)
        return answer_on(client)


def answer_on(client: socket.socket) -> tuple[int, dict[str, str], Any]:
    """What comes until the connection is closed: status, headers, JSON."""
    answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"GET /v1/jobs?metadata=" + b"x" * 8190 + b" HTTP/1.1\r\n\r\n", 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 9000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: a miracle\r\n\r\n", 417, "expectation_failed"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: rot13\r\n\r\n", 501, "unknown_coding"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n", 400, "malformed"),
        (b"GET /a\x01 HTTP/1.1\r\n\r\n", 400, "malformed"),
        (b"a secret\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\na secret: b\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "malformed"),
    ],
    ids=lambda value: value[:24] + b".." if isinstance(value, bytes) else None,
)
def test_what_is_no_request_is_told_so_in_the_shape_of_every_error(
    one_server: int, request_: bytes, status: int, code: str
) -> None:
    told, headers, problem = sent_raw(one_server, request_)
    assert (told, problem["status"], problem["code"]) == (status, status, code)
    assert headers["content-type"] == "application/problem+json" and headers["connection"] == "close"
    assert headers["x-request-id"] == problem["request_id"] and problem["detail"] and "secret" not in str(problem)


def test_a_request_has_one_answer_also_where_the_rest_of_its_body_can_not_be_read(one_server: int) -> None:
    asked = b"GET /healthz HTTP/1.1\r\nHost: darkroom\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with socket.create_connection(("127.0.0.1", one_server), PATIENCE) as client:
        client.sendall(asked)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1 ") == 1


def in_chunks(path: str, body: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: darkroom\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode() + body


def test_chunks_that_are_none_are_malformed_and_end_the_connection(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = server
    url = f"http://127.0.0.1:{port}/v1/jobs"
    job = requests.post(url, json={"input": {"prompt": "a cat"}}, headers=HEADERS, timeout=PATIENCE).json()
    for path in ("/v1/jobs", f"/v1/jobs/{job['id']}/cancel", "/api/v1"):
        for chunks in (
            b"zz\r\n{}\r\n0\r\n\r\n",
            b"-5\r\n{}\r\n0\r\n\r\n",
            b"2\r\n{}XX0\r\n\r\n",
            b"2;=\r\n{}\r\n0\r\n\r\n",
        ):
            status, headers, body = sent_raw(port, in_chunks(path, chunks))
            assert status == 400 and headers["x-request-id"], (path, chunks)
            if path == "/api/v1":
                assert body["success"] is False and body["errors"][0]["code"] == 5006
            else:
                assert body["code"] == "malformed" and "not framed" in body["detail"]
    listed = requests.get(url, headers=HEADERS, timeout=PATIENCE).json()["data"]
    assert [(each["id"], each["status"]) for each in listed] == [(job["id"], "queued")]
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in process.communicate(timeout=60)[1]


def test_an_idempotency_key_is_given_once(server: tuple[subprocess.Popen[str], int]) -> None:
    """A comma is as good a character of a key as any, so two of them must not become one."""
    _, port = server
    body = b'{"input": {"prompt": "a cat"}}'
    for keys, status in ((["a,b"], 202), (["a", "b"], 422), (["a", "a"], 422), (['"a', 'b"'], 422)):
        lines = "".join(f"Idempotency-Key: {key}\r\n" for key in keys)
        head = (
            f"POST /v1/jobs HTTP/1.1\r\nHost: darkroom\r\nAuthorization: Bearer {KEY}\r\n{lines}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        answered, _, said = sent_raw(port, head.encode() + body)
        assert answered == status, (keys, said)
        if status == 422:
            assert [error["parameter"] for error in said["errors"]] == ["Idempotency-Key"]


def test_a_list_may_be_asked_for_by_as_much_metadata_as_a_job_may_have(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    _, port = server
    url = f"http://127.0.0.1:{port}/v1/jobs"
    metadata = {"k": "ü" * 1023}  # with %-encoding, three times as long in the URL
    body = {"input": {"prompt": "a cat"}, "metadata": metadata}
    job = requests.post(url, json=body, headers=HEADERS, timeout=PATIENCE).json()
    query = {f"metadata[{key}]": value for key, value in metadata.items()}
    found = requests.get(url, params=query, headers=HEADERS, timeout=PATIENCE)
    assert found.status_code == 200 and [each["id"] for each in found.json()["data"]] == [job["id"]]


def test_there_are_more_threads_than_places_to_wait() -> None:
    configured = runpy.run_path("api/gunicorn.conf.py")
    threads = configured["threads"]
    assert threads - WAITING_PLACES - STREAM_PLACES >= 32  # for everybody else
    assert dataoorts.PLACES < WAITING_PLACES  # each takes one of them, and Prefer: wait has the rest
    assert Config().worker_connections > threads and "worker_connections" not in configured


@pytest.mark.parametrize("server", [("--workers=1",)], indirect=True, ids=["one process"])
def test_with_every_place_taken_everybody_else_is_answered(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    assert process.stderr is not None
    # A line for each request: more than a pipe holds, and who writes them would wait.
    threading.Thread(target=process.stderr.read, daemon=True).start()
    url = f"http://127.0.0.1:{port}/v1/jobs"
    job = requests.post(url, json={"input": {"prompt": "a cat"}}, headers=HEADERS, timeout=PATIENCE).json()
    path = job["urls"]["self"]

    def hold(held: ExitStack, path: str, header: str) -> None:
        client = held.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        head = f"GET {path} HTTP/1.1\r\nHost: darkroom\r\nAuthorization: Bearer {KEY}\r\n{header}\r\n\r\n"
        client.sendall(head.encode())

    def can_wait() -> bool:
        answer = requests.get(path, headers=HEADERS | {"Prefer": "wait=1"}, timeout=PATIENCE)
        return "Preference-Applied" in answer.headers

    def can_stream() -> bool:
        headers = HEADERS | {"Accept": "text/event-stream"}
        with requests.get(f"{path}/events", headers=headers, timeout=PATIENCE, stream=True) as answer:
            return answer.status_code == 200

    with ExitStack() as streams, ExitStack() as waits:

        def all_stream() -> bool:
            # More than there are places: whoever asks whether there is one takes it for a moment.
            for _ in range(STREAM_PLACES // 5):
                hold(streams, f"/v1/jobs/{job['id']}/events", "Accept: text/event-stream")
            return not can_stream()

        def all_wait() -> bool:
            # They wait for a minute, and a slow machine may need longer to let all of them in: so more follow.
            for _ in range(WAITING_PLACES // 5):
                hold(waits, f"/v1/jobs/{job['id']}", "Prefer: wait=60")
            return not can_wait()

        eventually("every stream has its place", all_stream, 120)
        eventually("every wait has its place", all_wait, 120)
        for _ in range(3):
            assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE).ok
            assert requests.get(path, headers=HEADERS, timeout=PATIENCE).json()["status"] == "queued"
            assert requests.get(url, headers=HEADERS, timeout=PATIENCE).json()["data"]
            other = requests.post(url, json={"input": {"prompt": "a dog"}}, headers=HEADERS, timeout=PATIENCE)
            assert other.status_code == 202
        eventually("the streams have their places still", all_stream, 120)
    # They have hung up, and their job stands still.
    eventually("there is a place to wait again", can_wait, 60)
    eventually("there is a place for a stream again", can_stream, 60)


def test_wrong_settings_refuse_to_start_and_say_which() -> None:
    with gunicorn(free_port(), DARKROOM_SECRET_KEY="short", DARKROOM_REDIS_URL="http://x") as process:
        output = process.communicate(timeout=120)[1]
    assert process.returncode == 4, output
    assert "DARKROOM_SECRET_KEY: must be 32 characters or more" in output and "DARKROOM_REDIS_URL: must start" in output
    assert "Traceback" not in output
    assert "Booting worker" not in output  # two that fail at once are more than gunicorn can take


def test_one_of_its_processes_says_at_the_start_what_is_not_as_it_should_be(database_url: str, redis_url: str) -> None:
    settings = {
        "DARKROOM_DATABASE_URL": database_url,
        "DARKROOM_REDIS_URL": redis_url,
        "DARKROOM_API_KEY": KEY,
        "DARKROOM_SECRET_KEY": "s" * 32,
    }
    with gunicorn(free_port(), **settings) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "secret key: " in line)
        assert "looks like one that somebody can guess" in said and "openssl rand -hex 32" in said
        process.terminate()
        # The other process leaves it to that one.
        assert not [line for line in process.stderr if "secret key: " in line]
