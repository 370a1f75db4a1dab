"""GET /healthz and GET /readyz."""

import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import insert, text, update

from api.app import create_app
from api.services import Services
from shared import announcements
from shared.breaker import Breaker, Reason, key, written
from shared.database import now
from shared.settings import Settings
from shared.tables import workers
from tests.api.people import KEY, Caller, client_with, on_sqlite
from tests.api.stores import redis_away, stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.servers import RedisServer
from worker import presence
from worker.presence import Progress

#: Nothing but the API runs in these tests.
NOBODY = {"workers": "degraded", "senders": "degraded", "sweep": "degraded"}

#: What is checked, where all is well but that no worker is there.
WITHOUT_WORKERS = {"database": "ok", "migrations": "ok", "redis": "ok", "breakers": "ok", **NOBODY}


def ready(api: Caller) -> tuple[int, dict[str, str]]:
    response = api.get("/readyz")
    assert set(response.json) == {"status", "checks", "breakers"}
    assert response.json["status"] == ("ready" if response.status_code == 200 else "not_ready")
    return response.status_code, response.json["checks"]


def test_both_answer_without_a_key(stranger: Caller) -> None:
    assert stranger.get("/healthz").json == {"status": "ok"}
    assert ready(stranger) == (
        200,
        {"database": "ok", "migrations": "ok", "redis": "ok", "breakers": "ok", **NOBODY},
    )


def test_a_database_at_another_revision_is_not_ready(stranger: Caller, services: Services) -> None:
    with services.database.write() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    assert ready(stranger) == (
        503,
        {"database": "ok", "migrations": "failed", "redis": "ok", "breakers": "ok", **NOBODY},
    )
    assert stranger.get("/healthz").status_code == 200


@on_sqlite
def test_a_worker_of_each_backend_is_looked_for(stranger: Caller, services: Services) -> None:
    with services.database.write() as tx:
        rows = [{"name": "w", "backend": backend, "slots": 200} for backend in services.settings.backends]
        tx.execute(insert(workers).values(seen_at=now()), rows)
    assert ready(stranger)[1]["workers"] == "ok"
    with services.database.write() as tx:
        tx.execute(update(workers).values(seen_at=now(-60)))
    assert ready(stranger)[1]["workers"] == "degraded"


@on_sqlite
def test_a_worker_that_makes_no_progress_counts_as_not_there(stranger: Caller, services: Services) -> None:
    with services.database.write() as tx:
        presence.show(tx, "w", "diffusers", 4, None)
        presence.show(tx, "w", "dataoorts", 200, None, Progress(trouble="the heartbeat has stood still for 61 s"))
    assert ready(stranger)[1]["workers"] == "degraded"
    with services.database.write() as tx:
        presence.show(tx, "w", "dataoorts", 200, None)
    assert ready(stranger)[1]["workers"] == "ok"


@on_sqlite
def test_senders_and_sweep_are_looked_for(stranger: Caller, services: Services) -> None:
    for work, name in (("deliver", "senders"), ("sweep", "sweep")):
        assert ready(stranger)[1][name] == "degraded"
        with services.database.write() as tx:
            presence.show(tx, "w", work, 0, None)
        assert ready(stranger)[1][name] == "ok"
        with services.database.write() as tx:
            tx.execute(update(workers).values(seen_at=now(-60)))
        assert ready(stranger)[1][name] == "degraded"


@pytest.fixture
def backends() -> tuple[str, ...]:
    return ("dataoorts", "diffusers")


@pytest.mark.parametrize(("until", "state"), [(0.0, "half_open"), (60.0, "open")])
def test_a_breaker_that_is_not_closed_is_told_with_its_reason_and_takes_nobody_away(
    stranger: Caller, services: Services, until: float, state: str
) -> None:
    assert stranger.get("/readyz").json["breakers"] == []
    moment = services.redis.time()[0] + until
    services.redis.set(key("diffusers"), written(Breaker(turns=1, reason=Reason.quota_exhausted, until=moment)))
    status, checks = ready(stranger)
    assert (status, checks["breakers"], checks["redis"]) == (200, "degraded", "ok")
    [told] = stranger.get("/readyz").json["breakers"]
    assert (told["backend"], told["state"], told["reason"]) == ("diffusers", state, "quota_exhausted")
    assert (told["until"] is None) == (state == "half_open")


@pytest.fixture
def settings_without_a_database(redis_url: str) -> Settings:
    url = "postgresql://nobody@127.0.0.1:1/none"
    return Settings(database_url=url, redis_url=redis_url, api_key=KEY, secret_key="s" * 32)


def test_without_a_database_it_starts_and_says_so(settings_without_a_database: Settings) -> None:
    api = client_with(create_app(settings_without_a_database), KEY)
    assert ready(api) == (
        503,
        {
            "database": "failed",
            "migrations": "failed",
            "redis": "ok",
            "workers": "degraded",
            "breakers": "ok",
            **NOBODY,
        },
    )
    response = api.get("/v1/jobs")
    assert response.status_code == 503 and response.json["code"] == "unavailable" and response.json["retryable"]
    assert response.headers["Retry-After"] == "5"


@pytest.fixture
def frozen_redis() -> Iterator[RedisServer]:
    """It takes connections, and answers nobody."""
    server = RedisServer()
    server.start()
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    yield server
    server.close()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How long the thread of the request was ready to wait for each connection that it asked for, in seconds."""
    connect, requests, waits = socket.socket.connect, threading.current_thread(), []

    def noted(self: socket.socket, address: Any) -> None:
        if threading.current_thread() is requests:
            waits.append(self.gettimeout())
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setattr("api.app.client", announcements.client)  # as a service has it
    return waits


@on_sqlite
def test_without_redis_it_is_ready_and_takes_jobs(database_url: str, patience: list[float | None]) -> None:
    with redis_away() as away:
        settings = Settings(database_url=database_url, redis_url=away, api_key=KEY, secret_key="s" * 32)
        assert_nobody_is_held_up(settings, patience)


@on_sqlite
def test_a_frozen_redis_holds_nobody_up(
    database_url: str, frozen_redis: RedisServer, patience: list[float | None]
) -> None:
    settings = Settings(database_url=database_url, redis_url=frozen_redis.url, api_key=KEY, secret_key="s" * 32)
    assert_nobody_is_held_up(settings, patience)


def assert_nobody_is_held_up(settings: Settings, patience: list[float | None]) -> None:
    """A submission leaves Redis to other threads. The readiness check asks it once, and gives up soon."""
    api = client_with(create_app(settings), KEY)
    assert api.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).status_code == 202
    assert patience == []
    assert ready(api) == (
        200,
        {
            "database": "ok",
            "migrations": "ok",
            "redis": "degraded",
            "workers": "degraded",
            "breakers": "degraded",
            **NOBODY,
        },
    )
    assert patience == [0.5]
    assert api.get("/readyz").json["breakers"] == [], "nothing is known of them"
