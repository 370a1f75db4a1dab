"""Empty, migrated databases for Darkroom, a new one for each start."""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from migrations import migrate
from shared.database import Database
from tests.servers import PostgresServer


class Databases(ABC):
    """Makes databases, all alike."""

    description: str

    @abstractmethod
    def make(self, folder: Path) -> str:
        """The URL of a new one; its files, if it has any, are in the folder."""

    @abstractmethod
    def drop(self, url: str) -> None:
        """It is not needed any more."""

    @abstractmethod
    def close(self) -> None:
        """End what serves them."""


class SqliteDatabases(Databases):
    def __init__(self, folder: Path) -> None:
        self._template = folder / "template.db"
        database = Database(f"sqlite:///{self._template}")
        migrate.upgrade(database)
        with database.read() as connection:
            version = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        self.description = f"SQLite {version} (synchronous=FULL)"

    def make(self, folder: Path) -> str:
        return f"sqlite:///{shutil.copy(self._template, folder / 'darkroom.db')}"

    def drop(self, url: str) -> None:
        """It goes with its folder."""

    def close(self) -> None:
        """Nothing serves them."""


class PostgresDatabases(Databases):
    """With every fsync, as in production."""

    def __init__(self) -> None:
        self._server = PostgresServer()
        try:
            self._server.start(durable=True)
            self._server.execute("CREATE DATABASE migrated TEMPLATE template0")
            database = Database(self._server.url("migrated"), connections=1)
            migrate.upgrade(database)
            with database.read() as connection:
                version = connection.exec_driver_sql("SHOW server_version").scalar_one()
            database.close()
        except BaseException:
            self._server.close()
            raise
        self._names: dict[str, str] = {}
        self.description = f"PostgreSQL {version} (with fsync)"

    def make(self, folder: Path) -> str:
        name = self._server.new_database("migrated")
        self._names[self._server.url(name)] = name
        return self._server.url(name)

    def drop(self, url: str) -> None:
        self._server.drop(self._names.pop(url))

    def close(self) -> None:
        self._server.close()
