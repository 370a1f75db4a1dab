"""Where a job stands, as conditions for statements, spelt as the partial indexes spell them."""

from enum import StrEnum

from sqlalchemy import ColumnClause, ColumnElement, and_, literal_column, or_

from shared.database import now
from shared.tables import Outcome, Status, attempts, jobs

TERMINAL = frozenset({Status.succeeded, Status.failed, Status.canceled, Status.expired})


def spelt(word: StrEnum) -> ColumnClause[str]:
    """One of our words, spelt out in the statement and not bound: a database uses a partial index only for a condition
    that it can see. Once and for all: `literal_execute` would spell it at each execution, which takes longer than
    SQLite needs for the statement.
    """
    return literal_column(f"'{word.value}'")


def is_status(*statuses: Status) -> ColumnElement[bool]:
    """Whether a job stands in one of these, written so that the partial indexes serve it."""
    if len(statuses) == 1:
        return jobs.c.status == spelt(statuses[0])
    return jobs.c.status.in_([spelt(status) for status in statuses])


CLAIMABLE = and_(is_status(Status.queued), jobs.c.ready)
ATTEMPT_RUNS = attempts.c.outcome == spelt(Outcome.running)
NEVER_TRIED = jobs.c.failures + jobs.c.crashes == 0


def too_old() -> ColumnElement[bool]:
    """Whether a queued job has waited longer than it may."""
    past_deadline = and_(jobs.c.deadline_at.is_not(None), jobs.c.deadline_at < now())  # never NULL: it is negated too
    return or_(jobs.c.queue_until < now(), and_(past_deadline, NEVER_TRIED))
