"""Tallies: what /metrics shows, and where each row stood when it was tallied last. The request that a job came with.

Counters begin here: what ended before is not counted. What waits now is, or the queue would be counted below nothing.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

# There is no way down: a database is taken back by its backup.

#: By the last event that has a number: the moves after it are tallied when their events get theirs.
_QUEUED = """
INSERT INTO tallies (series, amount)
SELECT 'queued/' || jobs.backend, count(*)
FROM events JOIN jobs ON jobs.id = events.subject_id
WHERE events.type = 'job.queued' AND events.number IS NOT NULL
  AND NOT EXISTS (
    SELECT 1 FROM events later
    WHERE later.subject_id = events.subject_id AND later.sequence = events.sequence + 1 AND later.number IS NOT NULL
  )
GROUP BY jobs.backend
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("request_id", sa.String(128)))
    op.create_table(
        "tallies",
        sa.Column("series", sa.String(100), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("series", name="pk_tallies"),
    )
    op.execute(_QUEUED)
    for table, stands, first, order in (
        ("attempts", "outcome", "running", "completed_at"),
        ("deliveries", "status", "none", "id"),
        ("delivery_tries", "outcome", "running", "started_at"),
    ):
        op.add_column(table, sa.Column("tallied", sa.String(10), nullable=False, server_default=first))
        if table != "deliveries":  # they are counted as they stand, and so from the beginning
            # What is unknown may still become known, and is then taken out of what is unknown.
            op.execute(f"UPDATE {table} SET tallied = {stands} WHERE {stands} != 'unknown'")  # noqa: S608
        where = sa.text(f"tallied != {stands}")
        op.create_index(f"ix_{table}_not_tallied", table, [order], postgresql_where=where, sqlite_where=where)
