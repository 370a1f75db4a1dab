"""The whole of a job: idempotency keys, retries, jobs whose data were removed, and who is at work."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcTime

revision = "0002"
down_revision = "0001"

# There is no way down: a database is taken back by its backup.


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("project_id", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_table(
        "workers",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("backend", sa.String(20), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("seen_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", "backend", name="pk_workers"),
    )
    op.add_column("jobs", sa.Column("retried_from", sa.String(40)))
    op.add_column("jobs", sa.Column("data_removed", sa.Boolean(), nullable=False, server_default=sa.false()))
    where = sa.text("retried_from IS NOT NULL")
    op.create_index("ix_jobs_retried_from", "jobs", ["retried_from"], postgresql_where=where, sqlite_where=where)
