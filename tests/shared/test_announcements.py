"""Announcements over a real Redis: heard across processes' ends, and no harm when Redis is away or frozen."""

import queue
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from shared import settings
from shared.announcements import Announcer, Listener, client
from tests.servers import RedisServer


def wanted(url: str) -> settings.Settings:
    return settings.load({"DARKROOM_SECRET_KEY": "s" * 32, "DARKROOM_REDIS_URL": url})


def patient(url: str) -> redis.Redis:
    """What is told to a Redis that stands still for longer than its client waits is lost, and that is no fault."""
    return client(wanted(url), timeout_seconds=60)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may break."""
    server = RedisServer()
    server.start()
    yield server
    server.close()


class Ear:
    """A listener that has begun to listen."""

    def __init__(self, url: str) -> None:
        self.heard: queue.Queue[str | None] = queue.Queue()
        self.listener = Listener(patient(url), self.heard.put)
        self.listener.start()
        assert self.heard.get(timeout=60) is None, "the subscription began: anything may have been missed"

    def next(self) -> str | None:
        return self.heard.get(timeout=60)

    def close(self) -> None:
        """It is gone then: one that still listened when its Redis ends would say so in the log of another test."""
        self.listener.close()
        self.listener._thread.join(60)


def test_what_is_told_is_heard(redis_url: str) -> None:
    ear, announcer = Ear(redis_url), Announcer(patient(redis_url))
    announcer.tell(["job_a", "job_b"])
    announcer.tell(["job_c"])
    assert [ear.next() for _ in range(3)] == ["job_a", "job_b", "job_c"]
    announcer.close()
    ear.close()


def test_closing_tells_what_is_left(redis_url: str) -> None:
    ear, announcer = Ear(redis_url), Announcer(patient(redis_url))
    announcer.tell(["job_last"])
    announcer.close()
    assert ear.next() == "job_last"
    ear.close()


def test_telling_does_not_wait_for_a_frozen_redis(own_redis: RedisServer) -> None:
    announcer = Announcer(client(wanted(own_redis.url)))
    announcer.tell(["job_before"])
    assert own_redis.process is not None
    own_redis.process.send_signal(signal.SIGSTOP)

    def tell_much() -> None:
        for number in range(1000):
            announcer.tell([f"job_{number}"])

    telling = threading.Thread(target=tell_much)
    telling.start()
    telling.join(30)  # one that waited for Redis would give up on it after a second, each time
    told = not telling.is_alive()
    own_redis.process.send_signal(signal.SIGCONT)
    announcer.close()
    assert told, "telling must not wait for Redis"


def test_after_a_restart_of_redis_listeners_are_told_that_anything_may_have_happened(own_redis: RedisServer) -> None:
    ear, announcer = Ear(own_redis.url), Announcer(patient(own_redis.url))
    own_redis.stop()
    own_redis.start()
    assert ear.next() is None
    deadline = time.monotonic() + 60
    while ear.heard.empty() and time.monotonic() < deadline:
        announcer.tell(["job_after"])
        time.sleep(0.05)
    assert ear.next() == "job_after"
    announcer.close()
    ear.close()
