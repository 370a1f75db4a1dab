"""The database, SQLite or PostgreSQL: its clock, its transactions, and what "it is away" looks like.

Times are the database's clock, so that machines whose clocks differ agree on what is due. `now()` is the
one expression for it; no other code asks what time it is to write it down.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, ExceptionContext, String, create_engine, event, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import BigInteger, TypeDecorator, TypeEngine

from shared.sqlite_limit import LimitedConnection
from shared.sqlite_writer import SqliteWriter

#: What a statement raises while the database is away, full, locked, or shutting down. The work is not lost: try later.
AWAY = (OperationalError, InterfaceError, PoolTimeout)

#: PostgreSQL's word for a write where nothing may be written.
READ_ONLY = "25006"

#: How long a statement may wait for another process's lock, and on SQLite a transaction for its turn. Below the
#: shortest lease (10 s), so that a worker that waits for a lock still renews in time.
BUSY_SECONDS = 8

#: How long it may take to connect to PostgreSQL.
CONNECT_SECONDS = 5


class UtcTime(TypeDecorator[datetime]):
    """A moment in UTC. On SQLite, text as its own clock writes it, milliseconds, so that texts sort as times."""

    impl = String(23)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(TIMESTAMP(timezone=True) if dialect.name == "postgresql" else String(23))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.isoformat(" ", "milliseconds")[:23]

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if isinstance(value, str):
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        return value.astimezone(UTC) if value is not None else None


class now(FunctionElement[datetime]):  # noqa: N801  it reads as the SQL function that it is
    """The database's clock: `now()`, or `now(20)` for twenty seconds from now (or fewer than none; NULL: NULL)."""

    type = UtcTime()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_on_sqlite(element: now, compiler: Any, **kw: Any) -> str:
    # Not unixepoch('subsec'): it is NULL before SQLite 3.42.
    offset = compiler.process(element.clauses, **kw)
    modifier = f", round({offset}, 3) || ' seconds'" if offset else ""  # NULL seconds make a NULL time
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now'{modifier})"


@compiles(now, "postgresql")
def _now_on_postgresql(element: now, compiler: Any, **kw: Any) -> str:
    # Not now(): it stands still at the start of the transaction, and a lease would be born old. In a SELECT of its own:
    # clock_timestamp() is volatile, and a bare one in a condition keeps the index from being searched.
    offset = compiler.process(element.clauses, **kw)
    return f"(SELECT clock_timestamp(){f' + make_interval(secs => {offset})' if offset else ''})"


class now_ms(FunctionElement[int]):  # noqa: N801
    """The database's clock as whole milliseconds since 1970."""

    type = BigInteger()
    inherit_cache = True


@compiles(now_ms, "sqlite")
def _now_ms_on_sqlite(element: now_ms, compiler: Any, **kw: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)"


@compiles(now_ms, "postgresql")
def _now_ms_on_postgresql(element: now_ms, compiler: Any, **kw: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"


class Database:
    """Transactions on one database. `write()` for one that changes something, `read()` for statements that don't.

    No connection is held between transactions, so a few connections serve hundreds of threads.
    """

    def __init__(self, url: str, *, connections: int = 10, wait_seconds: float = 10) -> None:
        """`connections` at most; a thread waits `wait_seconds` for a free one before it counts as AWAY."""
        self.url = url
        self._wait_seconds = wait_seconds
        self.engine = _engine(url, connections, wait_seconds)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._reading = self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._writer = _sqlite_writer(url) if self.is_sqlite else None
        #: Whether a write waits for other threads of this process as long as they take (on SQLite, where they take
        #: turns). For who shows that the process goes on: if one of them never ends, that is to be seen.
        self.patient = False
        #: Called after a commit with the ids of the jobs that moved in it. It must neither wait nor fail.
        self.after_commit: Callable[[list[str]], None] = lambda moved: None

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that commits at the end of the block, or leaves nothing behind if the block raises."""
        with self._writer.transaction(self.patient) if self._writer else self.engine.begin() as connection:
            moved = connection.info["moved"] = []  # shared/jobs.py writes down here what it moves
            yield connection
        if moved:
            self.after_commit(moved)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for statements that change nothing, each seeing what is committed when it starts."""
        with self._reading.connect() as connection:
            yield connection

    def dedicated(self) -> "Database":
        """The same database over one connection of its own, for what must not queue behind the rest (the heartbeat)."""
        twin = Database(self.url, connections=1, wait_seconds=self._wait_seconds)
        if self._writer:  # SQLite's one writer takes turns all the same
            twin._writer = self._writer
        twin.patient = True
        return twin

    def close(self) -> None:
        self.engine.dispose()
        if self._writer:
            self._writer.close()


def _sqlite_writer(url: str) -> SqliteWriter:
    engine = _engine(url, 1, BUSY_SECONDS)
    event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA busy_timeout = 0"))
    return SqliteWriter(engine, BUSY_SECONDS)


def _engine(url: str, connections: int, wait_seconds: float) -> Engine:
    # hide_parameters: the message of a failed statement would carry prompts into the log.
    pool = {"pool_size": connections, "max_overflow": 0, "pool_timeout": wait_seconds, "hide_parameters": True}
    if url.startswith("sqlite"):
        # isolation_level None: the driver begins nothing by itself; write() does.
        its = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False}
        engine = create_engine(url, connect_args={**its, "factory": LimitedConnection}, **pool)
        event.listen(engine, "connect", _prepare_sqlite)
        return engine
    limits = {  # milliseconds
        "statement_timeout": 15_000,
        "lock_timeout": BUSY_SECONDS * 1000,
        "idle_in_transaction_session_timeout": 30_000,
    }
    guards = " ".join(f"-c {name}={value}" for name, value in limits.items())
    engine = create_engine(
        url,
        pool_pre_ping=True,  # after a restart of the server, each stale connection would fail somebody's request
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            "options": guards,
            "tcp_user_timeout": 10_000,
            "keepalives_idle": 10,
            "application_name": "darkroom",
        },
        **pool,
    )
    from shared.patience import PatientConnection

    # Many rows in one statement: a claim waits for the server twice in place of once for each of its jobs.
    engine.dialect.use_insertmanyvalues_wo_returning = True
    event.listen(engine, "do_connect", lambda _dialect, _record, args, given: PatientConnection.connect(*args, **given))
    event.listen(engine, "handle_error", _count_as_away)
    return engine


def take_as_long_as_it_needs(tx: Connection) -> None:
    """No limit for the statements of this transaction, except in waiting for locks. Its connection keeps none."""
    driver: Any = tx.connection.driver_connection
    if tx.dialect.name == "postgresql":
        tx.execute(text("SET LOCAL statement_timeout = 0"))
        driver.answer_seconds = None  # a PatientConnection
    else:
        driver.statement_seconds = None  # a LimitedConnection


def _count_as_away(context: ExceptionContext) -> None:
    """A connection that the server ended is AWAY, whatever the driver calls it, and so is a server that only reads.

    It calls it an InternalError when a transaction stood still for too long, as that of a paused process does. To a
    read-only server (a standby that we were led to, a primary whose disk is full) the connection is given up: the next
    one may lead elsewhere. All else that passes by itself is an OperationalError by the driver's own word.
    """
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
    if context.is_disconnect and not isinstance(context.sqlalchemy_exception, AWAY):
        raise OperationalError(context.statement, None, context.original_exception)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # page_size and auto_vacuum take effect only before the first table is made; later they change nothing. Pages of
    # 16 kB: a fifth less system time for a picture of 1.2 MB than with SQLite's 4 kB, and small jobs cost the same.
    # synchronous=FULL: what was acknowledged survives a power cut, not only a crash.
    connection.execute("PRAGMA page_size=16384")
    for pragma in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
