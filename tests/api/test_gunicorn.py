"""The API as it is started: gunicorn, its configuration, a real socket."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from tests.api.people import KEY
from tests.servers import free_port

pytestmark = pytest.mark.slow

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here."""
    return sqlite_url


@contextmanager
def gunicorn(port: int, **environ: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "gunicorn", "-c", "api/gunicorn.conf.py", "api.app:create_app()"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")} | environ
    command += ["--bind", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.terminate()
        with process:  # waits, and closes its pipe
            pass


@pytest.fixture
def server(database_url: str, redis_url: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    settings = {
        "DARKROOM_DATABASE_URL": database_url,
        "DARKROOM_REDIS_URL": redis_url,
        "DARKROOM_API_KEY": KEY,
        "DARKROOM_SECRET_KEY": "s" * 32,
    }
    with gunicorn(port, **settings) as process:
        deadline = time.monotonic() + 30
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
                break
            except requests.ConnectionError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield process, port


def test_it_serves_over_a_socket_and_ends_when_told(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    url = f"http://127.0.0.1:{port}/v1/jobs"
    with requests.Session() as session:
        response = session.post(url, json={"input": {"prompt": "a cat"}}, headers=HEADERS, timeout=5)
        assert response.status_code == 202 and response.headers["Location"].startswith(f"{url}/job_")
        assert session.get(response.headers["Location"], headers=HEADERS, timeout=5).json() == response.json()

        headers = HEADERS | {"Content-Type": "application/json"}
        chunked = session.post(url, data=iter([b'{"input": ', b'{"prompt": "a cat"}}']), headers=headers, timeout=5)
        assert chunked.status_code == 202
        chunks = (b" " * 65536 for _ in range(16))
        assert session.post(url, data=chunks, headers=headers, timeout=5).status_code == 413

    # Threads of both workers, each with a connection that stays open: none of it may hold up the end.
    with requests.Session() as session:
        threads = [threading.Thread(target=session.get, args=(url,), kwargs={"headers": HEADERS}) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        idle = socket.create_connection(("127.0.0.1", port))
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and time.monotonic() - started < 8
        idle.close()
    assert "Traceback" not in process.communicate()[1]


def test_wrong_settings_refuse_to_start_and_say_which() -> None:
    with gunicorn(free_port(), DARKROOM_SECRET_KEY="short", DARKROOM_REDIS_URL="http://x") as process:
        output = process.communicate(timeout=30)[1]
    assert process.returncode == 4
    assert "DARKROOM_SECRET_KEY: must be 32 characters or more" in output and "DARKROOM_REDIS_URL: must start" in output
    assert "Traceback" not in output
