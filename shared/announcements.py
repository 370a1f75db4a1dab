"""Who waits for a job is told over Redis that something happened to it: a hint, sent after the commit.

What is told may be lost, doubled or late; the database is what is read then, and is read again now and then without
any hint. So nobody here ever waits for Redis, and its absence only makes those who wait slower to find out.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.courier import Courier
from shared.settings import Settings

log = logging.getLogger(__name__)

CHANNEL = "darkroom.jobs"

#: Between two tries to reach a Redis that is away, in seconds.
PAUSE_SECONDS = 1.0


def client(settings: Settings, timeout_seconds: float = 1.0) -> redis.Redis:
    """A Redis client that gives up within `timeout_seconds` (redis-py alone tries three times, for up to 10 s each)."""
    return redis.Redis.from_url(
        settings.redis_url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        health_check_interval=10,
        retry=Retry(NoBackoff(), 0),
    )


class Announcer(Courier):
    """Tells from a thread of its own that these jobs have moved."""

    #: What waits to be told while Redis is slow; beyond it the oldest is forgotten.
    BACKLOG = 10_000

    def __init__(self, redis: redis.Redis) -> None:
        super().__init__("announcer")
        self._redis = redis
        self._moved: deque[str] = deque(maxlen=self.BACKLOG)

    def tell(self, job_ids: Iterable[str]) -> None:
        """Returns at once and never fails. Call it after the commit."""
        with self._wake:
            self._moved.extend(job_ids)
            self._send()

    def _waiting(self) -> bool:
        return bool(self._moved)

    def _run_errands(self) -> float:
        with self._wake:
            moved = list(self._moved)
            self._moved.clear()
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in moved:
                    pipe.publish(CHANNEL, job_id)
                pipe.execute()
        except (redis.RedisError, OSError) as error:
            log.warning("Redis could not be told of %d moves (%s)", len(moved), type(error).__name__)
            return PAUSE_SECONDS
        return 0


class Listener:
    """Hears what is announced, in a thread of its own: one subscription a process."""

    def __init__(
        self,
        redis: redis.Redis,
        heard: Callable[[str | None], None],
        further: Mapping[str, Callable[[str], None]] | None = None,
    ) -> None:
        """`heard` is called with a job's id; with None after a subscription began: anything may have been missed.

        `further`: other channels to listen to, and what to call with what is said there.
        """
        self._redis = redis
        self._heard = heard
        self._further = {channel.encode(): called for channel, called in (further or {}).items()}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with self._redis.pubsub() as subscription:  # type: ignore[no-untyped-call]
                    self._listen(subscription)
            except (redis.RedisError, OSError) as error:
                log.warning("Redis can't be listened to (%s): waiting takes longer", type(error).__name__)
                self._closed.wait(PAUSE_SECONDS)

    def _listen(self, subscription: redis.client.PubSub) -> None:
        subscription.subscribe(CHANNEL, *self._further)
        while not self._closed.is_set():
            # With a timeout: a subscription whose other end is gone is silent, and get_message() pings it in between.
            message = subscription.get_message(timeout=1.0)
            if message is None:
                continue
            if message["type"] != "message":
                self._heard(None)
            elif (called := self._further.get(message["channel"])) is not None:
                called(message["data"].decode())
            else:
                self._heard(message["data"].decode())
