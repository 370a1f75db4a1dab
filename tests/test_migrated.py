"""A database that is used again is as good as a new one."""

import psycopg
import pytest

from tests.migrated import MigratedDatabases
from tests.servers import PostgresServer

INSERT = "INSERT INTO projects (id, name, created_at) VALUES ('prj_1', 'x', now())"


@pytest.fixture
def databases(postgres: PostgresServer) -> MigratedDatabases:
    return MigratedDatabases(postgres)


def test_an_emptied_database_holds_nothing_of_the_test_before(
    postgres: PostgresServer, databases: MigratedDatabases
) -> None:
    first = databases.take()
    postgres.execute(INSERT, first)
    postgres.execute("INSERT INTO keys VALUES ('dk_1', 'prj_1', 'h', false, now())", first)
    databases.give_back(first)
    second = databases.take()
    with postgres.connect(second) as connection:
        assert oid(connection) and connection.execute("SELECT count(*) FROM projects").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM keys").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
    postgres.drop(second)


def test_what_a_test_left_running_is_cut_off_and_finds_it_no_more(
    postgres: PostgresServer, databases: MigratedDatabases
) -> None:
    first = databases.take()
    with postgres.connect(first) as left:
        its_oid = oid(left)
        databases.give_back(first)
        with pytest.raises(psycopg.OperationalError):
            left.execute(INSERT)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        postgres.connect(first)
    second = databases.take()
    with postgres.connect(second) as connection:
        assert oid(connection) == its_oid, "it is the same one"
    postgres.drop(second)


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE more (id int)",
        "DROP INDEX {index}",
        "ALTER TABLE jobs ADD COLUMN more int",
        "ALTER DATABASE {name} SET default_transaction_read_only = on",
        "ANALYZE projects",
        "VACUUM jobs",
        "UPDATE alembic_version SET version_num = '9999'",
        "CREATE FUNCTION more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ],
)
def test_a_database_whose_shape_was_changed_is_used_by_no_other_test(
    postgres: PostgresServer, databases: MigratedDatabases, change: str
) -> None:
    first = databases.take()
    with postgres.connect(first) as connection:
        its_oid = oid(connection)
        query = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisunique AND indrelid = 'jobs'::regclass"
        (index,) = connection.execute(query).fetchone() or ("",)
        connection.execute(INSERT)  # for ANALYZE to have something to write down
        connection.execute(change.format(index=index, name=first).encode())
    databases.give_back(first)
    second = databases.take()
    with postgres.connect(second) as connection:
        assert oid(connection) != its_oid
    postgres.drop(second)


def oid(connection: psycopg.Connection) -> int:
    """What stays of a database that is renamed."""
    (number,) = connection.execute("SELECT oid FROM pg_database WHERE datname = current_database()").fetchone() or (0,)
    return int(number)
