"""How far a job is, over a real Redis: told now and then, read by whoever asks, and no harm without Redis."""

import queue
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from shared.announcements import Listener, client
from shared.progress import CHANNEL, Progress, ProgressBoard, ProgressTeller, Report
from shared.settings import Settings
from tests.service import eventually

JOB = "job_a"


def running(**changes: Any) -> Any:
    return SimpleNamespace(**({"id": JOB, "status": "running", "backend": "diffusers", "attempts": 1} | changes))


def patient(redis_url: str) -> redis.Redis:
    """What is told to a Redis that stands still for longer than its client waits is lost, and that is no fault."""
    return client(Settings(redis_url=redis_url, secret_key="s" * 32), timeout_seconds=60)


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    with patient(redis_url) as connection:
        yield connection


@pytest.fixture
def teller(redis_client: redis.Redis) -> Iterator[ProgressTeller]:
    teller = ProgressTeller(redis_client)
    yield teller
    teller.close()


def test_what_a_worker_tells_is_read_of_the_running_attempt_alone(
    teller: ProgressTeller, redis_client: redis.Redis
) -> None:
    board = ProgressBoard(redis_client)
    assert board.of(running()) is None
    teller.tell(JOB, Report(1, 5, 20, None))
    eventually("it is told", lambda: board.of(running()) is not None)
    assert board.of(running()) == Progress(fraction=0.25, step=5, steps=20)
    assert board.of(running(attempts=2)) is None, "an attempt that is over"
    assert board.of(running(status="succeeded")) is board.of(running(status="queued")) is None
    assert board.of(running(backend="dataoorts")) is None, "a backend that tells nothing is not asked for"


def test_a_preview_stays_until_the_next_one_and_ends_with_its_attempt(
    teller: ProgressTeller, redis_client: redis.Redis
) -> None:
    board = ProgressBoard(redis_client)
    teller.tell(JOB, Report(1, 4, 20, b"jpeg"))
    teller.tell(JOB, Report(1, 5, 20, None))  # before anything was sent, or after: both keep what was drawn last
    eventually("step 5 is told", lambda: board.latest(JOB, 1) == Report(1, 5, 20, b"jpeg"))
    teller.tell(JOB, Report(2, 1, 20, None))
    eventually("the next attempt is told of", lambda: board.latest(JOB, 2) == Report(2, 1, 20, None))


def test_those_who_look_on_are_told_and_nobody_else_is(teller: ProgressTeller, redis_url: str) -> None:
    moved: queue.Queue[str | None] = queue.Queue()
    progressed: queue.Queue[str] = queue.Queue()
    listener = Listener(patient(redis_url), moved.put, {CHANNEL: progressed.put})
    listener.start()
    assert moved.get(timeout=60) is None and moved.get(timeout=60) is None, "two subscriptions began"
    teller.tell(JOB, Report(1, 5, 20, None))
    assert progressed.get(timeout=60) == JOB
    assert moved.empty(), "it is no move"
    listener.close()


def test_what_is_told_is_forgotten_by_itself(teller: ProgressTeller, redis_client: redis.Redis) -> None:
    teller.tell(JOB, Report(1, 5, 20, None))
    eventually("it is told", lambda: redis_client.exists(f"darkroom:progress:{JOB}:1") == 1)
    assert 0 < redis_client.ttl(f"darkroom:progress:{JOB}:1") <= 120


def test_without_redis_nothing_is_known_and_it_is_not_asked_again_at_once() -> None:
    asked = 0

    class Away:
        def hmget(self, *_: object) -> None:
            nonlocal asked
            asked += 1
            raise redis.ConnectionError("it is away")

    now = 100.0
    board = ProgressBoard(cast(redis.Redis, Away()), clock=lambda: now)
    assert [board.of(running()), board.of(running()), board.latest(JOB, 1)] == [None] * 3
    assert asked == 1
    now += board.PAUSE_SECONDS
    board.of(running())
    assert asked == 2


def test_telling_fails_nobody_while_redis_is_away(caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        def pipeline(self, **_: object) -> None:
            raise redis.ConnectionError("it is away")

    teller = ProgressTeller(cast(redis.Redis, Away()))
    teller.tell(JOB, Report(1, 5, 20, None))
    eventually("it has given up", lambda: "Redis could not be told" in caplog.text)
    teller.close()
