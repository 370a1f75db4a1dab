"""Every refusal has one shape."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from api.errors import KINDS
from api.services import Services
from shared import jobs as life
from shared.errors import JobErrorCode
from tests.api.people import Caller, Submit
from tests.lines import written

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here."""
    return sqlite_url


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = response.json
    assert response.status_code == status == body["status"] and code == body["code"], response.text
    assert response.content_type == "application/problem+json" and response.headers["Cache-Control"] == "no-store"
    assert body["request_id"] == response.headers["X-Request-Id"]
    assert body["retryable"] is KINDS[code].retryable and body["type"].endswith(code)
    assert set(body) - {"errors"} == {"type", "title", "status", "detail", "code", "retryable", "request_id"}
    return body


def test_an_unknown_address_is_not_found(api: Caller, stranger: Caller) -> None:
    for path in (
        "/",
        "/v1",
        "/v1/",
        "/v1/job",
        "/v1/jobs/",
        "//v1/jobs",
        "/v1//jobs",
        "/v2/jobs",
        "/docs/x",
        "/static/x",
    ):
        problem(api.get(path), 404, "not_found")
        problem(stranger.get(path), 404, "not_found")


def test_a_wrong_method_is_told_the_right_ones(api: Caller) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        response = api.open("/v1/jobs", method=method)
        problem(response, 405, "method_not_allowed")
        assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "POST"}
    assert set(api.post("/v1/models").headers["Allow"].split(", ")) == {"GET", "HEAD"}


def test_what_is_not_json_is_malformed(api: Caller) -> None:
    for body in (
        b"",
        b"{",
        b"{'input': 1}",
        b'{"input": NaN}',
        b'{"input": -Infinity}',
        b'{"input": {}, "input": {}}',
        b'{"input": {"prompt": "a", "prompt": "b"}}',
        b'{"a": "\xff"}',
        b'\xef\xbb\xbf{"input": {"prompt": "a cat"}}',
        '{"input": {"prompt": "a cat"}}'.encode("utf-16"),
        b'{"input": {"prompt": "raw \x00"}}',
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1} x',
    ):
        problem(api.post("/v1/jobs", data=body, headers=JSON), 400, "malformed")


def test_only_plain_json_is_taken(api: Caller) -> None:
    body = b'{"input": {"prompt": "a cat"}}'
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/problem+json"},
        {"Content-Type": "application/json; charset=latin-1"},
        JSON | {"Content-Encoding": "gzip"},
    ):
        problem(api.post("/v1/jobs", data=body, headers=headers), 415, "unsupported_media_type")
    accepted = {"Content-Type": "application/json; charset=UTF-8"}
    assert api.post("/v1/jobs", data=body, headers=accepted).status_code == 202


def test_a_large_body_is_refused(api: Caller) -> None:
    problem(api.post("/v1/jobs", data=b" " * 1_000_001, headers=JSON), 413, "too_large")
    problem(api.post("/v1/jobs", data=b" " * 1_000_000, headers=JSON), 400, "malformed")


def test_deep_and_strange_bodies_are_refused_quickly(api: Caller) -> None:
    nested = '{"a":' * 300 + '"\\ud800"' + "}" * 300
    body = problem(api.post("/v1/jobs", data=nested, headers=JSON), 422, "invalid")
    assert body["errors"][0]["pointer"] == "#" + "/a" * 300
    many = "{" + ",".join(f'"field{n}": 1' for n in range(10_000)) + "}"
    assert len(problem(api.post("/v1/jobs", data=many, headers=JSON), 422, "invalid")["errors"]) == 20


def test_a_request_keeps_its_id_if_it_is_a_sane_one(api: Caller) -> None:
    for given in ("abc-1", "x" * 128, "!~"):
        assert api.get("/healthz", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given
    for given in ("", "x" * 129, "a b", "é", "a\tb"):
        fresh = api.get("/healthz", headers={"X-Request-Id": given}).headers["X-Request-Id"]
        assert re.fullmatch("[0-9a-f]{32}", fresh)


def test_a_fault_of_ours_tells_nothing_and_is_logged(api: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("inner secret")

    monkeypatch.setattr(life, "submit", fail)
    with written(level=logging.ERROR) as lines:
        response = api.post("/v1/jobs", json={"input": {"prompt": "the prompt"}})
    body = problem(response, 500, "internal")
    assert "secret" not in response.text
    fault = lines.as_json()[0]
    assert fault["request_id"] == body["request_id"] and "ZeroDivisionError" in fault["exception"]
    assert "the prompt" not in lines.getvalue()


def test_a_failed_statement_logs_no_prompt(api: Caller, services: Services, caplog: pytest.LogCaptureFixture) -> None:
    with services.database.write() as tx:
        tx.exec_driver_sql("DROP TABLE events")
        tx.exec_driver_sql("CREATE TABLE events (id INTEGER PRIMARY KEY, other TEXT NOT NULL)")
    response = api.post("/v1/jobs", json={"input": {"prompt": "the prompt"}, "metadata": {"a": "the value"}})
    assert response.status_code in (500, 503)
    assert "the prompt" not in caplog.text and "the value" not in caplog.text


def test_a_database_that_is_away_is_said_to_be(api: Caller, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    url = submit()["urls"]["self"]

    def away(*args: object, **kwargs: object) -> None:
        raise OperationalError("SELECT", {}, Exception("gone"))

    for path in ("shared.jobs.submit", "api.jobs.read_job"):
        monkeypatch.setattr(path, away)
    for response in (api.get(url), api.post("/v1/jobs", json={"input": {"prompt": "a cat"}})):
        problem(response, 503, "unavailable")
        assert response.headers["Retry-After"] == "5"


def documented(title: str) -> dict[str, list[str]]:
    section = Path("docs/errors.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_docs_list_every_code_of_a_request() -> None:
    listed = documented("Codes of a request")
    assert list(listed) == list(KINDS)
    for code, kind in KINDS.items():
        assert listed[code][0] == str(kind.status) and all(listed[code])


def test_the_docs_list_every_code_of_a_job() -> None:
    listed = documented("Codes of a job")
    assert list(listed) == [code.value for code in JobErrorCode] and all(all(row) for row in listed.values())
