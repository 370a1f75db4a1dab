"""Events that arrive: the project's feed, the endpoints that are told, and every delivery with its tries."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcTime

revision = "0003"
down_revision = "0002"

# There is no way down: a database is taken back by its backup.


def upgrade() -> None:
    op.add_column("projects", sa.Column("feed", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("webhook", sa.JSON(none_as_null=True)))
    _events()
    op.create_table(
        "endpoints",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("description", sa.String(200), nullable=False),
        sa.Column("events", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("disabled_at", UtcTime()),
        sa.Column("disabled_reason", sa.String(20)),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_endpoints"),
    )
    op.create_index("ix_endpoints_project_id_id", "endpoints", ["project_id", "id"])
    op.create_table(
        "webhook_secrets",
        sa.Column("owner_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("sealed", sa.String(200), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("expires_at", UtcTime()),
        sa.PrimaryKeyConstraint("owner_id", "number", name="pk_webhook_secrets"),
    )
    _deliveries()


def _events() -> None:
    # Its subject may be an endpoint too, and so is no reference to a job. SQLite has to copy the table for that.
    with op.batch_alter_table("events") as events:
        events.drop_constraint("fk_events_job_id", type_="foreignkey")
        events.alter_column("job_id", new_column_name="subject_id")
        events.add_column(sa.Column("number", sa.BigInteger()))
    where = sa.text("number IS NULL")
    op.create_index("ix_events_not_numbered", "events", ["created_at"], postgresql_where=where, sqlite_where=where)
    where = sa.text("number IS NOT NULL")
    op.create_index(
        "ix_events_feed", "events", ["project_id", "number"], unique=True, postgresql_where=where, sqlite_where=where
    )


def _deliveries() -> None:
    op.create_table(
        "receivers",
        sa.Column("id", sa.String(330), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("window", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("failing_since", UtcTime()),
        sa.Column("rest_until", UtcTime()),
        sa.Column("next_due_at", UtcTime()),
        sa.PrimaryKeyConstraint("id", name="pk_receivers"),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("event_id", sa.String(40), nullable=False),
        sa.Column("subject_id", sa.String(40), nullable=False),
        sa.Column("type", sa.String(40), nullable=False),
        sa.Column("endpoint_id", sa.String(40)),
        sa.Column("receiver", sa.String(330), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("is_retry", sa.Boolean(), nullable=False),
        sa.Column("scheduled_at", UtcTime(), nullable=False),
        sa.Column("due_at", UtcTime(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(100)),
        sa.Column("lease_until", UtcTime()),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("completed_at", UtcTime()),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
    )
    op.create_table(
        "delivery_tries",
        sa.Column("delivery_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("started_at", UtcTime(), nullable=False),
        sa.Column("outcome", sa.String(10), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("status", sa.Integer()),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("answer", sa.Text()),
        sa.PrimaryKeyConstraint("delivery_id", "number", name="pk_delivery_tries"),
    )
    for name, table, columns, condition in (
        ("ix_receivers_next_due_at", "receivers", ["next_due_at"], "next_due_at IS NOT NULL"),
        ("ix_deliveries_due", "deliveries", ["receiver", "is_retry", "due_at", "id"], "status = 'pending'"),
        ("ix_deliveries_sending", "deliveries", ["host", "receiver"], "status = 'sending'"),
        ("ix_deliveries_project_id_id", "deliveries", ["project_id", "id"], None),
        ("ix_deliveries_subject_id_id", "deliveries", ["subject_id", "id"], None),
        ("ix_deliveries_endpoint_id_id", "deliveries", ["endpoint_id", "id"], "endpoint_id IS NOT NULL"),
    ):
        where = None if condition is None else sa.text(condition)
        op.create_index(name, table, columns, postgresql_where=where, sqlite_where=where)
