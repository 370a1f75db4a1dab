"""${message}"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
from shared.database import UtcTime

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


# There is no way down: a database is taken back by its backup.


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}

