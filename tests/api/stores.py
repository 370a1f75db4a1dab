"""The API's ways to its stores, with more patience than a service may have.

On a busy machine a Redis, a PostgreSQL or the API itself stands still for seconds. What is to be answered at once by a
service would then be answered without it, or refused; where a test is about something else, it is waited for.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import Celery

import api.app
import shared.database
from shared.announcements import client
from shared.database import Database
from shared.settings import Settings
from shared.tickets import broker

SECONDS = 60.0


def patient_client(settings: Settings, timeout_seconds: float = SECONDS) -> redis.Redis:
    return client(settings, max(timeout_seconds, SECONDS))


def patient_broker(settings: Settings) -> Celery:
    celery = broker(settings)
    limits = {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
    celery.conf.broker_transport_options = celery.conf.broker_transport_options | limits
    return celery


def patient_database(url: str, **given: Any) -> Database:
    return Database(url, **given | {"wait_seconds": SECONDS})


def wait_for_stores(change: Callable[[Any, str, Any], object] = setattr) -> None:
    """What open_services() makes from here on waits for a Redis, for a database, and for a connection that is free."""
    change(api.app, "client", patient_client)
    change(api.app, "broker", patient_broker)
    change(api.app, "Database", patient_database)
    change(shared.database, "CONNECT_SECONDS", int(SECONDS))
    change(shared.database, "BUSY_SECONDS", int(SECONDS))


@pytest.fixture(autouse=True)
def stores_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests of each file that imports it."""
    wait_for_stores(monkeypatch.setattr)


@contextmanager
def redis_away() -> Iterator[str]:
    """The URL of a Redis that is away. Its port is kept, so that nobody else's server gets it meanwhile."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{kept.getsockname()[1]}/0"
