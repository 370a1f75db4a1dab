"""Retry-After, from what is known of the workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from api.forecast import Forecast
from api.services import Services
from shared import jobs as life
from shared.tables import Status
from tests.api.people import Caller, Submit, Worker
from tests.api.test_queue import not_seen_for, show
from tests.lives import job_row, many


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


def test_a_job_that_backs_off_is_not_far_behind(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    job = submit()
    claim = worker.claim()
    with services.database.write() as tx:
        life.requeue(tx, claim, reason="transient", after_seconds=30, counts=True)
    assert job_row(services.database, job["id"]).status == Status.queued
    assert retry_after(api, job["urls"]["self"]) == "1"


def test_workers_are_looked_up_once_in_a_while(
    api: Caller, services: Services, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", 3600.0)
    url = submit()["urls"]["self"]
    assert retry_after(api, url) == "1"
    show(services, "w", 1, 20.0)
    assert retry_after(api, url) == "1"
