"""`python -m sandbox` as a process: its one line, and its end."""

import ast
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import sandbox
from tests.sandbox.calling import KEY, SDXL, SMALL

FOLDER = Path(sandbox.__file__).parent


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sandbox", "--port", "0"]
    with subprocess.Popen(command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True) as running:
        yield running
        running.kill()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    start, _, url = process.stdout.readline().rstrip().rpartition(" ")
    assert start == "sandbox: listening on"
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/api/v1")
    return url


def test_it_serves_as_soon_as_its_line_is_out(process: subprocess.Popen[str]) -> None:
    answer = requests.post(url_of(process), json={"model": SDXL, "data": SMALL}, headers=KEY, timeout=60)
    assert answer.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_even_with_calls_in_flight(process: subprocess.Popen[str], number: int) -> None:
    url = url_of(process)
    body = {"model": SDXL, "data": SMALL | {"prompt": "a lake [sandbox:hang]"}}
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(url, json=body, headers=KEY, timeout=0.2)
    process.send_signal(number)
    assert process.wait(60) == 0


def test_a_taken_port_is_reported_and_refused(process: subprocess.Popen[str]) -> None:
    port = url_of(process).split(":")[2].split("/")[0]
    command = [sys.executable, "-m", "sandbox", "--port", port]
    second = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"sandbox: can't listen on 127.0.0.1:{port}: Address already in use\n"


def test_the_sandbox_stands_on_its_own() -> None:
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"api", "worker", "shared", "local", "client", "bench"}
