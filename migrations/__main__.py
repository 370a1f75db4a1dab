"""`python -m migrations`: upgrade. `python -m migrations new "what"`: write the file of a new migration."""

import logging
import sys
import tempfile
import time
from pathlib import Path

from migrations import migrate
from shared import guards, logs, settings
from shared.announcements import client
from shared.database import AWAY, Database

log = logging.getLogger("migrations")


def _upgrade(wanted: settings.Settings) -> None:
    """A database that is away is waited for, as workers do: it may come up later than this does."""
    database = Database(wanted.database_url)
    guards.wait_for_database(guards.Place(wanted, database, client(wanted)), log.warning, time.sleep)
    try:
        migrate.upgrade(database)
    except migrate.InUse as error:
        sys.exit(f"darkroom can't migrate the database:\n{error}")
    except AWAY as error:
        mend = "run this again, nothing was changed"
        if database.is_sqlite:
            folder = Path(str(database.engine.url.database)).parent
            mend = f"{folder} must be a folder that is there and yours to write (DARKROOM_DATABASE_URL)"
        sys.exit(f"darkroom can't migrate the database: {guards.first_line(error)}; {mend}")
    database.close()


if sys.argv[1:2] == ["new"] and len(sys.argv) == 3:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Database(f"sqlite:///{Path(folder) / 'scratch.db'}")
        migrate.upgrade(scratch)
        migrate.write_new(scratch, sys.argv[2])
        scratch.close()
elif sys.argv[1:]:
    sys.exit('usage: python -m migrations [new "what it changes"]')
else:
    try:
        given = settings.load()
    except settings.SettingsError as error:
        sys.exit(f"darkroom can't migrate the database:\n{error}")
    logs.configure(given.log_format, "migrate")
    logs.hide(given.secrets)
    _upgrade(given)
