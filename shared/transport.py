"""Celery's way to Redis, without the books that it keeps of messages in work.

A ticket may be lost, so nobody needs to know which ones a worker holds; what protects a running job is its lease. And
the books are writes: a Redis without room refuses them, which ends Celery's worker (celery 5.7, kombu 5.7: exit 1),
and they took a quarter of a busy worker's Python time.
"""

from typing import Any

import kombu.transport
from kombu.transport import redis


class QoS(redis.QoS):
    """Messages are theirs who received them from the moment they did."""

    def append(self, message: Any, delivery_tag: str) -> None: ...

    def ack(self, delivery_tag: str) -> None: ...

    def reject(self, delivery_tag: str, requeue: bool = False) -> None: ...

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None: ...


class Channel(redis.Channel):
    QoS = QoS


class Transport(redis.Transport):
    Channel = Channel


def install() -> None:
    """Let `redis://` in this process mean this transport."""
    for scheme in ("redis", "rediss"):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__name__}"
