"""A breaker's state in Redis, for tests that look at it, or let its time pass."""

from dataclasses import replace

from redis import Redis

from shared.breaker import Breaker, key, read, written


def stored(client: Redis, backend: str = "dataoorts") -> Breaker | None:
    return read(client.get(key(backend)))  # type: ignore[arg-type]  # bytes: it decodes nothing


def pass_time(client: Redis, seconds: float, backend: str = "dataoorts") -> None:
    """What the breaker waits for is so much nearer. Fails if there is none."""
    found = stored(client, backend)
    assert found is not None
    moved = replace(
        found,
        until=found.until - seconds,
        probe_until=found.probe_until - seconds,
        failed_at=found.failed_at - seconds,
        alone_since=found.alone_since - seconds,
        closed_at=None if found.closed_at is None else found.closed_at - seconds,
    )
    client.set(key(backend), written(moved))
