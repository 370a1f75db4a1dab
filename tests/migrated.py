"""PostgreSQL databases, migrated and empty, for one test each.

One that a test is done with is emptied for the next: to copy the template takes a third of a second of CPU, and every
sixth test needs one. It gets another name, so that whatever that test left running can't find it any more.
"""

from contextlib import suppress

import psycopg

from tests.servers import PostgresServer

TEMPLATE = "migrated"

#: What a test changes only if it changes the shape, the statistics or the settings of its database.
_CATALOGS = (
    *("pg_namespace", "pg_class", "pg_attribute", "pg_attrdef", "pg_constraint", "pg_index", "pg_trigger", "pg_proc"),
    *("pg_statistic", "pg_db_role_setting"),
)
_LAST = "(SELECT (count(*), max(xmin::text::bigint))::text FROM {})"  # how many rows, and which transaction wrote last
_VERSION = "(SELECT version_num FROM alembic_version)"
#: What a VACUUM finds is written down in place: no transaction shows it. How queries are planned depends on it.
_FOUND = "(SELECT (sum(relpages), sum(reltuples))::text FROM pg_class WHERE relnamespace = 'public'::regnamespace)"
_SHAPE = f"SELECT {', '.join((_VERSION, _FOUND, *map(_LAST.format, _CATALOGS)))}"
_SIZE = "SELECT pg_database_size(current_database())"
#: More than this, in bytes, and dead rows would make the next test slow.
_MOST_GROWN = 1_000_000


class MigratedDatabases:
    """Those of one server, which has a database `TEMPLATE` that nobody is connected to."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._empty: list[str] = []
        self._shape: tuple[object, ...] = ()
        self._size = 0
        self._tables = ""

    def take(self) -> str:
        """The name of one that nobody else has."""
        if self._empty:
            return self._empty.pop()
        name = self._server.new_database(TEMPLATE)
        with self._server.connect(name) as connection:
            self._shape = connection.execute(_SHAPE).fetchone() or ()
            (self._size,) = connection.execute(_SIZE).fetchone() or (0,)
            listed = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
            self._tables = "".join(map("DELETE FROM {0[0]};".format, connection.execute(listed)))
        return name

    def give_back(self, name: str) -> None:
        """The test is over. What it is still connected with is cut."""
        with suppress(psycopg.Error):
            with self._server.connect("postgres") as connection:
                everybody = "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = %s"
                connection.execute(everybody, [name])
            if self._clear(name):
                self._empty.append(self._server.rename(name))
                return
        self._server.drop(name)

    def _clear(self, name: str) -> bool:
        """False: it can't be made as new that way."""
        with self._server.connect(name) as connection:
            if connection.execute(_SHAPE).fetchone() != self._shape:
                return False
            # Without triggers, and so without a look at foreign keys: everything goes.
            connection.execute(f"SET session_replication_role = replica; {self._tables}")
            (size,) = connection.execute(_SIZE).fetchone() or (0,)
            return bool(size < self._size + _MOST_GROWN)
