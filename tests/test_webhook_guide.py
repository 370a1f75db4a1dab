"""The receivers in docs/webhooks.md, as they stand there."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from local import web
from shared.webhook_secrets import new_secret
from tests.local.programs import running
from tests.local.test_up import NOTHING_GIVEN
from tests.service import eventually
from worker import sender
from worker.posting import Trouble
from worker.webhooks import signed

GUIDE = (Path(__file__).parent.parent / "docs" / "webhooks.md").read_text()
FLASK, FASTAPI = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
BODY = b'{"type":"job.succeeded","timestamp":"2026-11-23T12:00:00.000Z","data":{"id":"job_1"}}'


def ask_flask(app: Any, headers: dict[str, str]) -> int:
    app.testing = True  # so that what it raises comes out
    return int(app.test_client().post("/darkroom", data=BODY, headers=headers).status_code)


def ask_fastapi(app: Any, headers: dict[str, str]) -> int:
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/darkroom",
        "raw_path": b"/darkroom",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }
    asyncio.run(app(scope, receive, send))
    return int(said[0]["status"])


@pytest.mark.parametrize(("program", "ask"), [(FLASK, ask_flask), (FASTAPI, ask_fastapi)], ids=["flask", "fastapi"])
def test_a_receiver_of_the_guide_takes_what_we_signed_and_nothing_else(
    program: str, ask: Callable[[Any, dict[str, str]], int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    secret = new_secret()
    monkeypatch.setenv("WEBHOOK_SECRET", secret)
    names: dict[str, Any] = {"__name__": "receiver"}
    exec(compile(program, "docs/webhooks.md", "exec"), names)  # noqa: S102  it is our own page
    stamp = int(datetime.now(UTC).timestamp())
    assert ask(names["app"], signed([new_secret(), secret], "evt_1", stamp, BODY)) == 204
    assert "evt_1 job.succeeded job_1" in capsys.readouterr().out
    assert ask(names["app"], signed([new_secret()], "evt_2", stamp, BODY)) == 400
    assert ask(names["app"], signed([secret], "evt_2", stamp - 600, BODY)) == 400
    assert "evt_2" not in capsys.readouterr().out


def test_a_receiver_of_the_guide_has_ten_lines() -> None:
    for program in (FLASK, FASTAPI):
        assert len([line for line in program.splitlines() if line.strip()]) == 10


def test_the_guide_explains_every_error_that_a_try_may_have() -> None:
    ours = re.findall(r'_ours\("(\w+)"', Path(sender.__file__).read_text())
    assert len(ours) == 3
    assert sorted(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)) == sorted([*Trouble, *ours])


@pytest.mark.slow
def test_the_guides_way_to_try_it_on_ones_machine_leads_to_a_webhook(tmp_path: Path) -> None:
    start, receive, submit = re.findall(r"```\n(.*?)```", GUIDE.partition("## Trying it on your machine")[2], re.DOTALL)
    setting = re.fullmatch(r"(\w+)=(\S+) \./dev up\n", start)
    assert setting
    (tmp_path / "receiver.py").write_text(FLASK)
    port, hook = web.free_port(), web.free_port()
    environ = NOTHING_GIVEN | {setting[1]: setting[2]}
    with running("local.up", "--data", "data", "--caller", tmp_path, "--port", port, environ=environ) as service:
        told = {"dk_…": service.until(r"^Key +(dk_[0-9a-f]{48})$")[1], "8000": str(port), "9100": str(hook)}
        service.until(r"^curl .*/v1/jobs.*$")

        def as_told(text: str) -> str:
            for name, value in told.items():
                text = text.replace(name, value)
            return text

        ask, run = receive.splitlines()
        told["whsec_…"] = json.loads(subprocess.check_output(as_told(ask), shell=True))["secret"]  # noqa: S602
        with shell(as_told(run), cwd=tmp_path) as said:
            eventually("the receiver listens", lambda: "Running on" in said())
            job = json.loads(subprocess.check_output(as_told(submit), shell=True))  # noqa: S602  (to paste is the point)
            eventually("the webhook", lambda: re.search(rf"^evt_\w+ job.succeeded {job['id']}$", said(), re.MULTILINE))


@contextmanager
def shell(line: str, cwd: Path) -> Iterator[Callable[[], str]]:
    """A line as somebody types it, until the block ends; gives what it has said so far."""
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    log = cwd / "said.log"
    with log.open("wb") as out:
        given: dict[str, Any] = {"cwd": cwd, "env": environ, "stdout": out, "stderr": out}
        process = subprocess.Popen(line, shell=True, start_new_session=True, **given)  # noqa: S602
    try:
        yield log.read_text
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
