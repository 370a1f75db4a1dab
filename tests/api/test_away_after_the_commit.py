"""The database goes away just after it took a job: its client learns all the same that there is one, and which."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from api.forecast import Forecast
from api.services import Services
from shared.tables import jobs
from tests.api.people import Caller, Submit, on_sqlite

pytestmark = on_sqlite

BODY = {"input": {"prompt": "a cat"}}
AWAY = [OperationalError("SELECT", {}, Exception("it is gone")), PoolTimeout("no connection is free")]
PREFERENCES: list[dict[str, str]] = [{}, {"Prefer": "wait=60"}]


@pytest.fixture(autouse=True)
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", -1.0)


@contextmanager
def gone_after_the_commit(services: Services, error: Exception = AWAY[0]) -> Iterator[None]:
    database = services.database
    write = database.write

    def read() -> NoReturn:
        raise error

    @contextmanager
    def write_once() -> Iterator[Connection]:
        with write() as tx:
            yield tx
        patch.setattr(database, "read", read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "write", write_once)
        yield


def count(services: Services) -> int:
    with services.database.read() as connection:
        return connection.scalar(select(func.count()).select_from(jobs)) or 0


def check(response: Any, status: int = 202) -> None:
    assert response.status_code == status, response.text
    assert response.headers["Location"] == response.json["urls"]["self"] and response.json["status"] == "queued"
    assert response.headers["Retry-After"] == "1" and response.headers["Vary"] == "Prefer"


@pytest.mark.parametrize("error", AWAY, ids=["gone", "no connection"])
@pytest.mark.parametrize("headers", PREFERENCES, ids=["at once", "waiting"])
def test_a_submission_that_was_taken_says_so(
    api: Caller, services: Services, headers: dict[str, str], error: Exception
) -> None:
    api.get("/v1/jobs")  # the key is known from now on
    with gone_after_the_commit(services, error):
        response = api.post("/v1/jobs", json=BODY, headers=headers)
    check(response)
    assert api.get(response.headers["Location"]).json["id"] == response.json["id"] and count(services) == 1


@pytest.mark.parametrize("headers", PREFERENCES, ids=["at once", "waiting"])
def test_a_repeat_with_its_key_gets_its_job(api: Caller, services: Services, headers: dict[str, str]) -> None:
    headers = headers | {"Idempotency-Key": "k1"}
    first = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k1"})
    with gone_after_the_commit(services):
        again = api.post("/v1/jobs", json=BODY, headers=headers)
    check(again)
    assert again.json["id"] == first.json["id"] and again.headers["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize("headers", PREFERENCES, ids=["at once", "waiting"])
def test_a_retry_that_was_taken_says_so_and_so_does_one_that_finds_it_open(
    api: Caller, services: Services, submit: Submit, headers: dict[str, str]
) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    answers = []
    for status in (202, 200):
        with gone_after_the_commit(services):
            answers.append(api.post(f"{job['urls']['self']}/retry", headers=headers))
        check(answers[-1], status)
    assert answers[0].json["id"] == answers[1].json["id"] != job["id"] and count(services) == 2


def test_at_the_vendors_door_the_error_names_the_job(api: Caller, services: Services) -> None:
    api.get("/v1/jobs")
    body = {"model": "stabilityai/stable-diffusion-xl-base-1.0", "data": {"prompt": "a cat"}}
    with gone_after_the_commit(services):
        response = api.post("/api/v1", json=body)
    assert response.status_code == 503 and response.headers["Retry-After"] == "5"
    assert api.get(f"/v1/jobs/{response.headers['X-Job-Id']}").json["status"] == "queued"


def test_a_job_that_nobody_made_just_now_is_not_told_from_memory(
    api: Caller, services: Services, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = submit()["urls"]["self"]

    def away() -> NoReturn:
        raise AWAY[0]

    monkeypatch.setattr(services.database, "read", away)
    for headers in PREFERENCES:
        assert api.get(url, headers=headers).status_code == 503
