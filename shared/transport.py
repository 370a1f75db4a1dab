"""Celery's way to Redis, without the books that it keeps of messages in work.

A ticket may be lost, so nobody needs to know which ones a worker holds; what protects a running job is its lease. And
the books are writes: a Redis without room refuses them, which ends Celery's worker (celery 5.7, kombu 5.7: exit 1),
and they took a quarter of a busy worker's Python time.
"""

from collections.abc import Callable
from typing import Any

import kombu.transport
from kombu.transport import redis
from kombu.transport.virtual import Empty


class QoS(redis.QoS):
    """Messages are theirs who received them from the moment they did."""

    def append(self, message: Any, delivery_tag: str) -> None: ...

    def ack(self, delivery_tag: str) -> None: ...

    def reject(self, delivery_tag: str, requeue: bool = False) -> None: ...

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None: ...


class Channel(redis.Channel):
    QoS = QoS
    from_transport_options = (*redis.Channel.from_transport_options, "heard")
    #: Called when Redis answered a wait for tickets, which it does every second.
    heard: Callable[[], None] | None = None
    _kept: Any = None

    def waiting(self, queue: str) -> int:
        """How many messages lie in it. `Queue.queue_declare` says it too, and takes five times as long."""
        return int(self._create_client().llen(queue))

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One for all that is sent over the same connections: making one takes longer than what it is asked for."""
        if asynchronous:
            return super()._create_client(asynchronous=True)  # type: ignore[misc]
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = super()._create_client()  # type: ignore[misc]
        return self._kept

    def _brpop_read(self, **options: Any) -> Any:
        try:
            delivered = super()._brpop_read(**options)  # type: ignore[misc]  # the stubs leave it out
        except Empty:
            self.hear()
            raise
        self.hear()
        return delivered

    def hear(self) -> None:
        if self.heard is not None:
            self.heard()


class Transport(redis.Transport):
    Channel = Channel
    #: How often a consumer that has no room for a ticket, and so asks Redis for none, shows that it goes on.
    ROUND_SECONDS = 2.0

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        loop.call_repeatedly(self.ROUND_SECONDS, self._show_full_channels)

    def _show_full_channels(self) -> None:
        channels: list[Any] = list(self.channels or ())
        for channel in channels:
            if channel.active_queues and not channel.qos.can_consume():
                channel.hear()


def install() -> None:
    """Let `redis://` in this process mean this transport."""
    for scheme in ("redis", "rediss"):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__name__}"
