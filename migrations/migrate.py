"""Runs the migrations, by Alembic.

`python -m migrations` brings the database of DATABASE_URL to the newest one. Two that start at once do no harm: one
waits for the other, then finds nothing left to do.

On PostgreSQL whoever comes after an ALTER that waits for a lock waits behind it, readers too. So it waits for some
seconds, lets the others through, and is tried again.
"""

import logging
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from shared.database import Database, take_as_long_as_it_needs

log = logging.getLogger(__name__)

#: So long a migration waits for a lock, in seconds: shorter than others wait for theirs (BUSY_SECONDS).
LOCK_SECONDS = 5.0
#: So long it is tried again, and between two tries those have their turn who came after it.
TRIED_SECONDS, PAUSE_SECONDS = 120.0, 3.0

_FOLDER = Path(__file__).parent

#: Any number, the same for all who migrate this database: what they queue behind on PostgreSQL.
_LOCK = 0x6461726B
#: What PostgreSQL calls a lock_timeout.
_LOCK_NOT_AVAILABLE = "55P03"


class InUse(Exception):
    """Somebody held a lock that the migration needs, for as long as it was tried. It says who, and what to do."""


def upgrade(database: Database) -> None:
    """Bring the database to the newest revision, all in one transaction: it succeeds whole or changes nothing.

    Raises InUse.
    """
    deadline = time.monotonic() + TRIED_SECONDS
    while True:
        try:
            with database.write() as tx:
                _upgrade(tx)
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            waited_for = _oldest_transaction(database)
            if time.monotonic() > deadline:
                raise InUse(
                    f"for {TRIED_SECONDS:.0f} s a lock that it needs was not to be had; nothing was changed. "
                    f"The oldest transaction is {waited_for}. End it, with `SELECT pg_terminate_backend(...)` if need "
                    "be, then run `python -m migrations` again."
                ) from error
        log.warning("a lock is not to be had, it is tried again; the oldest transaction is %s", waited_for)
        time.sleep(PAUSE_SECONDS)


def _upgrade(tx: Connection) -> None:
    take_as_long_as_it_needs(tx)
    if tx.dialect.name == "postgresql":
        tx.execute(text("SET LOCAL lock_timeout = 0"))  # nobody queues behind who waits for another migration
        tx.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        tx.execute(text("SELECT set_config('lock_timeout', :limit, true)"), {"limit": f"{LOCK_SECONDS * 1000:.0f}"})
    command.upgrade(_config(tx), "head")


def _oldest_transaction(database: Database) -> str:
    """Who most likely holds the lock: of those that hold any, who began first."""
    query = """
        SELECT pid, application_name, state, extract(epoch FROM clock_timestamp() - xact_start) AS seconds
        FROM pg_stat_activity AS activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
          AND EXISTS (SELECT 1 FROM pg_locks WHERE pg_locks.pid = activity.pid AND locktype = 'relation' AND granted)
        ORDER BY xact_start LIMIT 1"""
    with database.read() as connection:
        found = connection.execute(text(query)).one_or_none()
    if found is None:
        return "over by now, or not shown to this user"
    return f"process {found.pid} ({found.application_name or 'no name'}, {found.state}, for {found.seconds:.0f} s)"


def write_new(database: Database, what: str) -> None:
    """Write the file of a new migration: from this database, which stands at the newest, to shared/tables.py."""
    number = len(list((_FOLDER / "versions").glob("[0-9]*.py"))) + 1
    with database.write() as tx:
        config = _config(tx)
        config.set_main_option("file_template", f"{number:04}_%%(slug)s")
        command.revision(config, what, autogenerate=True, rev_id=f"{number:04}")


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    config.attributes["connection"] = connection
    return config
