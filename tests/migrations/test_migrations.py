"""Migrations: that they make the tables that the code is written for, and that two at once do no harm."""

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import migrations
from shared import settings
from shared.database import Database
from shared.tables import metadata
from tests.servers import PostgresServer


def test_tables_and_migrations_agree(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_a_migrated_database_stands_at_the_newest_revision(database: Database) -> None:
    with database.read() as connection:
        assert migrations.current(connection) == migrations.newest()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_that_start_at_once_do_no_harm(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.url(server.new_database())
    else:
        url = f"sqlite:///{tmp_path / 'new.db'}"
    environ = settings.child_environ({"DARKROOM_DATABASE_URL": url, "DARKROOM_SECRET_KEY": "s" * 32})
    running = [
        subprocess.Popen([sys.executable, "-m", "migrations"], env=environ, stderr=subprocess.PIPE) for _ in range(4)
    ]
    said = [process.communicate(timeout=60)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    database = Database(url)
    with database.read() as connection:
        assert migrations.current(connection) == migrations.newest()
    database.close()
