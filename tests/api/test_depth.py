"""A queue that is full: who is turned away, with what, and who is not."""

import threading
import time
from typing import Any

import pytest

from api.depth import Depth
from api.errors import Refused
from api.forecast import Forecast
from api.services import Services
from shared.breaker import Breaker, Reason, key, written
from shared.catalogue import DEFAULT_MODEL
from shared.settings import Settings
from tests.api.people import KEY, Caller, Submit, Worker
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.lives import many
from tests.service import eventually
from worker import presence

BODY = {"input": {"prompt": "a cat"}}


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return Settings(
        database_url=database_url, redis_url=redis_url, api_key=KEY, secret_key="s" * 32, max_queued=3, sandbox=True
    )


@pytest.fixture(autouse=True)
def always_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Depth, "FAR_SECONDS", 0.0)
    monkeypatch.setattr(Depth, "NEAR_SECONDS", 0.0)
    monkeypatch.setattr(Depth, "REST", 0)


def fill(submit: Submit) -> list[dict[str, Any]]:
    return [submit() for _ in range(3)]


def test_beyond_the_bound_a_submission_is_refused_and_nothing_is_accepted(api: Caller, submit: Submit) -> None:
    fill(submit)
    answer = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json["code"], answer.json["retryable"]) == (429, "queue_full", True)
    assert answer.json["detail"] == "3 jobs or more wait for dataoorts already. Nothing was accepted."
    assert len(api.get("/v1/jobs").json["data"]) == 3
    assert int(answer.headers["Retry-After"]) >= 1


def test_what_runs_takes_no_place_and_what_ended_gives_its_own_back(
    api: Caller, submit: Submit, worker: Worker
) -> None:
    jobs = fill(submit)
    worker.claim()
    assert api.post("/v1/jobs", json=BODY).status_code == 202
    assert api.post("/v1/jobs", json=BODY).status_code == 429
    api.post(jobs[1]["urls"]["cancel"])
    assert api.post("/v1/jobs", json=BODY).status_code == 202


def test_a_repeat_of_what_was_accepted_is_answered_although_the_queue_is_full(api: Caller) -> None:
    first = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"})
    for _ in range(2):
        api.post("/v1/jobs", json=BODY)
    again = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"})
    assert again.status_code == 202 and again.json["id"] == first.json["id"]


def test_a_refused_submission_keeps_no_key(api: Caller, submit: Submit, worker: Worker) -> None:
    fill(submit)
    refused = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"})
    worker.claim()
    taken = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"})
    assert (refused.status_code, taken.status_code) == (429, 202)
    assert "Idempotent-Replayed" not in taken.headers


def test_a_retry_that_would_make_a_job_is_refused_and_one_that_finds_one_is_not(
    api: Caller, submit: Submit, worker: Worker
) -> None:
    canceled = submit()
    api.post(canceled["urls"]["cancel"])
    made = api.post(f"{canceled['urls']['self']}/retry")
    assert made.status_code == 202
    other = submit()
    api.post(other["urls"]["cancel"])
    for _ in range(2):
        submit()
    assert api.post(f"{canceled['urls']['self']}/retry").status_code == 200
    refused = api.post(f"{other['urls']['self']}/retry")
    assert (refused.status_code, refused.json["code"]) == (429, "queue_full")
    assert len(api.get("/v1/jobs", query_string={"status": "queued"}).json["data"]) == 3


def test_the_vendors_door_says_it_as_the_vendor_does(api: Caller, submit: Submit) -> None:
    fill(submit)
    body = {"model": DEFAULT_MODEL, "data": {"prompt": "a cat"}}
    answer = api.post("/api/v1", json=body)
    assert answer.status_code == 429 and answer.json["errors"][0]["code"] == 3040
    assert "Retry-After" in answer.headers


@pytest.mark.parametrize(
    ("slots", "seconds", "waiting", "after"), [(2, 30.0, 6, 60), (2, 30.0, 4, 30), (0, None, 6, 60), (10, 0.5, 3, 1)]
)
def test_retry_after_is_what_the_workers_need_for_those_who_are_too_many(
    api: Caller, services: Services, slots: int, seconds: float | None, waiting: int, after: int
) -> None:
    if slots:
        with services.database.write() as tx:
            presence.show(tx, "w", "dataoorts", slots, seconds)
    many(services.database, waiting)
    services.depth._most = 3
    answer = api.post("/v1/jobs", json=BODY)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, str(after))


def test_while_the_breaker_is_open_nobody_is_told_to_come_back_before_it_may_close(
    api: Caller, services: Services, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", 3600.0)  # the worker is not missed, however long this takes
    with services.database.write() as tx:
        presence.show(tx, "w", "dataoorts", 200, 2.0)
    fill(submit)
    assert api.post("/v1/jobs", json=BODY).headers["Retry-After"] == "2"
    moment, _ = services.redis.time()
    services.redis.set(key("dataoorts"), written(Breaker(1, Reason.rate_limited, until=moment + 800.0)))

    def told() -> int:
        return int(api.post("/v1/jobs", json=BODY).headers["Retry-After"])

    eventually("it is heard of", lambda: told() > 2)
    assert 700 < told() <= 802


def test_places_that_are_taken_at_once_are_all_counted_and_the_last_one_goes_once(services: Services) -> None:
    """As by retries, which choose first and take their place later."""

    class Slow(dict[str, int]):
        def __getitem__(self, backend: str) -> int:
            known = super().__getitem__(backend)
            time.sleep(0.001)  # others come between
            return known

    depth, refused = services.depth, []
    depth._known, depth._most = Slow(dataoorts=0), 20

    def take() -> None:
        for _ in range(5):
            try:
                depth.take_place("dataoorts")
            except Refused as refusal:
                refused.append(refusal.code)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (depth.known("dataoorts"), refused) == (20, ["queue_full"] * 20)


def test_the_queue_is_counted_now_and_then_and_our_own_are_added_meanwhile(
    api: Caller, submit: Submit, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.depth.look()
    monkeypatch.setattr(services.depth, "_look_at", time.monotonic() + 3600)
    fill(submit)
    assert api.post("/v1/jobs", json=BODY).status_code == 429
