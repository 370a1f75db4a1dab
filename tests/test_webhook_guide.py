"""The receivers in docs/webhooks.md, as they stand there."""

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import WebhookVerificationError

from shared.webhook_secrets import new_secret
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
    with pytest.raises(WebhookVerificationError):
        ask(names["app"], signed([new_secret()], "evt_1", stamp, BODY))


def test_a_receiver_of_the_guide_has_about_ten_lines() -> None:
    for program in (FLASK, FASTAPI):
        assert len([line for line in program.splitlines() if line.strip()]) <= 12
