"""The bell: tickets in a real Redis, and what happens when it is full, away or frozen."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Message, Queue

from shared import settings, tickets
from tests.servers import RedisServer

QUEUE = tickets.queue_of("dataoorts")


def wanted(url: str) -> settings.Settings:
    return settings.load({"DARKROOM_SECRET_KEY": "s" * 32, "DARKROOM_REDIS_URL": url})


def patient(url: str) -> Celery:
    """As tickets.broker(), but that a Redis that stands still for some seconds loses no ticket."""
    app = tickets.broker(wanted(url))
    app.conf.broker_transport_options |= {"socket_timeout": 60, "socket_connect_timeout": 60}
    return app


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may break."""
    server = RedisServer()
    server.start()
    yield server
    server.close()


def rung(client: redis.Redis, count: int) -> int:
    """Waits until the queue holds so many tickets; returns how many there are in the end."""
    deadline = time.monotonic() + 60
    while client.llen(QUEUE) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    return int(client.llen(QUEUE))


@pytest.fixture
def app(redis_url: str) -> Celery:
    return patient(redis_url)


def test_a_ring_puts_a_ticket_that_carries_no_job(app: Celery, redis_server: RedisServer) -> None:
    bell = tickets.Bell(app)
    bell.ring("dataoorts")
    client = redis_server.client()
    assert rung(client, 1) == 1
    [ticket] = client.lrange(QUEUE, 0, -1)
    assert b"job_" not in ticket
    bell.close()


def test_tickets_never_exceed_enough(app: Celery, redis_server: RedisServer) -> None:
    assert tickets.put(app, "dataoorts", at_most=10) == 0
    assert tickets.put(app, "dataoorts", at_most=10_000) == 10_010 - tickets.ENOUGH
    assert redis_server.client().llen(QUEUE) == tickets.ENOUGH


def test_a_ring_is_two_commands_by_a_client_that_is_kept(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets.put(app, "dataoorts", at_most=1)
    made: list[redis.Redis] = []
    sent: list[str] = []
    make, send = redis.Redis.__init__, redis.Redis.execute_command

    def noted_make(self: redis.Redis, *arguments: Any, **options: Any) -> None:
        made.append(self)
        make(self, *arguments, **options)

    def noted_send(self: redis.Redis, *arguments: Any, **options: Any) -> Any:
        sent.append(arguments[0])
        return send(self, *arguments, **options)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(redis.Redis, "__init__", noted_make)
    monkeypatch.setattr(redis.Redis, "execute_command", noted_send)
    for _ in range(3):
        tickets.put(app, "dataoorts", at_most=1)
    assert made == [] and sent == ["LLEN", "LPUSH"] * 3


def test_ringing_returns_at_once_while_redis_is_frozen(own_redis: RedisServer) -> None:
    bell = tickets.Bell(patient(own_redis.url))
    bell.ring("dataoorts")
    assert rung(own_redis.client(), 1) == 1
    assert own_redis.process is not None
    own_redis.process.send_signal(signal.SIGSTOP)

    def ring_often() -> None:
        for _ in range(100):
            bell.ring("dataoorts")

    ringing = threading.Thread(target=ring_often)
    ringing.start()
    ringing.join(30)  # one that waited for Redis would give up on it after a second, each time
    rang = not ringing.is_alive()
    own_redis.process.send_signal(signal.SIGCONT)
    assert rang, "a ring must not wait for Redis"
    bell.close()


def test_ringing_works_again_after_redis_was_away(own_redis: RedisServer) -> None:
    bell = tickets.Bell(tickets.broker(wanted(own_redis.url)))
    own_redis.stop()
    bell.ring("dataoorts")
    own_redis.start()
    client = own_redis.client()
    deadline = time.monotonic() + 60
    while not client.llen(QUEUE) and time.monotonic() < deadline:
        bell.ring("dataoorts")  # as the sweep does
        time.sleep(0.05)
    assert client.llen(QUEUE)
    bell.close()


@pytest.mark.parametrize("by", ["port", "socket"])
def test_a_ticket_is_taken_from_a_redis_without_room_and_no_books_are_kept_of_it(tmp_path: Path, by: str) -> None:
    """Celery's own books of messages in work are writes, and a worker that is refused one ends."""
    socket = tmp_path / "redis.sock"
    server = RedisServer("--unixsocket", str(socket))
    server.start()
    taken: list[Message] = []

    def take(_body: object, ticket: Message) -> None:
        ticket.ack()
        taken.append(ticket)

    try:
        app = patient(server.url if by == "port" else f"unix://{socket}")
        tickets.put(app, "dataoorts", at_most=1)
        with (
            app.connection_for_read() as connection,
            connection.channel() as channel,
            connection.Consumer([Queue(QUEUE)], channel=channel, callbacks=[take], accept=["json"]),
        ):
            server.client().config_set("maxmemory", 1)
            connection.drain_events(timeout=60)
        assert len(taken) == 1
        assert not server.client().keys("unacked*")
    finally:
        server.close()
