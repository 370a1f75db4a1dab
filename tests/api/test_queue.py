"""GET /v1/queue."""

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import update

from api import queue as queue_file
from api.app import build, create_app
from api.services import Services
from shared import jobs as life
from shared.breaker import Breaker, Reason, key, written
from shared.database import now
from shared.present import GONE_SECONDS
from shared.settings import Settings
from shared.tables import jobs, workers
from tests.api.people import KEY, Caller, Submit, Worker, client_with, on_sqlite
from tests.api.stores import redis_away, stores_are_waited_for  # noqa: F401  a fixture for all tests here
from worker import presence
from worker.feed import Feed
from worker.presence import Progress


def queue(api: Caller) -> dict[str, Any]:
    response = api.get("/v1/queue")
    assert response.status_code == 200
    [row] = response.json["data"]
    return dict(row)


def show(services: Services, name: str, slots: int, seconds: float | None = None, backend: str = "dataoorts") -> None:
    """A worker's heartbeat."""
    with services.database.write() as tx:
        presence.show(tx, name, backend, slots, seconds)


def not_seen_for(services: Services, name: str, seconds: float) -> None:
    with services.database.write() as tx:
        tx.execute(update(workers).where(workers.c.name == name).values(seen_at=now(-seconds)))


def test_a_quiet_service_has_a_row_for_each_backend(api: Caller) -> None:
    assert queue(api) == {
        "backend": "dataoorts",
        "queued": 0,
        "running": 0,
        "slots": 0,
        "workers": 0,
        "in_hand": 0,
        "stuck": 0,
        "oldest_queued_seconds": None,
        "breaker": {"state": "closed", "reason": None, "until": None},
    }


def opened(services: Services, **changes: Any) -> float:
    """A worker found the account spent; when it will be tried again, by the clock of Redis."""
    until = services.redis.time()[0] + 60.0
    made = Breaker(turns=1, reason=Reason.quota_exhausted, **{"until": until, **changes})
    services.redis.set(key("dataoorts"), written(made))
    return until


@on_sqlite
def test_the_breaker_says_why_nothing_is_made_and_when_it_will_be_tried(api: Caller, services: Services) -> None:
    until = opened(services)
    shown = queue(api)["breaker"]
    assert (shown["state"], shown["reason"]) == ("open", "quota_exhausted")
    assert datetime.fromisoformat(shown["until"]).timestamp() == until
    opened(services, until=1.0)
    assert queue(api)["breaker"] == {"state": "half_open", "reason": "quota_exhausted", "until": None}


@on_sqlite
def test_while_redis_is_away_nothing_is_said_of_the_breaker(database_url: str) -> None:
    with redis_away() as away:
        settings = Settings(database_url=database_url, redis_url=away, api_key=KEY, secret_key="s" * 32)
        api = client_with(create_app(settings), KEY)
        assert queue(api)["breaker"] is None


def test_it_counts_what_waits_and_what_is_being_made(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    made = [submit() for _ in range(5)]
    worker.succeed(worker.claim())
    backing_off = worker.claim()
    with services.database.write() as tx:
        assert life.requeue(tx, backing_off, reason="transient", after_seconds=60, counts=True)
    worker.claim()
    api.post(made[4]["urls"]["cancel"])
    row = queue(api)
    assert (row["queued"], row["running"]) == (2, 1)  # the one that backs off waits too


def test_of_a_queue_that_is_too_long_to_count_the_tallies_tell(
    api: Caller, services: Services, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_file, "COUNTED", 3)
    for _ in range(3):
        submit()
    assert queue(api)["queued"] == 3  # counted, although nothing was tallied
    for _ in range(2):
        submit()
    assert queue(api)["queued"] == 4  # as far as it was counted: there is no sweep that tallies
    Feed(services.database).round()
    assert queue(api)["queued"] == 5


def test_the_oldest_is_the_one_that_has_waited_longest(api: Caller, services: Services, submit: Submit) -> None:
    first, second = submit(), submit()
    with services.database.write() as tx:
        for job, age in ((first, 100), (second, 50)):
            aged = update(jobs).where(jobs.c.id == job["id"])
            tx.execute(aged.values(created_at=now(-age), queue_until=now(3600 - age)))
    assert 100 <= queue(api)["oldest_queued_seconds"] < 130
    api.post(first["urls"]["cancel"])
    assert 50 <= queue(api)["oldest_queued_seconds"] < 80
    api.post(second["urls"]["cancel"])
    assert queue(api)["oldest_queued_seconds"] is None


def test_slots_are_those_of_the_workers_that_are_there(api: Caller, services: Services) -> None:
    show(services, "one", 200)
    show(services, "two", 50)
    show(services, "gpu", 1, backend="diffusers")
    assert queue(api)["slots"] == 250
    not_seen_for(services, "two", services.settings.lease_seconds + 1)
    assert queue(api)["slots"] == 200
    show(services, "two", 60)
    assert queue(api)["slots"] == 260
    with services.database.write() as tx:
        presence.leave(tx, "one")
    assert queue(api)["slots"] == 60


def test_it_tells_what_the_workers_have_in_hand_and_counts_no_slots_of_a_stuck_one(
    api: Caller, services: Services
) -> None:
    with services.database.write() as tx:
        presence.show(tx, "one", "dataoorts", 200, None, Progress(in_hand=150))
        presence.show(tx, "two", "dataoorts", 50, None, Progress(in_hand=50, trouble="nothing has moved for 46 s"))
    row = queue(api)
    assert (row["workers"], row["stuck"], row["slots"], row["in_hand"]) == (1, 1, 200, 200)


@on_sqlite
def test_a_worker_between_two_heartbeats_is_there(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    assert services.settings.lease_seconds == GONE_SECONDS
    # Both are an hour here: from three quarters of 20 s to the end, a machine that stands still needs but five.
    monkeypatch.setattr("shared.present.GONE_SECONDS", 3600.0)
    settings = services.settings.model_copy(update={"lease_seconds": 3600.0})
    api = client_with(build(replace(services, settings=settings)), KEY)
    show(services, "one", 200)
    not_seen_for(services, "one", settings.lease_seconds * 3 / 4)
    assert queue(api)["slots"] == 200


@on_sqlite
def test_the_queue_is_the_whole_service_s(api: Caller, neighbour: Caller, submit: Submit) -> None:
    """Who waits wants to know how many wait before him, whosever they are; no job is named."""
    submit()
    assert queue(neighbour)["queued"] == queue(api)["queued"] == 1


def test_a_job_knows_its_place_in_the_queue(api: Caller, submit: Submit, worker: Worker) -> None:
    made = [submit() for _ in range(3)]

    def places() -> list[int | None]:
        return [api.get(job["urls"]["self"]).json["queue_position"] for job in made]

    assert places() == [1, 2, 3]
    worker.claim()
    assert places() == [None, 1, 2]
    api.post(made[1]["urls"]["cancel"])
    assert places() == [None, None, 1]
    assert [job["queue_position"] for job in made] == [None] * 3  # not counted for the answer to a submission
