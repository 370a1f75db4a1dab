"""The bell: how workers are told that there is work. A ticket says "there is work for this backend" and no more, or
"there are deliveries".

A lost, doubled or stale ticket does no harm, because the database decides who works at what: Redis may be emptied
or be away at any moment. So ringing never waits for Redis in a request, and never fails.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import redis
from celery import Celery
from kombu import Queue

from shared import transport
from shared.courier import Courier
from shared.settings import Settings

log = logging.getLogger(__name__)

#: The names of the tasks: claim and work until no job is left; claim and send until no delivery is due.
TASK = "darkroom.generate"
DELIVER_TASK = "darkroom.deliver"

#: What is rung for, where it is not a backend.
DELIVERIES = "deliver"

#: More tickets than this wait in no queue. A ticket starts one slot, which works until no job is left and rings while
#: it finds more than its own: so a handful starts them all within a few milliseconds, and a flood of tickets, each of
#: which costs a worker more than a claim, never builds up.
ENOUGH = 16


def queue_of(work: str) -> str:
    """The Celery queue of a backend, or of DELIVERIES."""
    return work if work == DELIVERIES else f"generate.{work}"


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's settings, for those who ring and those who answer. Each differs from the default for a reason."""
    transport.install()
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
            "priority_steps": [0],  # tickets have no priorities: one list a queue, not four
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
        "max_retries": 0,  # kombu's own are three, and take 6 s where Redis refuses connections
    }
    return app


def put(app: Celery, work: str, *, at_most: int, up_to: int = ENOUGH) -> int:
    """Put tickets into the queue of a backend, or of DELIVERIES: `at_most` so many, and no more once it holds `up_to`.

    Returns how many found no room. Raises what kombu and redis-py raise while Redis is away.
    """
    task, arguments = (DELIVER_TASK, ()) if work == DELIVERIES else (TASK, (work,))
    queue: Any = Queue(queue_of(work))  # celery-types knows no queues in send_task
    with app.producer_or_acquire() as producer:
        missing: int = max(min(at_most, up_to - producer.channel.waiting(queue.name)), 0)
        for _ in range(missing):
            app.send_task(task, arguments, queue=queue, producer=producer, retry=False, ignore_result=True)
        return at_most - missing


def waiting(client: redis.Redis, queues: Iterable[str]) -> int | None:
    """How many tickets lie in these queues; None if Redis does not answer."""
    try:
        return sum(int(client.llen(queue)) for queue in queues)
    except (redis.RedisError, OSError):
        return None


class Bell(Courier):
    """Rings from a thread of its own, so that nobody waits for Redis. Many rings at once become one trip.

    What cannot be rung is left to the sweep, which rings every second for as long as jobs wait.
    """

    #: After a failure Redis is left alone for this long. The sweep rings meanwhile, and finds out when it is back.
    PAUSE_SECONDS = 1.0
    #: After a queue was found to hold enough, so there is no hurry: looking each time would cost as much as ringing.
    FULL_PAUSE_SECONDS = 0.1

    def __init__(self, app: Celery) -> None:
        super().__init__("bell")
        self._app = app
        self._asked: Counter[str] = Counter()

    def ring(self, work: str, count: int = 1) -> None:
        """There are this many more jobs for this backend, or DELIVERIES. Call it after the commit.

        Returns at once and never fails.
        """
        with self._wake:
            self._asked[work] += count
            self._send()

    def _waiting(self) -> bool:
        return bool(self._asked)

    def _run_errands(self) -> float:
        with self._wake:
            asked, self._asked = self._asked, Counter()
        try:
            refused = [put(self._app, work, at_most=count) for work, count in asked.items()]
        except Exception as error:  # noqa: BLE001  kombu, redis-py and sockets raise many kinds
            log.warning("Redis could not be rung (%s); the sweep will", type(error).__name__)
            return self.PAUSE_SECONDS
        return self.FULL_PAUSE_SECONDS if any(refused) else 0
