"""Migrations: that they make the tables that the code is written for, and that two at once do no harm."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

import migrations
from migrations import migrate
from shared import settings, tallies
from shared.database import Database
from shared.tables import metadata
from tests.servers import PostgresServer
from tests.service import eventually
from worker.feed import Feed

NOW = "2026-11-01 12:00:00.000"


def test_tables_and_migrations_agree(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def indexes(database: Database) -> dict[str, str]:
    """Every index as its database spells it: columns, their order, and the condition of a partial one."""
    if database.is_sqlite:
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    else:
        query = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
    with database.read() as connection:
        return {name: " ".join(sql.split()) for name, sql in connection.execute(text(query))}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_indexes_and_migrations_agree_in_their_conditions_too(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """Alembic compares no condition, and what is not in its partial index no claim finds."""
    created, migrated = empty(kind, tmp_path / "created.db", request), empty(kind, tmp_path / "migrated.db", request)
    with created.write() as tx:
        metadata.create_all(tx)
    migrate.upgrade(migrated)
    expected = indexes(created)
    found = {name: sql for name, sql in indexes(migrated).items() if not name.startswith("alembic_version")}
    assert found == expected and "status" in expected["ix_jobs_claim"].partition("WHERE")[2]
    created.close()
    migrated.close()


def test_a_migrated_database_stands_at_the_newest_revision(database: Database) -> None:
    with database.read() as connection:
        assert migrations.current(connection) == migrations.newest()


def test_the_newest_revision_is_the_one_that_alembic_upgrades_to() -> None:
    folder = Path(migrations.__file__).parent
    assert migrations.newest() == ScriptDirectory(str(folder)).get_current_head()
    assert migrations.knows(migrations.newest()) and not migrations.knows("9999")


def test_a_database_that_was_never_migrated_stands_at_no_revision(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new.db'}")
    with database.read() as connection:
        assert migrations.current(connection) is None
    database.close()


def empty(kind: str, path: Path, request: pytest.FixtureRequest) -> Database:
    """A database that was never migrated. `path`: of its file, if it is one."""
    if kind == "sqlite":
        return Database(f"sqlite:///{path}")
    server: PostgresServer = request.getfixturevalue("postgres")
    return Database(server.url(server.new_database()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_that_start_at_once_do_no_harm(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    database = empty(kind, tmp_path / "new.db", request)
    url = database.url
    environ = settings.child_environ({"DARKROOM_DATABASE_URL": url, "DARKROOM_SECRET_KEY": "s" * 32})
    # As `python -m migrations`, but that one which stands still in the middle is waited for.
    patient = (
        "import runpy, shared.database as it; it.BUSY_SECONDS = 60; runpy.run_module('migrations', None, '__main__')"
    )
    running = [subprocess.Popen([sys.executable, "-c", patient], env=environ, stderr=subprocess.PIPE) for _ in range(4)]
    said = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    with database.read() as connection:
        assert migrations.current(connection) == migrations.newest()
    database.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_who_begins_to_count_in_the_middle_counts_the_queue_right(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """Before the tallies there were jobs: some waiting, some not, some whose latest events have no number yet."""
    database = empty(kind, tmp_path / "new.db", request)
    with database.write() as tx:
        command.upgrade(migrate._config(tx), "0003")
    moves = {
        "waits": ["queued"],
        "came_back": ["queued", "started", "queued"],
        "runs": ["queued", "started"],
        "ended": ["queued", "started", "succeeded"],
        "new": ["-queued"],
        "started_since": ["queued", "-started"],
        "canceled_since": ["queued", "-canceled"],
    }
    what = "id, project_id, status, sequence, model, backend_asked, backend, sandbox, input, metadata, warnings, ready"
    more = "rank, queue_until, fence, attempts, failures, refusals, crashes, created_at, started_at, completed_at"
    values = ":id, 'prj_a', 'queued', 1, 'm', 'auto', 'dataoorts', :no, '{}', '{}', '[]', :no, 0, :now, 0, 1, 0, 0, 0"
    a_job = f"INSERT INTO jobs ({what}, {more}) VALUES ({values}, :now, :now, :now)"  # noqa: S608  it is all ours
    with database.write() as tx:
        tx.execute(
            text("INSERT INTO projects (id, name, created_at, feed) VALUES ('prj_a', 'a', :now, 100)"), {"now": NOW}
        )
        for number, (name, events) in enumerate(moves.items()):
            tx.execute(text(a_job), {"id": f"job_{name}", "no": False, "now": NOW})
            for sequence, event in enumerate(events, 1):
                row = {"id": f"{name}{sequence}", "job": f"job_{name}", "sequence": sequence, "now": NOW}
                row |= {"type": f"job.{event.strip('-')}", "number": None if "-" in event else 10 * number + sequence}
                tx.execute(
                    text(
                        "INSERT INTO events (id, subject_id, sequence, project_id, type, data, created_at, number)"
                        " VALUES (:id, :job, :sequence, 'prj_a', :type, '{\"attempts\": 1}', :now, :number)"
                    ),
                    row,
                )
    migrate.upgrade(database)
    assert Feed(database).round() == 3
    with database.read() as connection:
        counted = tallies.read(connection)
    assert counted["queued", "dataoorts"] == 3  # waits, came_back, new
    assert counted["jobs_submitted",] == counted["jobs_ended", "canceled"] == 1  # since then
    database.close()


class Blocked:
    """A database a migration behind, in which somebody has read jobs and does not end his transaction."""

    def __init__(self, server: PostgresServer) -> None:
        self.database = Database(server.url(server.new_database()))
        self.other = Database(self.database.url, connections=1)
        with self.database.write() as tx:
            command.upgrade(migrate._config(tx), "0005")
        self._stack = ExitStack()
        self._tx = self._stack.enter_context(self.other.write())
        self._tx.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        self._tx.execute(text("SELECT count(*) FROM jobs"))
        self.process = self._tx.scalar(text("SELECT pg_backend_pid()"))

    def end(self) -> None:
        self._stack.close()

    def close(self) -> None:
        self.end()
        self.other.close()
        self.database.close()


@pytest.fixture
def blocked(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocked]:
    monkeypatch.setattr(migrate, "LOCK_SECONDS", 0.5)
    monkeypatch.setattr(migrate, "PAUSE_SECONDS", 0.1)
    blocked = Blocked(postgres)
    yield blocked
    blocked.close()


def test_a_migration_that_waits_for_a_lock_lets_the_others_through_and_goes_on_when_it_is_free(
    blocked: Blocked, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(1) as pool:
        migrating = pool.submit(migrate.upgrade, blocked.database)
        eventually("it says that it waits", lambda: "a lock is not to be had" in caplog.text)
        for _ in range(5):  # a reader whose limit (8 s) is far above the wait of the migration
            with blocked.database.read() as connection:
                assert connection.scalar(text("SELECT count(*) FROM jobs")) == 0
        assert not migrating.done()
        blocked.end()
        migrating.result(60)
    assert f"the oldest transaction is process {blocked.process} (darkroom, idle in transaction" in caplog.text
    with blocked.database.read() as connection:
        assert migrations.current(connection) == migrations.newest()


def test_a_migration_that_never_gets_its_lock_changes_nothing_and_says_whose_it_is(
    blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "TRIED_SECONDS", 1.0)
    with pytest.raises(migrate.InUse, match=rf"process {blocked.process} .*End it, with") as raised:
        migrate.upgrade(blocked.database)
    assert "nothing was changed" in str(raised.value)
    with blocked.database.read() as connection:
        assert migrations.current(connection) == "0005"


def started(database_url: str, **more: str) -> subprocess.Popen[str]:
    environ = {"DARKROOM_DATABASE_URL": database_url, "DARKROOM_SECRET_KEY": "s" * 32, **more}
    return subprocess.Popen(
        [sys.executable, "-m", "migrations"], env=settings.child_environ(environ), stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nowhere/new.db", "file/new.db"], ids=["no folder", "no folder but a file"])
def test_a_folder_that_is_not_there_is_said_in_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    process = started(f"sqlite:///{tmp_path / name}")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert said.startswith("darkroom can't migrate the database: ") and len(said.splitlines()) == 1, said
    assert str((tmp_path / name).parent) in said


@pytest.mark.slow
def test_a_database_that_is_away_is_waited_for() -> None:
    server = PostgresServer()
    process = started(server.tcp_url("postgres"))
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "migrate migrations: waiting for the database: it does not answer" in line, line
        server.start(tcp=True)
        assert process.wait(60) == 0, process.stderr.read()
        database = Database(server.url("postgres"))
        with database.read() as connection:
            assert migrations.current(connection) == migrations.newest()
        database.close()
    finally:
        process.kill()
        process.communicate()
        server.close()
