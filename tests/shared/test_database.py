"""The database's clock, its transactions, and what it looks like when it is away."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert, select, text

from shared.database import AWAY, Database, now, now_ms, take_as_long_as_it_needs
from shared.patience import PatientConnection
from shared.tables import projects
from tests.fault_proxy import BLACK_HOLE, FaultProxy, Toxics
from tests.servers import PostgresServer
from tests.service import eventually


def test_the_clock_is_utc_and_takes_offsets(database: Database) -> None:
    began = datetime.now(UTC)
    with database.read() as connection:
        here = connection.scalar(select(now()))
        later = connection.scalar(select(now(2.5)))
        earlier = connection.scalar(select(now(-60)))
        milliseconds = connection.scalar(select(now_ms()))
    ended = datetime.now(UTC)
    assert here is not None and later is not None and earlier is not None and milliseconds is not None
    assert here.tzinfo == UTC
    # However long the questions took: each moment lies between ours, but for what is rounded.
    rounded = timedelta(milliseconds=2)
    for moment in (
        here,
        later - timedelta(seconds=2.5),
        earlier + timedelta(seconds=60),
        datetime.fromtimestamp(milliseconds / 1000, UTC),
    ):
        assert began - rounded <= moment <= ended + rounded


def test_a_moment_comes_back_as_it_was_written(database: Database) -> None:
    moment = datetime(2026, 11, 23, 4, 5, 6, 7000, tzinfo=UTC)
    with database.write() as tx:
        tx.execute(insert(projects).values(id="prj_1", name="a", created_at=moment))
    with database.read() as connection:
        assert connection.scalar(select(projects.c.created_at)) == moment
        assert connection.scalar(
            select(projects.c.id).where(projects.c.created_at < moment + timedelta(milliseconds=1))
        )
        assert not connection.scalar(select(projects.c.id).where(projects.c.created_at < moment))


def test_the_clock_moves_within_a_transaction(postgresql_url: str) -> None:
    database = Database(postgresql_url)
    with database.write() as tx:
        first = tx.scalar(select(now()))
        tx.execute(text("SELECT pg_sleep(0.01)"))
        second = tx.scalar(select(now()))
    assert first is not None and second is not None and second > first
    database.close()


def test_sqlite_is_durable_shared_and_shrinkable(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "auto_vacuum", "foreign_keys", "busy_timeout", "page_size")
        }
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "auto_vacuum": 2,  # INCREMENTAL
        "foreign_keys": 1,
        "busy_timeout": 8000,
        "page_size": 16384,
    }
    database.close()


def test_hundreds_of_threads_write_through_a_few_connections(database_url: str) -> None:
    database = Database(database_url, wait_seconds=60)
    if database._writer is not None:
        database._writer._busy_seconds = 60  # as many as this wait long enough, if one of them stands still
    errors: list[Exception] = []

    def write(number: int) -> None:
        try:
            for step in range(4):
                with database.write() as tx:
                    count = tx.scalar(select(projects.c.id).limit(1))  # a read before the write: what SQLite trips over
                    name = f"{number}-{step}"
                    tx.execute(insert(projects).values(id=f"prj_{name}", name=name, created_at=now()))
                    assert count is None or count
        except Exception as error:  # noqa: BLE001  whatever it is, it is shown
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with database.read() as connection:
        assert len(connection.execute(select(projects.c.id)).all()) == 400
    database.close()


def test_a_dedicated_connection_is_free_while_all_others_are_taken(postgresql_url: str) -> None:
    database = Database(postgresql_url, connections=1, wait_seconds=0.2)
    beat = database.dedicated()
    with database.write():
        with beat.write() as tx:
            assert tx.scalar(text("SELECT 1")) == 1
        with pytest.raises(AWAY), database.write():
            pass
    beat.close()
    database.close()


def test_a_restart_of_postgresql_fails_nobody_after_it(postgres: PostgresServer) -> None:
    server = PostgresServer()
    try:
        server.start(durable=True)
        database = Database(server.url("postgres"), connections=2)
        with database.read() as connection:
            connection.execute(text("SELECT 1"))
        server.stop()
        with pytest.raises(AWAY), database.read() as connection:
            connection.execute(text("SELECT 1"))
        server.start(durable=True)
        with database.read() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        database.close()
    finally:
        server.close()


@pytest.mark.slow
def test_a_server_that_goes_silent_is_waited_for_no_longer_than_that() -> None:
    with ExitStack() as stack:
        server = PostgresServer()
        stack.callback(server.close)
        server.start(tcp=True)
        proxy = stack.enter_context(FaultProxy(server.port))
        database = stack.enter_context(closing(Database(server.tcp_url("postgres", proxy.port), connections=1)))
        for silence in ({"to_server": BLACK_HOLE}, {"to_client": BLACK_HOLE}):
            with pytest.raises(AWAY):
                _ask_into_silence(database, proxy, **silence)
            proxy.heal()
            with database.read() as connection:
                assert connection.scalar(text("SELECT 2")) == 2  # over another connection


def _ask_into_silence(database: Database, proxy: FaultProxy, **silence: Toxics) -> None:
    with database.write() as tx:
        proxy.disturb(**silence)
        driver = tx.connection.driver_connection
        assert isinstance(driver, PatientConnection)
        driver.answer_seconds = 2.0  # of this one alone: the others have an answer to wait for
        tx.execute(text("SELECT 1"))


def test_between_two_rows_of_many_a_transaction_is_idle_and_so_has_a_limit(postgresql_url: str) -> None:
    """In a pipeline it would be active and wait for its client, for ever: with its locks, if the client was stopped."""
    database, states = Database(postgresql_url), []

    with database.write() as tx:
        driver = tx.connection.driver_connection
        assert isinstance(driver, PatientConnection)

        def rows() -> Iterator[tuple[int]]:
            for number in range(3):
                yield (number,)
                with database.read() as connection:
                    asked = text("SELECT state FROM pg_stat_activity WHERE pid = :pid")
                    states.append(connection.scalar(asked, {"pid": driver.info.backend_pid}))

        driver.cursor().executemany("SELECT %s", rows())
    assert states == ["idle in transaction"] * 3
    database.close()


def test_a_migration_may_take_as_long_as_it_needs(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(postgresql_url)
    try:
        with database.write() as tx:
            take_as_long_as_it_needs(tx)
            monkeypatch.setattr(PatientConnection, "answer_seconds", 0.2)  # not before: what went ahead has limits too
            tx.execute(text("SELECT pg_sleep(0.5)"))
        with pytest.raises(AWAY), Database(postgresql_url).write() as tx:
            tx.execute(text("SELECT pg_sleep(0.5)"))
    finally:
        database.close()


def test_a_transaction_that_stood_still_for_too_long_counts_as_away(postgresql_url: str) -> None:
    """As that of a process that was paused: it is no fault of the statement, and whoever retries gets through."""
    database = Database(postgresql_url)
    try:
        with pytest.raises(AWAY):
            _stand_still(database)
        with database.read() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
    finally:
        database.close()


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("25006", "nothing may be written here: a standby, or a primary whose disk is full"),
        ("53100", "the disk is full"),
        ("53200", "out of memory"),
        ("53300", "too many connections"),
        ("53400", "a limit of its configuration"),
        ("55006", "something is in use"),
        ("55P03", "a lock was not to be had"),
        ("57014", "the statement was canceled"),
        ("57P01", "it shuts down"),
        ("57P02", "it crashed"),
        ("57P03", "nobody can connect to it now"),
        ("58030", "it cannot read or write its files"),
        ("40001", "others wrote the same"),
        ("40P01", "a deadlock"),
        ("08006", "the connection broke"),
    ],
)
def test_what_passes_by_itself_counts_as_away(postgresql_url: str, state: str, what: str) -> None:
    database = Database(postgresql_url, connections=1)
    try:
        with pytest.raises(AWAY), database.write() as tx:
            tx.execute(text(f"DO $$ BEGIN RAISE EXCEPTION '{what}' USING ERRCODE = '{state}'; END $$"))
        with database.read() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
    finally:
        database.close()


def test_a_server_that_only_reads_is_away_for_who_writes_and_the_next_connection_may_lead_elsewhere(
    postgresql_url: str,
) -> None:
    database = Database(postgresql_url, connections=1)
    try:
        with database.read() as connection:
            connection.execute(text("SET default_transaction_read_only = on"))
        with pytest.raises(AWAY), database.write() as tx:
            tx.execute(text("CREATE TABLE written (number int)"))
        with database.write() as tx:  # over a new connection
            tx.execute(text("CREATE TABLE written (number int)"))
    finally:
        database.close()


def _stand_still(database: Database) -> None:
    with database.write() as tx:
        impatient = text("SELECT pg_backend_pid(), set_config('idle_in_transaction_session_timeout', '1', true)")
        process = tx.execute(impatient).one()[0]
        eventually("the server hangs up", lambda: not _is_connected(database, process))


def _is_connected(database: Database, process: int) -> bool:
    with database.read() as connection:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :process")
        return bool(connection.scalar(query, {"process": process}))
