"""The one line of each request."""

import pytest
from flask_openapi3.openapi import OpenAPI

from api.services import Services
from tests.api.people import Caller, Submit, on_sqlite
from tests.lines import written

pytestmark = on_sqlite


def test_a_request_is_told_in_one_line_with_its_route_its_job_and_who_asked(
    api: Caller, submit: Submit, services: Services
) -> None:
    with written() as lines:
        job = submit()
        api.get(f"/v1/jobs/{job['id']}", headers={"X-Request-Id": "mine"})
    first, second = lines.as_json(logger="api.requests")
    project = services.keys.project_of(api.environ_base["HTTP_AUTHORIZATION"])
    assert 0 <= first.pop("seconds") < 60 and len(first.pop("request_id")) == 32
    for name in ("time", "pid"):
        first.pop(name)
    assert first == {
        "level": "info",
        "process": "test",
        "logger": "api.requests",
        "message": "POST /v1/jobs 202",
        "method": "POST",
        "route": "/v1/jobs",
        "status": 202,
        "project_id": project,
        "job_id": job["id"],
    }
    assert second["message"] == "GET /v1/jobs/<id> 200" and second["request_id"] == "mine"
    assert second["job_id"] == job["id"]


def test_the_repeat_of_a_submission_is_told_with_the_job_of_the_first(api: Caller) -> None:
    with written() as lines:
        for _ in range(2):
            body = {"input": {"prompt": "a cat"}}
            api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "once"})
    first, second = lines.as_json(logger="api.requests")
    assert first["job_id"] == second["job_id"]


@pytest.mark.parametrize("path", ["/no/such/canary", "/v1/jobs/canary", "/v1/jobs?model=canary", "/v1/jobs/job_canary"])
def test_neither_path_nor_query_is_told(api: Caller, path: str) -> None:
    with written() as lines:
        api.get(path)
        api.open(path, method="CANARY")
    assert len(lines.as_json(logger="api.requests")) == 2 and "canary" not in lines.getvalue().lower()


def test_who_has_no_key_is_told_of_without_a_project(stranger: Caller, submit: Submit) -> None:
    with written() as lines:
        stranger.get("/v1/jobs")
    [line] = lines.as_json(logger="api.requests")
    assert line["status"] == 401 and "project_id" not in line


def test_a_stream_is_told_of_when_it_ends(api: Caller, submit: Submit) -> None:
    job = submit()
    api.post(f"/v1/jobs/{job['id']}/cancel")
    with written() as lines:
        answer = api.get(f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"})
        assert "event: snapshot" in answer.text
        answer.close()
    [line] = lines.as_json(logger="api.requests")
    assert line["route"] == "/v1/jobs/<id>/events" and line["job_id"] == job["id"]


def test_a_fault_and_its_request_have_the_same_id(
    api: Caller, app: OpenAPI, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a canary that sings"

    def broken(*_: object) -> None:
        raise ValueError(prompt)

    monkeypatch.setattr("api.jobs.idempotency.first_of", broken)
    with written() as lines:
        answer = api.post("/v1/jobs", json={"input": {"prompt": prompt}})
    fault, request = lines.as_json(logger="api.")  # not what a thread of another test may say of its Redis
    assert answer.status_code == 500 and request["status"] == 500
    assert fault["request_id"] == request["request_id"] == answer.json["request_id"]
    assert "ValueError" in fault["exception"] and prompt not in lines.getvalue()
