"""What is said of a Redis that is not set up as it should be."""

from collections.abc import Iterator

import pytest

from tests.servers import RedisServer
from worker.redis_check import complaints


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


def test_a_redis_as_it_should_be_is_not_complained_of(own_redis: RedisServer) -> None:
    assert complaints(own_redis.client()) == []


def test_a_redis_that_evicts_or_forgets_is_complained_of(own_redis: RedisServer) -> None:
    client = own_redis.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("appendonly", "no")
    policy, file = complaints(client)
    assert "allkeys-lru" in policy and "append-only file" in file


def test_an_old_redis_is_complained_of_and_one_that_is_away_is_not(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = own_redis.client()
    with monkeypatch.context() as patch:
        patch.setattr(client, "info", lambda: {"redis_version": "5.0.14", "aof_enabled": 1})
        [line] = complaints(client)
    assert "5.0.14" in line
    own_redis.stop()
    assert complaints(client) == []
