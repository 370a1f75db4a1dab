"""What Alembic runs for every command: the migrations, on the connection that migrate.py hands over."""

from typing import Any, Literal

from alembic import context

from shared.database import UtcTime
from shared.tables import metadata


def _spell(kind: str, item: Any, _autogenerate: object) -> str | Literal[False]:
    """How a type is written in a new migration; False: Alembic's own way."""
    return "UtcTime()" if kind == "type" and isinstance(item, UtcTime) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_item=_spell,
    render_as_batch=True,  # SQLite alters a table by copying it; the same migration must run on both
)
with context.begin_transaction():
    context.run_migrations()
