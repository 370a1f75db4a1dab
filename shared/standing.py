"""Where a job stands, as conditions for statements, spelt as the partial indexes spell them."""

from sqlalchemy import ColumnElement, and_, literal, or_

from shared.database import now
from shared.tables import Outcome, Status, attempts, jobs

TERMINAL = frozenset({Status.succeeded, Status.failed, Status.canceled, Status.expired})


def is_status(status: Status) -> ColumnElement[bool]:
    """Whether a job stands there, written so that the partial indexes serve it."""
    # Spelt out in the statement, not bound: a database uses a partial index only for a condition it can see.
    return jobs.c.status == literal(status.value, literal_execute=True)


CLAIMABLE = and_(is_status(Status.queued), jobs.c.ready)
ATTEMPT_RUNS = attempts.c.outcome == literal(Outcome.running.value, literal_execute=True)
NEVER_TRIED = jobs.c.failures + jobs.c.crashes == 0


def too_old() -> ColumnElement[bool]:
    """Whether a queued job has waited longer than it may."""
    past_deadline = and_(jobs.c.deadline_at.is_not(None), jobs.c.deadline_at < now())  # never NULL: it is negated too
    return or_(jobs.c.queue_until < now(), and_(past_deadline, NEVER_TRIED))
