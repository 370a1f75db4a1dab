"""`Idempotency-Key`, on POST /v1/jobs and on a retry."""

import json
import threading
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from sqlalchemy import func, select, update

from api import idempotency
from api.services import Services
from shared import jobs as life
from shared.database import Database, now
from shared.tables import KEYS_KEPT_SECONDS, attempts, idempotency_keys, jobs
from tests.api.people import KEY, Caller, Submit, Worker, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here

BODY = {"input": {"prompt": "a cat"}}


def post(api: Caller, key: str, body: Any = BODY, path: str = "/v1/jobs", **headers: str) -> Any:
    return api.post(path, json=body, headers={"Idempotency-Key": key, **headers})


def count(database: Database, table: Any = jobs) -> int:
    with database.read() as connection:
        return int(connection.scalar(select(func.count()).select_from(table)) or 0)


def reused(response: Any) -> bool:
    return bool(response.status_code == 422 and response.json["code"] == "idempotency_key_reused")


def test_the_same_request_gets_the_same_job_as_it_is_now(api: Caller, services: Services, worker: Worker) -> None:
    first = post(api, "k1")
    assert first.status_code == 202 and "Idempotent-Replayed" not in first.headers
    again = post(api, "k1")
    assert again.status_code == 202 and again.json == first.json | {"queue_position": 1}
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"] and again.headers["Retry-After"]
    worker.succeed(worker.claim())
    ended = post(api, "k1")
    assert ended.status_code == 200 and ended.json["id"] == first.json["id"] and ended.json["status"] == "succeeded"
    assert ended.headers["Idempotent-Replayed"] == "true" and "Retry-After" not in ended.headers
    assert count(services.database) == 1


def test_another_request_with_the_key_is_refused_and_changes_nothing(
    api: Caller, services: Services, submit: Submit
) -> None:
    first = post(api, "k1").json
    job = submit()
    api.post(job["urls"]["cancel"])
    for body, path in (
        ({"input": {"prompt": "a dog"}}, "/v1/jobs"),
        (BODY | {"metadata": {"a": "b"}}, "/v1/jobs"),
        ({"input": {"prompt": "a cat", "seed": 1}}, "/v1/jobs"),
        (None, f"/v1/jobs/{job['id']}/retry"),
    ):
        response = api.post(path, headers={"Idempotency-Key": "k1"}, **({} if body is None else {"json": body}))
        assert reused(response), response.text
        assert response.content_type == "application/problem+json" and not response.json["retryable"]
    assert post(api, "k1").json["id"] == first["id"] and count(services.database) == 2


@on_sqlite
def test_the_same_request_may_be_written_down_differently(api: Caller) -> None:
    body = {"input": {"prompt": "ün", "width": 512, "guidance": 7}, "metadata": {"a": "1", "b": "2"}}
    first = post(api, "k1", body).json["id"]
    for written in (
        json.dumps(body),
        json.dumps(body, indent=4, ensure_ascii=False),
        '{"metadata":{"b":"2","a":"1"},"input":{"guidance":7.0,"width":512.0,"prompt":"\\u00fcn"}}',
        json.dumps(body | {"backend": "auto", "deadline_seconds": None}),
    ):
        headers = {"Idempotency-Key": "k1", "Content-Type": "application/json"}
        response = api.post("/v1/jobs", data=written, headers=headers)
        assert response.status_code == 202 and response.json["id"] == first, written


@on_sqlite
@pytest.mark.parametrize("key", ["", '""', "a b", "a\tb", "é", "k" * 256, '"' + "k" * 256 + '"', "\x7f"])
def test_a_bad_key_is_refused_and_named(api: Caller, services: Services, key: str) -> None:
    response = post(api, key)
    assert response.status_code == 422 and response.json["code"] == "invalid"
    assert [error["parameter"] for error in response.json["errors"]] == ["Idempotency-Key"]
    assert count(services.database) == 0


@on_sqlite
def test_quoted_and_bare_are_one_key(api: Caller) -> None:
    for bare in ("k", "k" * 255, "!~,;=", '"'):
        first = post(api, f'"{bare}"').json["id"]
        assert post(api, bare).json["id"] == first
    assert post(api, "K").json["id"] != post(api, "k").json["id"]


def test_each_project_has_keys_of_its_own(api: Caller, neighbour: Caller) -> None:
    own = post(api, "k1").json["id"]
    theirs = post(neighbour, "k1", {"input": {"prompt": "a dog"}})
    assert theirs.status_code == 202 and theirs.json["id"] != own
    assert "Idempotent-Replayed" not in theirs.headers


def test_a_refused_request_keeps_no_key(api: Caller, services: Services, submit: Submit) -> None:
    open_one = submit()["id"]
    for body, path, status in (
        ({"input": {"prompt": ""}}, "/v1/jobs", 422),
        ({}, f"/v1/jobs/{open_one}/retry", 409),
        ({}, "/v1/jobs/job_" + "0" * 32 + "/retry", 404),
    ):
        assert post(api, "k1", body, path).status_code == status
    assert count(services.database, idempotency_keys) == 0
    assert "Idempotent-Replayed" not in post(api, "k1").headers


def test_a_submission_that_broke_off_keeps_no_key_and_no_job(
    api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:

        def fail(*args: object) -> None:
            raise ZeroDivisionError

        broken.setattr(idempotency, "keep", fail)
        assert post(api, "k1").status_code == 500
    assert count(services.database) == count(services.database, idempotency_keys) == 0
    assert post(api, "k1").status_code == 202


def test_after_a_day_the_key_is_free(api: Caller, services: Services) -> None:
    def age(seconds: float) -> None:
        with services.database.write() as tx:
            tx.execute(update(idempotency_keys).values(created_at=now(-seconds)))

    first = post(api, "k1").json["id"]
    age(KEYS_KEPT_SECONDS - 60)
    assert post(api, "k1").json["id"] == first and reused(post(api, "k1", {"input": {"prompt": "a dog"}}))
    age(KEYS_KEPT_SECONDS + 60)
    fresh = post(api, "k1", {"input": {"prompt": "a dog"}})
    assert fresh.status_code == 202 and fresh.json["id"] != first and "Idempotent-Replayed" not in fresh.headers
    assert post(api, "k1", {"input": {"prompt": "a dog"}}).json["id"] == fresh.json["id"]
    assert reused(post(api, "k1"))


def test_a_retry_is_repeated_safely_after_its_job_has_ended(api: Caller, submit: Submit, worker: Worker) -> None:
    """Without the key, a repeat that comes after the end would make, and buy, one more."""
    job = submit()
    api.post(job["urls"]["cancel"])
    path = f"/v1/jobs/{job['id']}/retry"
    first = api.post(path, headers={"Idempotency-Key": "k1"})
    assert first.status_code == 202
    worker.fail(worker.claim())
    again = api.post(path, headers={"Idempotency-Key": "k1"})
    assert again.status_code == 200 and again.json["id"] == first.json["id"] and again.json["status"] == "failed"
    assert again.headers["Idempotent-Replayed"] == "true"
    assert api.post(path).json["id"] != first.json["id"]


@on_sqlite
def test_a_repeat_may_prefer_to_wait(api: Caller, worker: Worker) -> None:
    post(api, "k1")
    response = post(api, "k1", Prefer="wait=1")
    assert response.status_code == 202 and response.headers["Preference-Applied"] == "wait=1"
    worker.succeed(worker.claim())
    response = post(api, "k1", Prefer="wait=60")
    assert response.status_code == 200 and response.headers["Idempotent-Replayed"] == "true"


@on_sqlite
def test_a_repeat_rings_no_bell(api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[str] = []
    monkeypatch.setattr(services.bell, "ring", rung.append)
    post(api, "k1"), post(api, "k1")
    assert rung == ["dataoorts"]


@on_sqlite
def test_the_job_of_a_key_whose_data_were_removed_is_shown_as_it_is(api: Caller) -> None:
    job = post(api, "k1").json
    api.post(job["urls"]["cancel"])
    assert api.delete(job["urls"]["self"]).status_code == 204
    response = post(api, "k1")
    assert response.status_code == 200 and response.json["data_removed"] and response.json["input"] == {}


def test_fifty_twins_at_once_make_one_job(app: OpenAPI, services: Services) -> None:
    answers: list[Any] = []
    start = threading.Barrier(50)

    def ask() -> None:
        api = client_with(app, KEY)
        start.wait(30)
        answers.append(post(api, "k1"))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [202] * 50
    assert len({answer.json["id"] for answer in answers}) == 1
    assert [answer.headers.get("Idempotent-Replayed") for answer in answers].count(None) == 1
    assert count(services.database) == 1 and count(services.database, attempts) == 0


def test_a_twin_waits_for_the_commit_of_the_first_and_takes_over_if_there_is_none(
    app: OpenAPI, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has taken the key and breaks off: the twin, which stood in line meanwhile, makes the job."""
    inside, leave = threading.Event(), threading.Event()
    submit = life.submit
    answers: dict[str, Any] = {}

    def breaks_off(*args: Any, **kwargs: Any) -> Any:
        if not inside.is_set():
            inside.set()
            leave.wait(30)
            raise ZeroDivisionError
        return submit(*args, **kwargs)

    def ask(name: str) -> None:
        answers[name] = post(client_with(app, KEY), "k1")

    monkeypatch.setattr(life, "submit", breaks_off)
    first, twin = (threading.Thread(target=ask, args=(name,)) for name in ("first", "twin"))
    first.start()
    assert inside.wait(30)
    twin.start()
    twin.join(0.3)
    assert twin.is_alive(), "the twin did not wait"
    leave.set()
    first.join()
    twin.join()
    assert answers["first"].status_code == 500
    assert answers["twin"].status_code == 202 and "Idempotent-Replayed" not in answers["twin"].headers
    assert count(services.database) == 1
