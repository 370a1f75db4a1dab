"""`python -m migrations`: upgrade. `python -m migrations new "what"`: write the file of a new migration."""

import sys
import tempfile
from pathlib import Path

import migrations
from shared import logs, settings
from shared.database import Database

if sys.argv[1:2] == ["new"] and len(sys.argv) == 3:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Database(f"sqlite:///{Path(folder) / 'scratch.db'}")
        migrations.upgrade(scratch)
        migrations.write_new(scratch, sys.argv[2])
        scratch.close()
elif sys.argv[1:]:
    sys.exit('usage: python -m migrations [new "what it changes"]')
else:
    try:
        wanted = settings.load()
        logs.configure(wanted.log_format, "migrate")
        database = Database(wanted.database_url)
        migrations.upgrade(database)
        database.close()
    except (settings.SettingsError, migrations.InUse) as error:
        sys.exit(f"darkroom can't migrate the database:\n{error}")
