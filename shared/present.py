"""Whether a worker is there: its row was written lately, and does not say that it is stuck."""

from sqlalchemy import ColumnElement, and_

from shared.database import now
from shared.tables import workers

#: A worker that was not seen for so long is gone or stopped: it writes its row every five seconds or oftener.
GONE_SECONDS = 20.0

#: What stands in a worker's row in place of a backend, if it makes no images; DELIVERIES of tickets.py is the other.
SWEEP = "sweep"


def was_seen(within_seconds: float = GONE_SECONDS) -> ColumnElement[bool]:
    """Its heartbeat came within this time."""
    return workers.c.seen_at > now(-min(within_seconds, GONE_SECONDS))


def is_present(within_seconds: float = GONE_SECONDS) -> ColumnElement[bool]:
    """It was seen, and makes progress as far as it knows."""
    return and_(was_seen(within_seconds), workers.c.trouble.is_(None))
