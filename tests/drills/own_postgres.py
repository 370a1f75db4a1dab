"""A PostgreSQL of a drill's own, to kill or to cut off: the system reaches it by TCP, through a proxy."""

import os
import shutil
import signal
from pathlib import Path

import psutil

from migrations import migrate
from shared.database import Database
from tests.fault_proxy import BLACK_HOLE, FaultProxy
from tests.servers import PostgresServer

NAME = "darkroom"


class OwnPostgres:
    """With every fsync. It holds one database, migrated and empty.

    `url`: where the system looks for it; `own_url`: past the proxy, for the drill. `disk`: an empty folder to keep its
    files in, if not one of its own.
    """

    def __init__(self, disk: Path | None = None) -> None:
        self._server = PostgresServer()
        try:
            if disk is not None:
                self._move_to(disk)
            self.start()
            self._server.execute(f"CREATE DATABASE {NAME} TEMPLATE template0")
            self.own_url = self._server.url(NAME)
            database = Database(self.own_url, connections=1)
            migrate.upgrade(database)
            database.close()
            self.proxy = FaultProxy(self._server.port)
        except BaseException:
            self._server.close()
            raise
        self.url = self._server.tcp_url(NAME, self.proxy.port)

    def _move_to(self, disk: Path) -> None:
        owner = self._server.data.stat()
        self._server.data = Path(shutil.copytree(self._server.data, disk / "data"))
        for path in (disk, self._server.data, *self._server.data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)

    def start(self) -> None:
        """Start it, after a crash as well, and wait until it answers."""
        self._server.start(durable=True, tcp=True)

    def kill(self) -> None:
        """SIGKILL to it and all its children: without them it would not be dead, and could not be started again."""
        assert self._server.process is not None
        postmaster = psutil.Process(self._server.process.pid)
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            process.kill()
        self._server.process.wait(30)
        psutil.wait_procs(family[1:], timeout=30)

    def stop(self) -> None:
        """As for a restart: open transactions are broken off, the rest is written down."""
        self._server.stop(signal.SIGINT)

    def has_died(self) -> bool:
        return self._server.process is not None and self._server.process.poll() is not None

    def cut_off(self) -> None:
        """The network swallows everything between it and the system."""
        self.proxy.disturb(to_server=BLACK_HOLE, to_client=BLACK_HOLE)

    def reconnect(self) -> None:
        """The network is well again, and has given up the connections that lost something."""
        self.proxy.heal()
        self.proxy.reset()

    def close(self) -> None:
        self.proxy.close()
        self._server.close()
