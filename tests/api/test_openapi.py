"""The OpenAPI document and the page that shows it."""

import hashlib
import re
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import validate

from tests.api.people import PICTURE, Caller, Submit, Worker
from tests.api.test_submit_job import WRONG_BODIES


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here."""
    return sqlite_url


@pytest.fixture
def document(stranger: Caller) -> dict[str, Any]:
    return dict(stranger.get("/openapi.json").json)


def matches(document: dict[str, Any], name: str, value: object) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return bool(Draft202012Validator(schema).is_valid(value))


def test_it_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_it_has_every_route_and_no_other(document: dict[str, Any], app: OpenAPI) -> None:
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert described == {
        ("/v1/jobs", "post"),
        ("/v1/jobs", "get"),
        ("/v1/jobs/{id}", "get"),
        ("/v1/jobs/{id}", "delete"),
        ("/v1/jobs/{id}/cancel", "post"),
        ("/v1/jobs/{id}/retry", "post"),
        ("/v1/jobs/{id}/image", "get"),
        ("/v1/jobs/{id}/attempts", "get"),
        ("/v1/jobs/{id}/events", "get"),
        ("/v1/events", "get"),
        ("/v1/jobs/{id}/image/link", "post"),
        ("/v1/provenance", "get"),
        ("/v1/jobs/{id}/deliveries", "get"),
        ("/v1/deliveries", "get"),
        ("/v1/deliveries/{id}", "get"),
        ("/v1/deliveries/{id}/redeliver", "post"),
        ("/v1/endpoints", "post"),
        ("/v1/endpoints", "get"),
        ("/v1/endpoints/{id}", "get"),
        ("/v1/endpoints/{id}", "patch"),
        ("/v1/endpoints/{id}", "delete"),
        ("/v1/endpoints/{id}/test", "post"),
        ("/v1/endpoints/{id}/rotate-secret", "post"),
        ("/v1/endpoints/{id}/redeliver", "post"),
        ("/v1/webhook-secret", "get"),
        ("/v1/webhook-secret/rotate", "post"),
        ("/v1/queue", "get"),
        ("/api/v1", "post"),
        ("/v1/models", "get"),
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    }
    served = {rule.rule for rule in app.url_map.iter_rules()}
    assert served - {path.replace("{id}", "<id>") for path, _ in described} == {
        "/openapi.json",
        "/docs",
        "/docs/<any('page.css','page.js','swagger-ui.css','swagger-ui-bundle.js'):name>",
    }


def test_it_refuses_the_bodies_that_we_refuse(document: dict[str, Any], submit: Submit) -> None:
    for body, pointer in WRONG_BODIES:
        said = repr(body)
        beyond_json_schema = "\\ud83d" in said or (pointer == "#/metadata" and "ü" in said) or "\\x00': 1" in said
        if not beyond_json_schema or (pointer == "#/input" and "\\x00" in said):
            assert not matches(document, "SubmitJob", body), body


def test_it_takes_the_bodies_that_we_take(document: dict[str, Any], submit: Submit) -> None:
    for body in (
        {"input": {"prompt": "a cat"}},
        {"input": {"prompt": "猫 😀", "negative_prompt": None, "seed": None, "width": 256.0, "guidance": 30}},
        {"input": {"prompt": "a cat", "negative_prompt": ""}, "deadline_seconds": None, "metadata": {}},
        {"input": {"prompt": "a cat", "num_steps": 8}, "model": "black-forest-labs/flux-1-schnell", "backend": "auto"},
        {"input": {"prompt": "a cat"}, "metadata": {"k" * 64: "v" * 1000}, "deadline_seconds": 604_800},
        {"input": {"prompt": "a cat"}, "webhook": "https://example.com/hook"},
        {"input": {"prompt": "a cat"}, "webhook": {"url": "http://example.com:81", "events": ["job.started"]}},
        {"input": {"prompt": "a cat"}, "webhook": None},
    ):
        assert matches(document, "SubmitJob", body), body
        submit(**body)


def test_answers_are_as_it_says(document: dict[str, Any], api: Caller, submit: Submit, worker: Worker) -> None:
    endpoint = api.post("/v1/endpoints", json={"url": "https://example.com"}).json
    delivery = api.post(f"/v1/endpoints/{endpoint['id']}/test").json
    first, second, third = submit(deadline_seconds=60), submit(), submit()
    worker.succeed(worker.claim())
    worker.fail(worker.claim())
    worker.claim()
    for name, path, status in (
        *(("Job", f"/v1/jobs/{job['id']}", 200) for job in (first, second, third)),
        *(("AttemptList", f"/v1/jobs/{job['id']}/attempts", 200) for job in (first, second, third)),
        ("JobList", "/v1/jobs?limit=2", 200),
        *(("EventList", f"/v1/jobs/{job['id']}/events", 200) for job in (first, second, third)),
        ("EventList", "/v1/events", 200),
        ("Endpoint", f"/v1/endpoints/{endpoint['id']}", 200),
        ("EndpointList", "/v1/endpoints", 200),
        ("Delivery", f"/v1/deliveries/{delivery['id']}", 200),
        ("DeliveryList", "/v1/deliveries", 200),
        ("WebhookSecret", "/v1/webhook-secret", 200),
        ("Provenance", f"/v1/provenance?sha256={hashlib.sha256(PICTURE).hexdigest()}", 200),
        ("Provenance", f"/v1/provenance?sha256={'0' * 64}", 200),
        ("QueueList", "/v1/queue", 200),
        ("ModelList", "/v1/models", 200),
        ("Health", "/healthz", 200),
        ("Readiness", "/readyz", 200),
        ("Problem", "/v1/nothing", 404),
        ("Problem", "/v1/jobs?limit=x", 422),
    ):
        response = api.get(path)
        assert response.status_code == status
        assert matches(document, name, response.json), (name, response.text)
        schema = document["components"]["schemas"][name]
        assert set(response.json) <= set(schema["properties"])


def test_queries_are_described_as_they_are_sent(document: dict[str, Any]) -> None:
    parameters = {parameter["name"]: parameter for parameter in document["paths"]["/v1/jobs"]["get"]["parameters"]}
    names = "status backend model created_after created_before metadata limit cursor"
    assert " ".join(parameters) == names
    assert parameters["metadata"]["style"] == "deepObject" and parameters["metadata"]["explode"] is True
    assert parameters["metadata"]["schema"]["propertyNames"] == {"minLength": 1, "maxLength": 64}
    assert parameters["limit"]["schema"]["maximum"] == 100 and parameters["limit"]["schema"]["default"] == 20
    assert all("null" not in repr(parameter) and "None" not in repr(parameter) for parameter in parameters.values())


def test_the_headers_that_are_read_are_described(document: dict[str, Any]) -> None:
    told = {
        (path, method): [each["name"] for each in operation.get("parameters", []) if each["in"] == "header"]
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert {place: names for place, names in told.items() if names} == {
        ("/v1/jobs", "post"): ["Idempotency-Key", "Prefer"],
        ("/v1/jobs/{id}/retry", "post"): ["Idempotency-Key", "Prefer"],
        ("/v1/jobs/{id}", "get"): ["If-None-Match", "Prefer"],
        ("/v1/jobs/{id}/image", "get"): ["If-Match", "If-None-Match", "Range"],
        ("/v1/jobs/{id}/events", "get"): ["Last-Event-ID"],
        ("/v1/events", "get"): ["Last-Event-ID"],
        ("/api/v1", "post"): ["Idempotency-Key"],
    }


def test_the_page_loads_nothing_from_elsewhere(stranger: Caller) -> None:
    page = stranger.get("/docs")
    assert page.status_code == 200 and page.content_type == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["connect-src"] == "'self'"
    assert not any("http" in value or "*" in value for value in policy.values())
    assert "<script>" not in page.text and "style=" not in page.text and "onclick" not in page.text
    loads = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert loads and not any(load.startswith(("http", "//")) for load in loads)
    for load in loads:
        if not load.startswith("data:"):
            answer = stranger.get(f"/{load}")
            assert answer.status_code == 200 and answer.data, load
    script = stranger.get("/docs/page.js").text
    assert "http" not in script and "validatorUrl: null" in script
    styles = stranger.get("/docs/swagger-ui.css").text
    assert not re.search(r"url\(['\"]?(?:https?:)?//", styles) and "@import" not in styles
