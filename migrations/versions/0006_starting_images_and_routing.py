"""Jobs that start from an image, how a job came to its backend, and pictures and deliveries found by what they are."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcTime

revision = "0006"
down_revision = "0005"

# There is no way down: a database is taken back by its backup.


def upgrade() -> None:
    op.create_table(
        "inputs",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(10), nullable=False),
        sa.Column("content_type", sa.String(20), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "name", name="pk_inputs"),
    )
    op.add_column("jobs", sa.Column("routing", sa.JSON()))
    made = sa.text("image_sha256 IS NOT NULL")
    op.create_index(
        "ix_jobs_image_sha256", "jobs", ["project_id", "image_sha256"], postgresql_where=made, sqlite_where=made
    )
    op.create_index("ix_deliveries_project_id_status_id", "deliveries", ["project_id", "status", "id"])
