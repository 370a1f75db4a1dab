"""What stands outside the system that is measured: the vendor's stand-in, and the load."""

import json
import shlex
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from typing import Any, TypeVar

import requests

from bench.processes import ROOT, Processes

T = TypeVar("T")

#: How long a start may take, and a load program beyond what it was asked for, in seconds.
PATIENCE = 60.0


def eventually(what: str, processes: Processes, happens: Callable[[], T]) -> T:
    """Wait until it is true and return it. Raises RuntimeError if it never is, or one of the processes ends."""
    deadline = time.monotonic() + PATIENCE
    while not (value := happens()):
        processes.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.02)
    return value


class Vendor:
    """The stand-in (`bench/vendor.py`), started as one of these processes and called `vendor` there."""

    def __init__(self, processes: Processes) -> None:
        processes.start("vendor", f"{shlex.quote(sys.executable)} -m bench.vendor", {})
        self.port = int(eventually("the vendor's stand-in", processes, lambda: processes.log("vendor").strip()))
        self.url = f"http://127.0.0.1:{self.port}/api/v1"
        self._http = requests.Session()
        self._http.trust_env = False

    def wish(self, delay: float, size: int) -> None:
        """Answer after so many seconds with pictures of so many bytes, and begin a new book."""
        self._ask("PUT", "/wish", {"delay": delay, "bytes": size})

    def book(self) -> dict[str, Any]:
        """What has come since the last wish; `bench/vendor.py` has the names."""
        return self._ask("GET", "/book")

    def calls(self) -> int:
        """How many calls have come since the last wish."""
        answer = self._http.get(f"http://127.0.0.1:{self.port}/calls", timeout=30)
        return int(answer.text)

    def answer_with(self, kind: str, body: bytes) -> None:
        """What comes in place of a picture for prompts that are `kind` and one more word."""
        self._ask("PUT", "/answers", {kind: b64encode(body).decode()})

    def release(self) -> None:
        """Answer what is held."""
        self._ask("POST", "/release")

    def close(self) -> None:
        self._http.close()

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        answer = self._http.request(method, f"http://127.0.0.1:{self.port}{path}", timeout=30, json=body)
        answer.raise_for_status()
        return dict(answer.json())


def run_load(program: str, *, within: float = 60.0, **arguments: Any) -> dict[str, Any]:
    """Run a program of `bench/load`. Raises RuntimeError if it fails, or takes longer than `within` and PATIENCE."""
    command = [sys.executable, "-m", "bench.load", program, json.dumps(arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within + PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{program} was not done within {within + PATIENCE:g} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{program} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    found = dict(json.loads(done.stdout))
    if "error" in found:
        raise RuntimeError(f"{program}: {found['error']}")
    return found
