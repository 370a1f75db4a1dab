"""`backend: "auto"`: who is chosen at the submission, what the job says of it, and that nobody waits for the choice."""

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from sqlalchemy import update

from api.app import build, open_services
from api.breaker_watch import BreakerWatch
from api.depth import Depth
from api.forecast import Forecast
from api.services import Services
from shared import announcements
from shared import jobs as life
from shared.breaker import Breaker, BreakerBoard, Reason, State, key, written
from shared.routing import RoutingReason
from shared.settings import Settings
from shared.tables import jobs
from tests.api.people import KEY, Caller, Submit, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.servers import RedisServer
from tests.service import eventually
from worker import presence


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return Settings(
        database_url=database_url,
        redis_url=redis_url,
        api_key=KEY,
        secret_key="s" * 32,
        backends=("dataoorts", "diffusers"),
        sandbox=True,
        max_queued=3,
    )


@pytest.fixture(autouse=True)
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from one submission to the next, and what is asked of Redis is waited for."""
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", -1.0)
    for name in ("FAR_SECONDS", "NEAR_SECONDS", "REST"):
        monkeypatch.setattr(Depth, name, 0)
    monkeypatch.setattr(BreakerWatch, "REST_SECONDS", 0.01)
    monkeypatch.setattr(BreakerWatch, "BELIEVED_SECONDS", 60.0)
    monkeypatch.setattr(BreakerWatch, "PATIENCE_SECONDS", 60.0)


@pytest.fixture
def at_work(services: Services) -> Services:
    """A worker for each backend."""
    with services.database.write() as tx:
        presence.show(tx, "w1", "dataoorts", 200, 2.0)
        presence.show(tx, "w2", "diffusers", 4, 3.0)
    return services


def opens(services: Services, backend: str) -> None:
    """Its breaker, and this process has heard of it."""
    seconds, _ = services.redis.time()
    services.redis.set(key(backend), written(Breaker(1, Reason.failing, until=seconds + 300.0)))

    def known() -> bool:
        services.router.look()
        standing = services.router._watch.of(backend)
        return standing is not None and standing.state == State.open

    eventually("it is known", known)


def routing(job: dict[str, Any]) -> list[tuple[str, str]]:
    return [(choice["backend"], choice["reason"]) for choice in job["routing"]]


def test_the_cheaper_one_makes_it_and_the_job_says_so(at_work: Services, submit: Submit, api: Caller) -> None:
    job = submit()
    assert (job["backend"], job["sandbox"]) == ("auto", False)
    assert job["routing"] == [{"backend": "diffusers", "reason": "cheapest", "at": job["created_at"]}]
    assert api.get(job["urls"]["self"]).json["routing"] == job["routing"]
    assert routing(submit(backend="dataoorts")) == [("dataoorts", "asked")]


def test_one_whose_breaker_is_open_is_passed_by(at_work: Services, submit: Submit) -> None:
    opens(at_work, "diffusers")
    job = submit()
    assert (routing(job), job["sandbox"]) == ([("dataoorts", "breaker_open")], True)
    assert routing(submit(backend="diffusers")) == [("diffusers", "asked")], "who names it waits for it"


def test_one_without_a_worker_is_passed_by(services: Services, submit: Submit) -> None:
    with services.database.write() as tx:
        presence.show(tx, "w1", "dataoorts", 200, 2.0)
    assert routing(submit()) == [("dataoorts", "no_worker")]


def test_a_model_that_one_backend_serves_is_made_there(at_work: Services, submit: Submit) -> None:
    opens(at_work, "dataoorts")
    assert routing(submit(model="lykon/dreamshaper-8-lcm")) == [("dataoorts", "only_one")]


def test_what_waits_decides_before_the_price(at_work: Services, submit: Submit) -> None:
    with at_work.database.write() as tx:
        presence.show(tx, "w2", "diffusers", 1, 6.0)
    assert [routing(submit())[0] for _ in range(3)] == [
        ("diffusers", "cheapest"),
        ("diffusers", "cheapest"),  # it begins in 6 s
        ("dataoorts", "has_room"),  # it would in 12
    ]


def test_only_when_the_queues_of_all_who_can_are_full_is_it_refused(
    at_work: Services, submit: Submit, api: Caller
) -> None:
    at_work.depth._most = 3
    found = [routing(submit())[0] for _ in range(6)]
    assert found == [("diffusers", "cheapest")] * 3 + [("dataoorts", "has_room")] * 3
    refused = api.post("/v1/jobs", json={"input": {"prompt": "a cat"}})
    assert (refused.status_code, refused.json["code"]) == (429, "queue_full")
    assert len(api.get("/v1/jobs").json["data"]) == 6


@on_sqlite
def test_submissions_at_once_fill_the_last_places_and_none_is_refused_before(at_work: Services, app: OpenAPI) -> None:
    at_work.depth._most = 10
    at_work.router.look()
    at_work.depth._look_at = time.monotonic() + 3600  # from here on each knows by what the others took
    answers: list[int] = []

    def submit_some() -> None:
        client = client_with(app, KEY)
        answers.extend(client.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).status_code for _ in range(6))

    threads = [threading.Thread(target=submit_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answers) == [202] * 20 + [429] * 4


def test_a_retry_is_routed_anew(at_work: Services, submit: Submit, api: Caller) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    opens(at_work, "diffusers")
    again = api.post(f"{job['urls']['self']}/retry").json
    assert (routing(again), again["sandbox"]) == ([("dataoorts", "breaker_open")], True)


def test_each_event_tells_the_routing_as_it_was_then(at_work: Services, submit: Submit, api: Caller) -> None:
    job = submit()
    with at_work.database.write() as tx:
        why = RoutingReason.breaker_open
        assert life.reroute(tx, job["id"], source="diffusers", target="dataoorts", reason=why, sandbox=True)
    api.post(job["urls"]["cancel"])
    told = api.get(f"{job['urls']['self']}/events").json["data"]
    choices = [("diffusers", "cheapest"), ("dataoorts", "breaker_open")]
    assert [(event["type"], event["reason"], routing(event["data"])) for event in told] == [
        ("job.queued", None, choices[:1]),
        ("job.queued", "rerouted", choices),
        ("job.canceled", None, choices),
    ]
    first, second = told[1]["data"]["routing"]
    assert first["at"] == job["created_at"] <= second["at"] <= told[1]["timestamp"]


def test_a_job_of_an_older_version_has_no_routing_and_says_so(at_work: Services, submit: Submit, api: Caller) -> None:
    job = submit()
    with at_work.database.write() as tx:
        tx.execute(update(jobs).values(routing=None))
    assert api.get(job["urls"]["self"]).json["routing"] == []
    assert api.get("/v1/jobs").json["data"][0]["routing"] == []


@on_sqlite
def test_with_one_backend_the_breaker_is_read_and_nobody_waits_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def read(board: BreakerBoard, backends: tuple[str, ...]) -> dict[str, None]:
        asked.set()
        go_on.wait(60)
        return dict.fromkeys(backends)

    monkeypatch.setattr(BreakerBoard, "read", read)
    services = open_services(settings.model_copy(update={"backends": ("dataoorts",)}))
    answer = client_with(build(services), KEY).post("/v1/jobs", json={"input": {"prompt": "a cat"}})
    assert routing(answer.json) == [("dataoorts", "only_one")]
    assert asked.wait(60) and not go_on.is_set()
    go_on.set()
    services.close()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


@on_sqlite
def test_a_frozen_redis_speaks_against_nobody_and_holds_up_nobody(
    settings: Settings, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BreakerWatch, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("api.app.client", announcements.client)  # which gives up on it
    services = open_services(settings.model_copy(update={"redis_url": own_redis.url, "max_queued": 1000}))
    api = client_with(build(services), KEY)
    with services.database.write() as tx:
        presence.show(tx, "w1", "dataoorts", 200, 2.0)
        presence.show(tx, "w2", "diffusers", 4, 3.0)
    asked, go_on, read = threading.Event(), threading.Event(), BreakerBoard.read

    def ask(board: BreakerBoard, backends: Any) -> Any:
        asked.set()
        go_on.wait(60)  # or Redis may be given up before the answer is there, which takes half a second
        return read(board, backends)

    monkeypatch.setattr(BreakerBoard, "read", ask)
    assert own_redis.process is not None
    own_redis.process.send_signal(signal.SIGSTOP)
    try:
        answer = api.post("/v1/jobs", json={"input": {"prompt": "a cat"}})
        assert asked.wait(60) and routing(answer.json) == [("diffusers", "cheapest")]
        assert not services.router._watch._is_fresh(), "the answer did not wait for Redis"
        go_on.set()
        eventually("Redis is given up", services.router._watch._is_fresh)
        again = api.post("/v1/jobs", json={"input": {"prompt": "a cat"}})
        assert routing(again.json) == [("diffusers", "cheapest")]
    finally:
        go_on.set()
        own_redis.process.send_signal(signal.SIGCONT)
        services.close()


def test_the_breakers_are_read_once_in_a_while(
    at_work: Services, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BreakerWatch, "REST_SECONDS", 3600.0)
    reads: list[Any] = []
    read = BreakerBoard.read

    def count(board: BreakerBoard, backends: Any) -> Any:
        reads.append(backends)
        return read(board, backends)

    monkeypatch.setattr(BreakerBoard, "read", count)
    for _ in range(3):
        submit()
    assert reads == [("dataoorts", "diffusers")]
