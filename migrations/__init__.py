"""Changes of the database's shape, one readable file a change: which there are, and which one a database stands at.

Alembic runs them (migrate.py). It is not needed to know this, and every process asks at its start: so it is not loaded.
"""

from pathlib import Path

from sqlalchemy import Connection, inspect, text

_FOLDER = Path(__file__).parent


def _revisions() -> list[str]:
    """By the names of their files, which begin with it: 0001, 0002."""
    return sorted(file.name.partition("_")[0] for file in (_FOLDER / "versions").glob("[0-9]*_*.py"))


def newest() -> str:
    """The revision that this code is written for."""
    return _revisions()[-1]


def knows(revision: str) -> bool:
    """Whether this code has a migration of that name: if not, newer code made it."""
    return revision in _revisions()


def current(connection: Connection) -> str | None:
    """The revision that a database stands at; None if it was never migrated."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
