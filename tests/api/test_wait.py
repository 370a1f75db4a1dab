"""`Prefer: wait=N`: on POST /v1/jobs, on GET /v1/jobs/{id} and on a retry."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI

from api.app import build, open_services
from api.services import Services
from api.waiting import Waiting
from shared.announcements import CHANNEL
from shared.settings import Settings
from tests.api.people import KEY, Caller, Submit, Worker, client_with, on_sqlite
from tests.api.stores import redis_away, stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.servers import RedisServer
from tests.service import eventually

BODY = {"input": {"prompt": "a cat"}}
WAIT = {"Prefer": "wait=60"}


class Asking:
    """A request in a thread of its own. `answer()` waits for its answer."""

    def __init__(self, app: OpenAPI, method: str, url: str, **kwargs: Any) -> None:
        self._answers: list[Any] = []
        client = client_with(app, KEY)
        self._thread = threading.Thread(
            target=lambda: self._answers.append(client.open(url, method=method, **kwargs)), daemon=True
        )
        self._thread.start()

    def answer(self) -> Any:
        self._thread.join(50)  # less than any wait asked for here: an end by its time is a failure
        assert self._answers, "no answer came"
        return self._answers[0]


def waiters(services: Services) -> int:
    return sum(len(places) for places in services.waiting._places.values())


def has_waiters(services: Services, count: int) -> None:
    eventually(f"{count} requests wait", lambda: waiters(services) == count, 60)


@pytest.fixture
def only_when_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads again by himself: a wait that ends was woken."""
    monkeypatch.setattr("api.waiting.READ_AGAIN", 3600)


@pytest.fixture
def worker_elsewhere(settings: Settings) -> Iterator[Worker]:
    """A worker with a database, and a way to Redis, of its own: as in another process."""
    services = open_services(settings)
    yield Worker(services)
    services.close()


@pytest.mark.usefixtures("only_when_woken")
def test_a_wait_for_a_job_ends_with_the_job_wherever_that_happens(
    app: OpenAPI, services: Services, submit: Submit, worker_elsewhere: Worker
) -> None:
    asking = Asking(app, "GET", submit()["urls"]["self"], headers=WAIT)
    has_waiters(services, 1)
    worker_elsewhere.succeed(worker_elsewhere.claim())
    response = asking.answer()
    assert response.status_code == 200 and response.json["status"] == "succeeded" and response.json["image"]
    assert response.headers["Preference-Applied"] == "wait=60" and response.headers["Vary"] == "Prefer"
    assert "Retry-After" not in response.headers and response.headers["ETag"] == 'W/"3"'


@pytest.mark.usefixtures("only_when_woken")
def test_a_submission_that_waits_is_answered_with_its_end(
    app: OpenAPI, services: Services, worker_elsewhere: Worker
) -> None:
    asking = Asking(app, "POST", "/v1/jobs", json=BODY, headers=WAIT)
    has_waiters(services, 1)
    worker_elsewhere.fail(worker_elsewhere.claim())
    response = asking.answer()
    assert response.status_code == 200 and response.json["status"] == "failed"
    assert response.headers["Location"] == response.json["urls"]["self"]
    assert response.headers["Preference-Applied"] == "wait=60" and response.headers["Vary"] == "Prefer"


@on_sqlite
@pytest.mark.usefixtures("only_when_woken")
def test_a_cancel_ends_the_waits_of_its_job_and_of_no_other(
    app: OpenAPI, services: Services, api: Caller, submit: Submit
) -> None:
    first, second = submit(), submit()
    one, other = (Asking(app, "GET", job["urls"]["self"], headers=WAIT) for job in (first, second))
    has_waiters(services, 2)
    api.post(first["urls"]["cancel"])
    assert one.answer().json["status"] == "canceled"
    assert waiters(services) == 1
    api.post(second["urls"]["cancel"])
    assert other.answer().json["status"] == "canceled"


@pytest.fixture
def without_redis(settings: Settings) -> Iterator[Services]:
    """A process whose Redis is away."""
    with redis_away() as away:
        services = open_services(settings.model_copy(update={"redis_url": away}))
        yield services
        services.close()


def test_without_redis_a_wait_finds_out_by_itself(without_redis: Services, submit: Submit, worker: Worker) -> None:
    asking = Asking(build(without_redis), "GET", submit()["urls"]["self"], headers=WAIT)
    has_waiters(without_redis, 1)
    worker.succeed(worker.claim())  # committed through another process, as far as `without_redis` can know
    response = asking.answer()
    assert response.json["status"] == "succeeded" and response.headers["Preference-Applied"] == "wait=60"


@pytest.mark.usefixtures("only_when_woken")
def test_without_redis_a_wait_is_woken_by_what_its_own_process_does(without_redis: Services) -> None:
    app = build(without_redis)
    api = client_with(app, KEY)
    job, other = (api.post("/v1/jobs", json=BODY).json for _ in range(2))
    asking = Asking(app, "GET", job["urls"]["self"], headers=WAIT)
    next_event = Asking(app, "GET", other["urls"]["self"], headers=WAIT | {"If-None-Match": 'W/"1"'})
    has_waiters(without_redis, 2)
    api.post(job["urls"]["cancel"])
    assert asking.answer().json["status"] == "canceled"
    assert waiters(without_redis) == 1
    Worker(without_redis).claim()
    assert next_event.answer().json["status"] == "running"


@on_sqlite
def test_a_wait_that_is_over_first_answers_what_is(api: Caller, submit: Submit, worker: Worker) -> None:
    short = {"Prefer": "wait=1"}
    response = api.post("/v1/jobs", json=BODY, headers=short)
    assert response.status_code == 202 and response.json["status"] == "queued"
    worker.claim()
    again = api.get(response.headers["Location"], headers=short)
    assert again.status_code == 200 and again.json["status"] == "running"
    for answer in (response, again):
        assert answer.headers["Preference-Applied"] == "wait=1" and answer.headers["Retry-After"] == "1"


@on_sqlite
def test_who_prefers_not_to_wait_is_told_that_the_answer_would_differ(api: Caller, submit: Submit) -> None:
    for prefer in ({}, {"Prefer": "wait=soon"}, {"Prefer": "respond-async"}):
        for response in (api.post("/v1/jobs", json=BODY, headers=prefer), api.get(submit()["urls"]["self"])):
            assert "Preference-Applied" not in response.headers and response.headers["Vary"] == "Prefer"


@on_sqlite
def test_longer_than_a_minute_is_cut_and_said_to_be(api: Caller, submit: Submit, worker: Worker) -> None:
    url = submit()["urls"]["self"]
    worker.succeed(worker.claim())
    response = api.get(url, headers={"Prefer": "wait=3600"})
    assert response.json["status"] == "succeeded" and response.headers["Preference-Applied"] == "wait=60"


@pytest.mark.usefixtures("only_when_woken")
def test_who_knows_the_job_as_it_is_waits_for_its_next_event(
    app: OpenAPI, services: Services, submit: Submit, worker_elsewhere: Worker
) -> None:
    url = submit()["urls"]["self"]
    asking = Asking(app, "GET", url, headers=WAIT | {"If-None-Match": 'W/"1"'})
    has_waiters(services, 1)
    claim = worker_elsewhere.claim()
    response = asking.answer()
    assert response.status_code == 200 and response.json["status"] == "running" and response.headers["ETag"] == 'W/"2"'
    asking = Asking(app, "GET", url, headers=WAIT | {"If-None-Match": response.headers["ETag"]})
    has_waiters(services, 1)
    worker_elsewhere.succeed(claim)
    assert asking.answer().json["status"] == "succeeded"


@on_sqlite
def test_nothing_happened_until_the_time_was_over_is_304(api: Caller, submit: Submit) -> None:
    response = api.get(submit()["urls"]["self"], headers={"Prefer": "wait=1", "If-None-Match": 'W/"1"'})
    assert response.status_code == 304 and response.data == b""
    assert response.headers["Preference-Applied"] == "wait=1" and response.headers["ETag"] == 'W/"1"'
    assert response.headers["Vary"] == "Prefer"


@on_sqlite
@pytest.mark.usefixtures("only_when_woken")
def test_who_knows_the_end_waits_for_nothing(app: OpenAPI, api: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    for known in ('W/"2"', "*"):
        response = Asking(app, "GET", job["urls"]["self"], headers=WAIT | {"If-None-Match": known}).answer()
        assert response.status_code == 304 and response.headers["Preference-Applied"] == "wait=60"


@on_sqlite
def test_when_no_place_is_free_the_answer_comes_at_once(services: Services, app: OpenAPI, submit: Submit) -> None:
    url = submit()["urls"]["self"]
    services.waiting._free = threading.BoundedSemaphore(1)
    holder = Asking(app, "GET", url, headers=WAIT)
    has_waiters(services, 1)
    for method, where, status in (("GET", url, 200), ("POST", "/v1/jobs", 202)):
        response = Asking(app, method, where, headers=WAIT, **({"json": BODY} if method == "POST" else {})).answer()
        assert response.status_code == status and response.json["status"] == "queued"
        assert "Preference-Applied" not in response.headers and response.headers["Vary"] == "Prefer"
    services.waiting.close()
    assert holder.answer().json["status"] == "queued"


def test_nobody_holds_a_connection_to_the_database_while_he_waits(
    app: OpenAPI, services: Services, api: Caller, submit: Submit, worker: Worker
) -> None:
    pool: Any = services.database.engine.pool
    url = submit()["urls"]["self"]
    asking = [Asking(app, "GET", url, headers=WAIT) for _ in range(3 * pool.size())]
    has_waiters(services, len(asking))
    eventually("no connection is in use", lambda: pool.checkedout() == 0, 60)
    assert api.get(url).status_code == 200 and waiters(services) == len(asking)
    worker.succeed(worker.claim())
    assert {each.answer().json["status"] for each in asking} == {"succeeded"}


@on_sqlite
def test_one_connection_is_enough_for_every_route(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request needs a second one while it holds one: threads that each held one would starve each other."""
    monkeypatch.setattr("api.app.CONNECTIONS", 1)
    monkeypatch.setattr("api.forecast.Forecast.LOOK_UP_SECONDS", -1.0)
    services = open_services(settings)
    api, worker = client_with(build(services), KEY), Worker(services)
    for end in ("cancel", "fail", "succeed"):
        url = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": end, "Prefer": "wait=0"}).headers["Location"]
        for path in (url, f"{url}/image", f"{url}/attempts", "/v1/jobs", "/v1/queue", "/readyz"):
            assert api.get(path, headers={"Prefer": "wait=0"}).status_code in (200, 409), path
        if end == "cancel":
            assert api.post(f"{url}/cancel").status_code == 200
        else:
            getattr(worker, end)(worker.claim())
        assert api.post(f"{url}/retry", headers={"Idempotency-Key": url}).status_code in (202, 409)
        assert api.delete(url).status_code == 204
        for job in api.get("/v1/jobs?status=queued").json["data"]:
            api.post(job["urls"]["cancel"])
    services.close()


@on_sqlite
def test_a_job_that_is_not_there_is_not_waited_for_and_no_place_is_lost(services: Services, api: Caller) -> None:
    services.waiting._free = threading.BoundedSemaphore(1)
    for _ in range(2):
        assert api.get("/v1/jobs/job_" + "0" * 32, headers=WAIT).status_code == 404
    job = api.post("/v1/jobs", json=BODY, headers={"Prefer": "wait=0"})
    assert job.status_code == 202 and job.headers["Preference-Applied"] == "wait=0"


@on_sqlite
@pytest.mark.parametrize("method", ["GET", "POST", "retry"])
def test_who_hangs_up_gives_his_place_back(
    app: OpenAPI, services: Services, api: Caller, submit: Submit, method: str
) -> None:
    job = submit()
    url, request = job["urls"]["self"], {"GET": "GET"}.get(method, "POST")
    if method == "retry":
        api.post(job["urls"]["cancel"])
    where = {"GET": url, "POST": "/v1/jobs", "retry": f"{url}/retry"}[method]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        given: dict[str, Any] = {"json": BODY} if method == "POST" else {}
        over = {"gunicorn.socket": ours}
        asking = Asking(app, request, where, headers=WAIT, environ_overrides=over, **given)
        eventually("the look-out has seen its job", lambda: bool(services.waiting._seen), 60)
        theirs.close()
        assert asking.answer().json["status"] == "queued"  # which nobody reads
    has_waiters(services, 0)


@on_sqlite
@pytest.mark.usefixtures("only_when_woken")
def test_a_retry_can_be_waited_for(
    app: OpenAPI, services: Services, api: Caller, submit: Submit, worker: Worker
) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    asking = Asking(app, "POST", f"{job['urls']['self']}/retry", headers=WAIT)
    has_waiters(services, 1)
    worker.succeed(worker.claim())
    response = asking.answer()
    assert response.status_code == 200 and response.json["status"] == "succeeded"
    assert response.json["retried_from"] == job["id"]


@pytest.fixture
def deaf(services: Services, redis_server: RedisServer) -> Services:
    """The subscription has begun, and has ended: nothing is heard any more, not even that it began."""
    listener = services.waiting._listener
    subscribers: Callable[[], int] = lambda: redis_server.client().pubsub_numsub(CHANNEL)[0][1]  # noqa: E731
    services.waiting.until("job_none", 0, lambda: None, lambda found: True)
    eventually("the subscription begins", lambda: subscribers() == 1, 60)
    listener.close()
    eventually("the subscription ends", lambda: subscribers() == 0, 60)
    return services


@on_sqlite
@pytest.mark.usefixtures("only_when_woken", "deaf")
@pytest.mark.parametrize("which", [1, 2])
def test_what_happens_between_a_look_and_the_wait_is_not_missed(
    app: OpenAPI, submit: Submit, worker: Worker, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """The place is taken first, then the job is read: what is committed right after a look ends the wait."""
    url = submit()["urls"]["self"]
    until: Callable[..., Any] = Waiting.until

    def ends_after_a_look(self: Waiting, job_id: str, seconds: float, read: Any, enough: Any, **rest: Any) -> Any:
        looks = 0

        def look() -> Any:
            nonlocal looks
            looks += 1
            found = read()
            if looks == which:
                worker.succeed(worker.claim())
            elif looks < which:
                self.wake(job_id)  # a hint of nothing: it looks again
            return found

        return until(self, job_id, seconds, look, enough, **rest)

    monkeypatch.setattr(Waiting, "until", ends_after_a_look)
    assert Asking(app, "GET", url, headers=WAIT).answer().json["status"] == "succeeded"
