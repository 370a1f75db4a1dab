"""SQLite's statements end: reading ones and writing ones, and what is told to those who shared the transaction."""

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from shared.database import AWAY, Database, take_as_long_as_it_needs
from shared.sqlite_limit import LimitedConnection

COUNT = (
    "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {}) SELECT {} FROM numbers"
)
#: Minutes of it, if nobody ends it: not for ever, so that a test without the limit comes to its end too.
LONG = COUNT.format(1_000_000_000, "max(n)")
WRITES_LONG = "INSERT INTO notes " + COUNT.format(1_000_000_000, "n")
#: A second or so.
SHORT = COUNT.format(2_000_000, "max(n)")


@pytest.fixture
def database(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(LimitedConnection, "statement_seconds", 0.2)
    database = Database(sqlite_url)
    with database.write() as tx:
        tx.execute(text("CREATE TABLE notes (n INTEGER PRIMARY KEY)"))
    yield database
    database.close()


def test_a_statement_that_reads_for_too_long_counts_as_away(database: Database) -> None:
    with pytest.raises(AWAY, match="interrupted"), database.read() as connection:
        connection.scalar(text(LONG))
    with database.read() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_a_write_that_takes_too_long_leaves_nothing_behind_and_the_next_one_goes_on(database: Database) -> None:
    def too_long() -> None:
        with database.write() as tx:
            tx.execute(text("INSERT INTO notes VALUES (0)"))
            tx.execute(text(WRITES_LONG))

    with pytest.raises(AWAY, match="interrupted"):
        too_long()
    with database.write() as tx:
        tx.execute(text("INSERT INTO notes VALUES (1)"))
    with database.read() as connection:
        assert list(connection.scalars(text("SELECT n FROM notes"))) == [1]


def test_the_limit_is_a_statements_and_begins_anew_with_each(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LimitedConnection, "statement_seconds", 30.0)
    with database.write() as tx:
        driver = tx.connection.driver_connection
        assert isinstance(driver, LimitedConnection)
        tx.execute(text("SELECT 1"))
        driver._until = 0.0  # as after a long transaction
        assert tx.scalar(text(SHORT)) == 2000000


def test_a_migration_may_take_as_long_as_it_needs(database: Database) -> None:
    with pytest.raises(AWAY), database.write() as tx:
        tx.scalar(text(SHORT))
    with database.write() as tx:
        take_as_long_as_it_needs(tx)
        assert tx.scalar(text(SHORT)) == 2000000
