"""SQLite has one writer at a time: transactions of this process that wait for one another share a commit.

A commit waits for the disk, and while it does nobody else writes. So a thread that finds others waiting behind it
leaves its transaction open, and the next one goes on in it, behind a savepoint; the last one commits for all of them.
Nobody returns before that commit: what was written is on the disk then, as ever. A transaction that raises takes
back its own part and no other's.

Without a lock in front of SQLite's own, which is polled and unfair, 115 of 2,400 writes by 4 processes of 100 threads
ended as `database is locked`; with it none, and faster.
"""

import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError


class _Group:
    """Transactions under one commit."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.size = 0  # those that wait for the commit
        self.over = threading.Event()
        self.error: sqlite3.OperationalError | None = None


class SqliteWriter:
    """The writer of one process. It has a connection of its own, which threads pass on."""

    #: Transactions under one commit, at most: other processes wait meanwhile.
    AT_MOST = 64
    #: Between two tries to become SQLite's one writer. SQLite's own waiting sleeps longer and longer, up to 0.1 s, for
    #: a lock that is held for a millisecond: with four processes writing, nearly all of the time went there.
    PAUSE_SECONDS = 0.0005
    #: Somebody was expected to commit for us and has not: we look whether we must.
    LOOK_SECONDS = 0.25

    def __init__(self, engine: Engine, busy_seconds: float) -> None:
        """`engine`: of one connection, with a busy timeout of 0.

        `busy_seconds`: how long a transaction may wait to begin, for threads of this process and for other processes.
        """
        self._engine = engine
        self._busy_seconds = busy_seconds
        self._turn = threading.Lock()
        self._waiting = 0
        self._counting = threading.Lock()
        self._open: _Group | None = None

    @contextmanager
    def transaction(self, patient: bool = False) -> Iterator[Connection]:
        """A transaction: committed when the block is left, or without a trace if the block raises.

        OperationalError if it could not begin in time: one deadline for all of the waiting, or the hundredth thread
        behind another process's lock would wait a hundred times as long as the first. `patient`: for other threads of
        this process it waits as long as they take.
        """
        deadline = time.monotonic() + self._busy_seconds
        self._wait_for_turn(math.inf if patient else deadline)
        try:
            if patient:
                deadline = time.monotonic() + self._busy_seconds
            group = self._open or self._begin(deadline)
            shared = group.size > 0
            if shared:
                _run(group.connection, "SAVEPOINT mine")
            try:
                yield group.connection
                if shared:
                    _run(group.connection, "RELEASE mine")
            except BaseException:
                self._take_back(group, shared)
                raise
            group.size += 1
            if not self._waiting or group.size >= self.AT_MOST:
                self._commit(group)
        finally:
            self._turn.release()
        self._wait_for_commit(group)

    def _wait_for_turn(self, deadline: float) -> None:
        """Who gives up is waited for by nobody: a group that was left open for it is committed by one of its own."""
        with self._counting:
            self._waiting += 1
        try:
            left = -1 if deadline == math.inf else max(deadline - time.monotonic(), 0)  # -1: for ever
            in_time = self._turn.acquire(timeout=left)
        finally:
            with self._counting:
                self._waiting -= 1
        if not in_time:
            raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError("database is locked"))

    def _begin(self, deadline: float) -> _Group:
        connection = self._engine.connect()
        try:
            connection.begin()  # for SQLAlchemy, so that nobody inside begins or commits by himself
            driver = _driver(connection)
            while True:
                try:
                    # One that reads first and writes then can fail at once. Bare, as it is asked thousands of times a
                    # second while others write: SQLAlchemy's exceptions took a third of the sweep's time.
                    driver.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError as error:
                    if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise OperationalError("BEGIN IMMEDIATE", None, error) from error
                time.sleep(self.PAUSE_SECONDS)
        except BaseException:
            connection.close()
            raise
        self._open = _Group(connection)
        return self._open

    def _take_back(self, group: _Group, shared: bool) -> None:
        """The block raised. What the others of the group did stays, unless SQLite itself gave up on all of it."""
        if shared and _driver(group.connection).in_transaction:
            _run(group.connection, "ROLLBACK TO mine")
            _run(group.connection, "RELEASE mine")
            if not self._waiting:
                self._commit(group)
        else:
            self._end(group, "the transaction was rolled back" if shared else None)

    def _commit(self, group: _Group) -> None:
        try:
            _run(group.connection, "COMMIT")
        except BaseException as error:
            self._end(group, f"the commit failed: {error}")
            if not isinstance(error, OperationalError):
                raise
        else:
            self._end(group, None)

    def _end(self, group: _Group, error: str | None) -> None:
        """Let everybody of the group go, with this error if there is one."""
        self._open = None
        try:
            if error is not None:
                group.error = sqlite3.OperationalError(error)
                group.connection.invalidate()  # nobody knows what state it is in: closing it takes everything back
            group.connection.close()
        finally:
            group.over.set()

    def _wait_for_commit(self, group: _Group) -> None:
        while not group.over.wait(self.LOOK_SECONDS):
            with self._turn:
                if self._open is group and not self._waiting:
                    self._commit(group)  # whoever was expected after us gave up waiting
        if group.error is not None:
            raise OperationalError("COMMIT", None, group.error)

    def close(self) -> None:
        self._engine.dispose()


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


def _run(connection: Connection, statement: str) -> None:
    """Past SQLAlchemy, which takes ten times as long for the same."""
    try:
        _driver(connection).execute(statement)
    except sqlite3.OperationalError as error:
        raise OperationalError(statement, None, error) from error
