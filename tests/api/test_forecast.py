"""Retry-After, from what is known of the workers."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from api.app import build, open_services
from api.breaker_watch import BreakerWatch
from api.forecast import Forecast
from api.services import Services
from shared import jobs as life
from shared.breaker import BreakerBoard, Reason, Standing, State
from shared.settings import Settings
from shared.tables import Status
from tests.api.people import KEY, Caller, Submit, Worker, client_with
from tests.api.test_queue import not_seen_for, show
from tests.lives import job_row, many
from tests.service import eventually


@pytest.fixture(autouse=True)
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from one answer to the next."""
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", -1.0)


def retry_after(api: Caller, url: str) -> str | None:
    header: str | None = api.get(url).headers.get("Retry-After")
    return header


@contextmanager
def forgetting(services: Services, name: str) -> Iterator[None]:
    yield
    not_seen_for(services, name, 3600)


def test_a_queued_job_waits_for_as_many_turns_as_there_are_slots_for(
    api: Caller, services: Services, submit: Submit
) -> None:
    made = [submit() for _ in range(9)]
    first, fifth, ninth = (made[index]["urls"]["self"] for index in (0, 4, 8))
    for slots, seconds, expected in (
        (4, 3.0, ("3", "6", "9")),
        (100, 3.0, ("3", "3", "3")),
        (4, 2.2, ("3", "5", "7")),
        (1, 10.0, ("10", "50", "60")),
        (4, 0.01, ("1", "1", "1")),
        (4, 300.0, ("60", "60", "60")),
        (4, None, ("1", "2", "3")),
    ):
        show(services, "w", slots, seconds)
        assert tuple(retry_after(api, url) for url in (first, fifth, ninth)) == expected, (slots, seconds)


def test_a_running_job_is_somewhere_in_the_middle(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    url = submit()["urls"]["self"]
    show(services, "w", 4, 7.0)
    claim = worker.claim()
    assert retry_after(api, url) == "4"
    worker.succeed(claim)
    assert retry_after(api, url) is None


def test_an_image_that_is_not_ready_says_when_as_its_job_does(api: Caller, services: Services, submit: Submit) -> None:
    made = [submit() for _ in range(3)]
    show(services, "w", 1, 5.0)
    assert api.get(made[2]["urls"]["image"]).headers["Retry-After"] == retry_after(api, made[2]["urls"]["self"]) == "15"


def test_workers_that_are_gone_say_nothing_any_more(api: Caller, services: Services, submit: Submit) -> None:
    url = submit()["urls"]["self"]
    show(services, "slow", 1, 30.0)
    assert retry_after(api, url) == "30"
    with forgetting(services, "slow"):
        show(services, "fast", 1, 2.0)
        assert retry_after(api, url) == "16"  # the mean of both
    assert retry_after(api, url) == "2"


def test_a_submission_says_it_too(api: Caller, services: Services, submit: Submit) -> None:
    show(services, "w", 1, 5.0)
    submit()
    response = api.post("/v1/jobs", json={"input": {"prompt": "a cat"}})
    # As if it were next: its place is not counted then. The first poll knows better.
    assert response.headers["Retry-After"] == "5"
    assert retry_after(api, response.headers["Location"]) == "10"


def test_who_is_too_far_behind_to_be_counted_comes_back_late(
    api: Caller, services: Services, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", 60.0)
    many(services.database, 1100, rank=1)
    job = submit()
    assert api.get(job["urls"]["self"]).json["queue_position"] is None and retry_after(api, job["urls"]["self"]) == "60"


@pytest.mark.parametrize(("pause", "soonest", "latest"), [(30, 10, 30), (0.01, 1, 1), (3600, 3500, 3600)])
def test_a_job_that_backs_off_is_asked_for_again_after_its_pause(
    api: Caller, services: Services, submit: Submit, worker: Worker, pause: float, soonest: int, latest: int
) -> None:
    job = submit()
    claim = worker.claim()
    with services.database.write() as tx:
        life.requeue(tx, claim, reason="transient", after_seconds=pause, counts=True)
    assert job_row(services.database, job["id"]).status == Status.queued
    for url in (job["urls"]["self"], job["urls"]["image"]):
        assert soonest <= int(retry_after(api, url) or 0) <= latest  # less, by what the test took until here


def test_workers_are_looked_up_once_in_a_while(
    api: Caller, services: Services, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", 3600.0)
    url = submit()["urls"]["self"]
    assert retry_after(api, url) == "1"
    show(services, "w", 1, 20.0)
    assert retry_after(api, url) == "1"


OPEN = Standing(State.open, Reason.rate_limited, None, open_for=800.0)


def wait_for_readings(watch: BreakerWatch) -> None:
    """Those that were asked for: else one that takes long comes between later."""
    eventually("the breakers are read", lambda: not watch._wanted)


@contextmanager
def breakers(services: Services, **standings: Standing) -> Iterator[None]:
    """They were read just now."""
    watch = services.forecast._watch
    wait_for_readings(watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BreakerWatch, "REST_SECONDS", 3600.0)
        patch.setattr(watch, "_known", standings)
        patch.setattr(watch, "_read_at", time.monotonic())
        yield


def test_while_the_breaker_is_open_a_waiting_job_is_not_asked_for_before_it_may_close(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    waiting, running = submit()["urls"]["self"], submit()["urls"]["self"]
    show(services, "w", 4, 7.0)
    with breakers(services, dataoorts=OPEN):
        assert [700 < int(retry_after(api, url) or 0) <= 800 for url in (waiting, running)] == [True, True]
        assert 700 < int(api.get(f"{waiting}/image").headers["Retry-After"]) <= 800
        assert 700 < int(api.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).headers["Retry-After"]) <= 800
        waiting, running = running, waiting
        worker.claim()
        assert retry_after(api, running) == "4", "it is being made"
    with breakers(services, dataoorts=Standing(State.half_open, Reason.rate_limited, None)):
        assert retry_after(api, waiting) == "7"


def test_what_was_heard_long_ago_is_believed_until_its_time_is_over(services: Services) -> None:
    watch = services.forecast._watch
    with breakers(services, dataoorts=OPEN):
        watch._read_at -= 700
        assert 0 < watch.open_for("dataoorts") <= 100
        watch._read_at -= 200
        assert watch.open_for("dataoorts") == 0


def test_a_job_that_may_be_made_elsewhere_waits_for_no_breaker(settings: Settings) -> None:
    """The sweep moves it."""
    services = open_services(settings.model_copy(update={"backends": ("dataoorts", "diffusers")}))
    api = client_with(build(services), KEY)
    for name in ("dataoorts", "diffusers"):
        show(services, f"w-{name}", 4, 3.0, name)
    jobs = [
        api.post("/v1/jobs", json={"input": {"prompt": "a cat"}} | more).json["urls"]["self"]
        for more in ({}, {"backend": "diffusers"}, {"backend": "dataoorts"})
    ]
    with breakers(services, dataoorts=OPEN, diffusers=OPEN):
        assert [int(retry_after(api, job) or 0) > 700 for job in jobs] == [True, True, True]
    with breakers(services, dataoorts=OPEN):
        assert [int(retry_after(api, job) or 0) > 700 for job in jobs] == [False, False, True]
    services.close()


def test_who_asks_for_a_job_has_the_breakers_read_and_does_not_wait_for_it(
    api: Caller, submit: Submit, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, watch = submit()["urls"]["self"], services.forecast._watch
    wait_for_readings(watch)  # that of the submission
    asked, go_on = threading.Event(), threading.Event()

    def read(board: BreakerBoard, backends: tuple[str, ...]) -> dict[str, Standing | None]:
        asked.set()
        go_on.wait(60)
        return dict.fromkeys(backends)

    monkeypatch.setattr(BreakerBoard, "read", read)
    monkeypatch.setattr(watch, "_read_at", -math.inf)
    assert retry_after(api, url) == "1" and not go_on.is_set()
    assert asked.wait(60)
    go_on.set()
