"""The bell: how workers are told that there is work. A ticket says "there is work for this backend" and no more.

A lost, doubled or stale ticket does no harm, because the database decides who works at what: Redis may be emptied
or be away at any moment. So ringing never waits for Redis in a request, and never fails.
"""

import logging
import threading
from typing import Any

from celery import Celery
from kombu import Queue

from shared.settings import Settings

log = logging.getLogger(__name__)

#: The name of the one task: claim and work until no job is left.
TASK = "darkroom.generate"

#: More tickets than this wait in no queue: about twice the slots of one worker (`-c 200`). Each keeps a slot busy
#: until the queue is empty, so more would only be found stale.
ENOUGH = 400


def queue_of(backend: str) -> str:
    """The Celery queue of a backend."""
    return f"generate.{backend}"


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's settings, for those who ring and those who answer. Each differs from the default for a reason."""
    return {
        "broker_url": settings.broker_url,
        "task_ignore_result": True,  # the database knows; a result backend would be a second truth
        "task_serializer": "json",
        "accept_content": ["json"],
        # Early acks, no prefetch, no remote control: what protects a running job is its lease. With tickets unacked or
        # prefetched, and its remote control on, Celery 5.7 dies when Redis restarts (AttributeError in
        # Channel._connparams); without either of the two it lives. Both are off: the second is the spare.
        "task_acks_late": False,
        "worker_disable_prefetch": True,
        "worker_prefetch_multiplier": 1,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # a canceled call is paid, and paid again
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # for ever: Redis may be away for hours
        "broker_transport_options": {
            # Without them a frozen Redis blocks a publisher for ever.
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "max_connections": 50,
        },
        "worker_hijack_root_logger": False,
        "timezone": "UTC",
    }


def broker(settings: Settings) -> Celery:
    """A Celery application for ringing only. It gives up on Redis within a second and does not try again by itself."""
    app = Celery("darkroom", set_as_current=False)
    app.conf.update(configuration(settings))
    app.conf.broker_transport_options = app.conf.broker_transport_options | {
        "socket_timeout": 1,
        "socket_connect_timeout": 1,
    }
    return app


def put(app: Celery, backend: str, *, at_most: int, up_to: int) -> int:
    """Put tickets into the backend's queue: `at_most` so many, and no more once it holds `up_to`.

    Returns how many found no room. Raises what kombu and redis-py raise while Redis is away.
    """
    queue: Any = Queue(queue_of(backend))  # celery-types knows neither queues in send_task nor what declaring returns
    with app.producer_or_acquire() as producer:
        waiting = queue(producer.channel).queue_declare().message_count
        missing: int = max(min(at_most, up_to - waiting), 0)
        for _ in range(missing):
            app.send_task(TASK, (backend,), queue=queue, producer=producer, retry=False, ignore_result=True)
        return at_most - missing


class Bell:
    """Rings from a thread of its own, so that nobody waits for Redis. Many rings at once become one trip.

    What cannot be rung is left to the sweep, which tops the queues up every second.
    """

    #: After a failure Redis is left alone for this long. The sweep rings meanwhile, and finds out when it is back.
    PAUSE_SECONDS = 1.0
    #: After a queue was found full.
    FULL_PAUSE_SECONDS = 0.1

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._asked: dict[str, tuple[int, int]] = {}  # backend -> (at_most, up_to) of the next trip
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def ring(self, backend: str, jobs: int = 1, *, up_to: int = ENOUGH) -> None:
        """There are this many more jobs for this backend. Call it after the commit. Returns at once and never fails."""
        with self._wake:
            before, limit = self._asked.get(backend, (0, 0))
            self._asked[backend] = (before + jobs, max(limit, up_to))
            if self._thread is None:
                # Not before: a thread does not survive the fork that made this process.
                self._thread = threading.Thread(target=self._run, name="bell", daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=3)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._asked or self._closed)
                if self._closed:
                    return
                asked, self._asked = self._asked, {}
            try:
                refused = [
                    put(self._app, backend, at_most=at_most, up_to=up_to) for backend, (at_most, up_to) in asked.items()
                ]
                if any(refused):
                    # It holds enough, so there is no hurry: looking at every submission would cost as much as ringing.
                    self._pause(self.FULL_PAUSE_SECONDS)
            except Exception as error:  # noqa: BLE001  kombu, redis-py and sockets raise many kinds
                log.warning("Redis could not be rung (%s); the sweep will", type(error).__name__)
                self._pause(self.PAUSE_SECONDS)

    def _pause(self, seconds: float) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._closed, timeout=seconds)
