"""POST /v1/jobs."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from api.app import build, open_services
from api.compat import dataoorts
from api.services import Services
from shared.inspector import Inspector
from shared.settings import Settings
from shared.tables import Status, events, jobs
from tests.api.people import KEY, Caller, Submit, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.servers import RedisServer
from tests.service import eventually

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
LCM = "lykon/dreamshaper-8-lcm"
HOOK = "https://example.com/hook"

WRONG_BODIES: list[tuple[Any, str]] = [
    ({}, "#/input"),
    ({"input": {}}, "#/input/prompt"),
    ({"input": {"prompt": "a"}}, "#/input/prompt"),
    ({"input": {"prompt": "  "}}, "#/input/prompt"),
    ({"input": {"prompt": " \u00a0\u3000\ufeff\x85\n\t\x1c"}}, "#/input/prompt"),
    ({"input": {"prompt": " a  "}}, "#/input/prompt"),
    ({"input": {"prompt": "a" * 2049}}, "#/input/prompt"),
    ({"input": {"prompt": None}}, "#/input/prompt"),
    ({"input": {"prompt": ["a cat"]}}, "#/input/prompt"),
    ({"input": {"prompt": "NUL \0"}}, "#/input/prompt"),
    ({"input": {"prompt": "half \ud83d"}}, "#/input/prompt"),
    ({"input": {"prompt": "a cat", "width": 248}}, "#/input/width"),
    ({"input": {"prompt": "a cat", "width": 257}}, "#/input/width"),
    ({"input": {"prompt": "a cat", "width": 2056}}, "#/input/width"),
    ({"input": {"prompt": "a cat", "width": "512"}}, "#/input/width"),
    ({"input": {"prompt": "a cat", "width": None}}, "#/input/width"),
    ({"input": {"prompt": "a cat", "height": 512.5}}, "#/input/height"),
    ({"input": {"prompt": "a cat", "num_steps": True}}, "#/input/num_steps"),
    ({"input": {"prompt": "a cat", "num_steps": 21}}, "#/input/num_steps"),
    ({"input": {"prompt": "a cat", "guidance": 30.01}}, "#/input/guidance"),
    ({"input": {"prompt": "a cat", "guidance": "7"}}, "#/input/guidance"),
    ({"input": {"prompt": "a cat", "guidance": 10**400}}, "#/input/guidance"),
    ({"input": {"prompt": "a cat", "seed": -1}}, "#/input/seed"),
    ({"input": {"prompt": "a cat", "seed": 2**32}}, "#/input/seed"),
    ({"input": {"prompt": "a cat", "seed": 10**400}}, "#/input/seed"),
    ({"input": {"prompt": "a cat", "a/b~c d": 1}}, "#/input/a~1b~0c%20d"),
    ({"input": {"prompt": "a cat", "\0": 1}}, "#/input"),
    ({"input": {"prompt": "a cat"}, "model": "unknown"}, "#/model"),
    ({"input": {"prompt": "a cat"}, "model": None}, "#/model"),
    ({"input": {"prompt": "a cat"}, "model": {}}, "#/model"),
    ({"input": {"prompt": "a cat"}, "backend": "diffusers"}, "#/backend"),
    ({"input": {"prompt": "a cat"}, "deadline_seconds": 0}, "#/deadline_seconds"),
    ({"input": {"prompt": "a cat"}, "deadline_seconds": 604_801}, "#/deadline_seconds"),
    ({"input": {"prompt": "a cat"}, "metadata": {"a": 1}}, "#/metadata/a"),
    ({"input": {"prompt": "a cat"}, "metadata": {"": "x"}}, "#/metadata/"),
    ({"input": {"prompt": "a cat"}, "metadata": {"k" * 65: "x"}}, "#/metadata/" + "k" * 65),
    ({"input": {"prompt": "a cat"}, "metadata": {str(n): "x" for n in range(17)}}, "#/metadata"),
    ({"input": {"prompt": "a cat"}, "metadata": {"a": "x" * 1024, "b": "ü" * 512}}, "#/metadata"),
    ({"input": {"prompt": "a cat"}, "webhook": ""}, "#/webhook"),
    ({"input": {"prompt": "a cat"}, "webhook": "example.com"}, "#/webhook"),
    ({"input": {"prompt": "a cat"}, "webhook": "ftp://example.com"}, "#/webhook"),
    ({"input": {"prompt": "a cat"}, "webhook": "https://example.com/" + "x" * 2048}, "#/webhook"),
    ({"input": {"prompt": "a cat"}, "webhook": True}, "#/webhook"),
    ({"input": {"prompt": "a cat"}, "webhook": ["https://example.com"]}, "#/webhook"),
    ({"input": {"prompt": "a cat"}, "webhook": {}}, "#/webhook/url"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": None}}, "#/webhook/url"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": "gopher://example.com"}}, "#/webhook/url"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": HOOK, "events": []}}, "#/webhook/events"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": HOOK, "events": None}}, "#/webhook/events"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": HOOK, "events": "job.failed"}}, "#/webhook/events"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": HOOK, "events": ["job.failed"] * 2}}, "#/webhook/events"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": HOOK, "events": ["job.done"]}}, "#/webhook/events/0"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": HOOK, "events": ["endpoint.test"]}}, "#/webhook/events/0"),
    ({"input": {"prompt": "a cat"}, "webhook": {"url": HOOK, "secret": "x"}}, "#/webhook/secret"),
    ({"input": {"prompt": "a cat"}, "priority": None}, "#/priority"),
    ([], "#"),
    ("a cat", "#"),
    ('{"input": {"prompt": "a cat"}}', "#"),
    (None, "#"),
]


@pytest.fixture
def rejecting(api: Caller, services: Services) -> Iterator[Caller]:
    """A client whose requests leave no job behind."""
    yield api
    with services.database.read() as connection:
        assert connection.execute(select(jobs.c.id)).all() == []


def test_a_prompt_is_enough_and_the_rest_is_filled_in(api: Caller, services: Services) -> None:
    response = api.post("/v1/jobs", json={"input": {"prompt": "futuristic spacecraft"}})
    job = response.json
    assert response.status_code == 202 and response.content_type == "application/json"
    assert response.headers["Location"] == job["urls"]["self"] == f"http://localhost/v1/jobs/{job['id']}"
    assert response.headers["Retry-After"] == "1" and response.headers["Cache-Control"] == "no-store"
    assert job["status"] == "queued" and job["sequence"] == 1 and job["model"] == SDXL and job["backend"] == "auto"
    seed = job["input"].pop("seed")
    assert type(seed) is int and 0 <= seed < 2**32
    assert job["input"] == {
        "prompt": "futuristic spacecraft",
        "negative_prompt": None,
        "width": 512,
        "height": 512,
        "num_steps": 20,
        "guidance": 7.5,
    }
    with services.database.read() as connection:
        row = connection.execute(select(jobs)).one()
        assert (row.id, row.status, row.backend, row.backend_asked) == (job["id"], Status.queued, "dataoorts", "auto")
        assert row.input == job["input"] | {"seed": seed}
        assert connection.execute(select(events.c.type)).scalars().all() == ["job.queued"]


def test_what_is_given_is_kept_as_given(submit: Submit) -> None:
    given = {"prompt": "猫 😀 'quoted'", "negative_prompt": "dogs", "width": 256, "height": 2048}
    given |= {"num_steps": 1, "guidance": 0, "seed": 2**32 - 1}
    job = submit(model=SDXL, input=given, backend="dataoorts", metadata={"ticket": "ABC-1", "ü": ""})
    assert job["input"] == given and job["backend"] == "dataoorts" and job["metadata"] == {"ticket": "ABC-1", "ü": ""}


@on_sqlite
def test_seeds_are_drawn_anew_for_each_job(submit: Submit) -> None:
    assert len({submit()["input"]["seed"] for _ in range(5)}) == 5


@on_sqlite
def test_a_model_without_a_seed_gets_none_drawn(submit: Submit, api: Caller) -> None:
    assert "seed" not in submit(model=LCM)["input"]
    response = api.post("/v1/jobs", json={"model": LCM, "input": {"prompt": "a cat", "seed": 1}})
    assert response.json["errors"] == [{"pointer": "#/input/seed", "detail": "There is no such field."}]


@on_sqlite
def test_an_empty_negative_prompt_is_none(submit: Submit) -> None:
    assert submit(input={"prompt": "a cat", "negative_prompt": ""})["input"]["negative_prompt"] is None


@on_sqlite
def test_a_whole_number_may_be_written_with_a_point(submit: Submit) -> None:
    job = submit(input={"prompt": "a cat", "width": 512.0, "guidance": 5})
    assert job["input"]["width"] == 512 and type(job["input"]["width"]) is int and job["input"]["guidance"] == 5


def test_a_deadline_is_kept_as_a_moment(submit: Submit) -> None:
    assert submit()["deadline_at"] is None
    job = submit(deadline_seconds=3600)
    assert job["deadline_at"][:11] >= job["created_at"][:11] and job["deadline_at"][11:13] != job["created_at"][11:13]


@on_sqlite
def test_a_ticket_is_rung_after_the_commit(submit: Submit, redis_server: RedisServer) -> None:
    submit()
    eventually("a ticket comes", lambda: redis_server.client().llen("generate.dataoorts"), 60)


@on_sqlite
def test_a_wrong_body_is_refused_and_the_field_named(rejecting: Caller) -> None:
    for body, pointer in WRONG_BODIES:
        response = rejecting.post("/v1/jobs", data=json.dumps(body), content_type="application/json")
        assert response.status_code == 422 and response.json["code"] == "invalid", (body, response.text)
        assert [error["pointer"] for error in response.json["errors"]] == [pointer], (body, response.text)


@on_sqlite
def test_each_of_several_mistakes_is_named(rejecting: Caller) -> None:
    response = rejecting.post("/v1/jobs", json={"input": {"prompt": "", "width": 1}, "nonsense": 1})
    pointers = {error["pointer"] for error in response.json["errors"]}
    assert pointers == {"#/input/prompt", "#/input/width", "#/nonsense"}


@on_sqlite
def test_the_prompt_is_not_repeated_in_an_error(rejecting: Caller) -> None:
    response = rejecting.post("/v1/jobs", json={"input": {"prompt": "secret plans" * 200}})
    assert response.status_code == 422 and "secret" not in response.text


@on_sqlite
def test_a_query_parameter_is_refused(rejecting: Caller) -> None:
    response = rejecting.post("/v1/jobs?dry_run=1", json={"input": {"prompt": "a cat"}})
    assert response.status_code == 422 and response.json["errors"][0]["parameter"] == "dry_run"


def stored_webhook(services: Services, job_id: str) -> Any:
    with services.database.read() as connection:
        return connection.execute(select(jobs.c.webhook).where(jobs.c.id == job_id)).scalar_one()


def test_a_webhook_is_kept_with_the_events_that_it_is_told_of(submit: Submit, services: Services) -> None:
    ends = ["job.succeeded", "job.failed", "job.canceled", "job.expired"]
    for asked, kept in (
        (HOOK, {"url": HOOK, "events": ends}),
        ({"url": HOOK}, {"url": HOOK, "events": ends}),
        ({"url": HOOK, "events": ["job.started", "job.queued"]},) * 2,
        (None, None),
    ):
        job = submit(webhook=asked)
        assert stored_webhook(services, job["id"]) == kept and "webhook" not in job
    assert stored_webhook(services, submit()["id"]) is None
    with services.database.read() as connection:
        without = connection.scalars(select(jobs.c.id).where(jobs.c.webhook.is_(None))).all()
    assert len(without) == 2  # NULL, not a JSON null


def test_a_job_that_is_submitted_again_keeps_its_webhook(api: Caller, submit: Submit, services: Services) -> None:
    first = submit(webhook={"url": HOOK, "events": ["job.failed"]})
    assert api.post(f"/v1/jobs/{first['id']}/cancel").status_code == 200
    again = api.post(f"/v1/jobs/{first['id']}/retry").json
    assert stored_webhook(services, again["id"]) == {"url": HOOK, "events": ["job.failed"]}
    assert api.post(f"/v1/jobs/{again['id']}/cancel").status_code == 200
    assert api.delete(f"/v1/jobs/{again['id']}").status_code == 204
    assert stored_webhook(services, again["id"]) == {"url": HOOK, "events": ["job.failed"]}


@on_sqlite
def test_another_webhook_makes_it_another_request(api: Caller) -> None:
    def send(**body: Any) -> Any:
        given = {"input": {"prompt": "a cat"}} | body
        return api.post("/v1/jobs", json=given, headers={"Idempotency-Key": "k"})

    first = send(webhook=HOOK)
    again = send(webhook=HOOK)
    assert (first.status_code, again.status_code) == (202, 202) and first.json["id"] == again.json["id"]
    for other in ({}, {"webhook": HOOK + "s"}, {"webhook": {"url": HOOK, "events": ["job.failed"]}}):
        assert send(**other).json["code"] == "idempotency_key_reused", other


@on_sqlite
def test_the_vendors_door_takes_no_webhook(api: Caller) -> None:
    body = {"model": SDXL, "data": {"prompt": "a cat"}, "webhook": HOOK}
    assert api.post("/api/v1", json=body).status_code == 400  # as the vendor says it


@on_sqlite
def test_no_job_waits_longer_than_the_operator_lets_it(
    settings: Settings, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted, submitted again, and by the vendor's door."""
    monkeypatch.setattr(dataoorts, "LONGEST_WAIT", 0.0)
    services = open_services(settings.model_copy(update={"max_wait_seconds": 60}))
    api = client_with(build(replace(services, inspector=inspector)), KEY)
    first = api.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).json
    api.post(first["urls"]["cancel"])
    api.post(f"{first['urls']['self']}/retry")
    api.post("/api/v1", json={"model": SDXL, "data": {"prompt": "a cat"}})
    with services.database.read() as connection:
        rows = connection.execute(select(jobs.c.created_at, jobs.c.queue_until)).all()
    services.close()
    assert len(rows) == 3
    for row in rows:
        assert 59 < (row.queue_until - row.created_at).total_seconds() < 61
