"""Changes of the database's shape, one readable file a change, run by Alembic.

`python -m migrations` brings the database of DATABASE_URL to the newest one. Two that start at once do no harm: one
waits for the other, then finds nothing left to do.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from shared.database import Database, take_as_long_as_it_needs

_FOLDER = Path(__file__).parent

#: Any number, the same for all who migrate this database: what they queue behind on PostgreSQL.
_LOCK = 0x6461726B


def newest() -> str:
    """The revision that this code is written for."""
    head = ScriptDirectory(str(_FOLDER)).get_current_head()
    assert head is not None
    return head


def knows(revision: str) -> bool:
    """Whether this code has a migration of that name: if not, newer code made it."""
    return any(script.revision == revision for script in ScriptDirectory(str(_FOLDER)).walk_revisions())


def upgrade(database: Database) -> None:
    """Bring the database to the newest revision, all in one transaction: it succeeds whole or changes nothing."""
    with database.write() as tx:
        if tx.dialect.name == "postgresql":
            take_as_long_as_it_needs(tx)  # also the one that waits for the other
            tx.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        command.upgrade(_config(tx), "head")


def write_new(database: Database, what: str) -> None:
    """Write the file of a new migration: from this database, which stands at the newest, to shared/tables.py."""
    number = len(list((_FOLDER / "versions").glob("[0-9]*.py"))) + 1
    with database.write() as tx:
        config = _config(tx)
        config.set_main_option("file_template", f"{number:04}_%%(slug)s")
        command.revision(config, what, autogenerate=True, rev_id=f"{number:04}")


def current(connection: Connection) -> str | None:
    """The revision that a database stands at; None if it was never migrated."""
    return MigrationContext.configure(connection).get_current_revision()


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    config.attributes["connection"] = connection
    return config
