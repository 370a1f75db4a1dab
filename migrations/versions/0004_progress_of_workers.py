"""Progress of workers: what each has in hand and has done, and since when it moves nothing."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcTime

revision = "0004"
down_revision = "0003"

# There is no way down: a database is taken back by its backup.


def upgrade() -> None:
    # With defaults: workers of the version before write their rows while those of this one start.
    op.add_column("workers", sa.Column("machine", sa.String(64)))
    op.add_column("workers", sa.Column("in_hand", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("workers", sa.Column("done", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("workers", sa.Column("progressed_at", UtcTime()))
    op.add_column("workers", sa.Column("heard_at", UtcTime()))
    op.add_column("workers", sa.Column("trouble", sa.String(300)))
