"""Whether a worker is there: its row was written lately. Whether it makes progress its row says too (`trouble`)."""

from sqlalchemy import ColumnElement

from shared.database import now
from shared.tables import workers

#: A worker that was not seen for so long is gone or stopped: it writes its row every five seconds or oftener.
GONE_SECONDS = 20.0

#: What stands in a worker's row in place of a backend, if it makes no images; DELIVERIES of tickets.py is the other.
SWEEP = "sweep"


def was_seen(within_seconds: float = GONE_SECONDS) -> ColumnElement[bool]:
    """Its heartbeat came within this time."""
    return workers.c.seen_at > now(-min(within_seconds, GONE_SECONDS))
