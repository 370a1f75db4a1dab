"""The bell: tickets in a real Redis, and what happens when it is full, away or frozen."""

import signal
import time
from collections.abc import Iterator

import pytest
import redis
from celery import Celery

from shared import settings, tickets
from tests.servers import RedisServer

QUEUE = tickets.queue_of("dataoorts")


def wanted(url: str) -> settings.Settings:
    return settings.load({"DARKROOM_SECRET_KEY": "s" * 32, "DARKROOM_REDIS_URL": url})


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may break."""
    server = RedisServer()
    server.start()
    yield server
    server.close()


def rung(client: redis.Redis, count: int) -> int:
    """Waits until the queue holds so many tickets; returns how many there are in the end."""
    deadline = time.monotonic() + 10
    while client.llen(QUEUE) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    return int(client.llen(QUEUE))


@pytest.fixture
def app(redis_url: str) -> Celery:
    return tickets.broker(wanted(redis_url))


def test_a_ring_puts_a_ticket_that_carries_no_job(app: Celery, redis_server: RedisServer) -> None:
    bell = tickets.Bell(app)
    bell.ring("dataoorts")
    client = redis_server.client()
    assert rung(client, 1) == 1
    [ticket] = client.lrange(QUEUE, 0, -1)
    assert b"job_" not in ticket
    bell.close()


def test_tickets_never_exceed_enough(app: Celery, redis_server: RedisServer) -> None:
    tickets.put(app, "dataoorts", at_most=10_000, up_to=tickets.ENOUGH)
    tickets.put(app, "dataoorts", at_most=10_000, up_to=tickets.ENOUGH)
    assert redis_server.client().llen(QUEUE) == tickets.ENOUGH


def test_topping_up_stops_at_what_is_waiting(app: Celery, redis_server: RedisServer) -> None:
    tickets.put(app, "dataoorts", at_most=2, up_to=tickets.ENOUGH)
    tickets.put(app, "dataoorts", at_most=5, up_to=5)
    assert redis_server.client().llen(QUEUE) == 5


def test_ringing_returns_at_once_while_redis_is_frozen(own_redis: RedisServer) -> None:
    bell = tickets.Bell(tickets.broker(wanted(own_redis.url)))
    bell.ring("dataoorts")
    assert rung(own_redis.client(), 1) == 1
    assert own_redis.process is not None
    own_redis.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(100):
        bell.ring("dataoorts")
    elapsed = time.monotonic() - started
    own_redis.process.send_signal(signal.SIGCONT)
    assert elapsed < 0.5, "a ring must not wait for Redis"
    bell.close()


def test_ringing_works_again_after_redis_was_away(own_redis: RedisServer) -> None:
    bell = tickets.Bell(tickets.broker(wanted(own_redis.url)))
    own_redis.stop()
    bell.ring("dataoorts")
    own_redis.start()
    client = own_redis.client()
    deadline = time.monotonic() + 20
    while not client.llen(QUEUE) and time.monotonic() < deadline:
        bell.ring("dataoorts")  # as the sweep does
        time.sleep(0.05)
    assert client.llen(QUEUE)
    bell.close()
