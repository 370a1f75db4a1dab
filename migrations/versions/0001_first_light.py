"""First light: projects and keys, jobs with their attempts and events, pictures."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcTime

revision = "0001"
down_revision = None

# There is no way down: a database is taken back by its backup.


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
        sa.UniqueConstraint("name", name="uq_projects_name"),
    )
    op.create_table(
        "keys",
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("bootstrap", sa.Boolean(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("prefix", name="pk_keys"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_keys_project_id"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(100), nullable=False),
        sa.Column("backend_asked", sa.String(20), nullable=False),
        sa.Column("backend", sa.String(20), nullable=False),
        sa.Column("sandbox", sa.Boolean(), nullable=False),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("ready_at", UtcTime()),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("deadline_at", UtcTime()),
        sa.Column("queue_until", UtcTime(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(100)),
        sa.Column("lease_until", UtcTime()),
        sa.Column("attempt_deadline_at", UtcTime()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("refusals", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("started_at", UtcTime()),
        sa.Column("completed_at", UtcTime()),
        sa.Column("error", sa.JSON()),
        sa.Column("image_attempt", sa.Integer()),
        sa.Column("image_content_type", sa.String(20)),
        sa.Column("image_width", sa.Integer()),
        sa.Column("image_height", sa.Integer()),
        sa.Column("image_bytes", sa.Integer()),
        sa.Column("image_sha256", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    # What the claim and the sweep look for. Each holds only the rows that are looked for, so that a million ended
    # or waiting jobs cost them nothing; the reasons and figures stand in docs/decisions.md.
    _partial_index(
        "ix_jobs_claim", ["backend", "rank", "id"], "status = 'queued' AND ready", "status = 'queued' AND ready = 1"
    )
    _partial_index(
        "ix_jobs_not_ready", ["ready_at"], "status = 'queued' AND NOT ready", "status = 'queued' AND ready = 0"
    )
    _partial_index("ix_jobs_queue_until", ["queue_until"], "status = 'queued'")
    _partial_index("ix_jobs_deadline_at", ["deadline_at"], "status = 'queued' AND deadline_at IS NOT NULL")
    _partial_index("ix_jobs_lease_until", ["lease_until"], "status = 'running'")
    op.create_index("ix_jobs_project_id_id", "jobs", ["project_id", "id"])
    op.create_index("ix_jobs_project_id_status_id", "jobs", ["project_id", "status", "id"])

    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("backend", sa.String(20), nullable=False),
        sa.Column("worker", sa.String(100), nullable=False),
        sa.Column("price", sa.Integer(), nullable=False),
        sa.Column("started_at", UtcTime(), nullable=False),
        sa.Column("deadline_at", UtcTime(), nullable=False),
        sa.Column("completed_at", UtcTime()),
        sa.Column("outcome", sa.String(10), nullable=False),
        sa.Column("billed", sa.String(7), nullable=False),
        sa.Column("error", sa.JSON()),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_attempts"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_attempts_job_id"),
    )
    _partial_index("ix_attempts_running", ["deadline_at"], "outcome = 'running'", table="attempts")

    op.create_table(
        "events",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("type", sa.String(40), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "sequence", name="pk_events"),
        sa.UniqueConstraint("id", name="uq_events_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_events_job_id"),
    )
    op.create_table(
        "images",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("content_type", sa.String(20), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "attempt", name="pk_images"),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Pictures are compressed already: don't let PostgreSQL try.
        op.execute("ALTER TABLE images ALTER COLUMN data SET STORAGE EXTERNAL")


def _partial_index(
    name: str, columns: list[str], where: str, where_on_sqlite: str | None = None, *, table: str = "jobs"
) -> None:
    op.create_index(
        name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where_on_sqlite or where)
    )
