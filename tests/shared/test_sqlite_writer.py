"""Transactions that share a commit: what each of them was told is true."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, OperationalError

from shared import sqlite_writer
from shared.database import AWAY, Database
from shared.sqlite_writer import SqliteWriter
from tests.service import eventually


class Crowd:
    """Threads that want to write while another one is in the middle of writing."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.path = database.url.removeprefix("sqlite:///")
        assert database._writer is not None
        self.writer: SqliteWriter = database._writer
        self.writer._busy_seconds = 60  # who waits for a whole crowd to come waits long enough, if one stands still
        self._pool = ThreadPoolExecutor(40)
        with database.write() as tx:
            tx.execute(text("CREATE TABLE notes (n INTEGER PRIMARY KEY, data BLOB)"))

    def watch(self, monkeypatch: pytest.MonkeyPatch, failing: bool = False) -> None:
        """Count the commits, and let them fail if that is wanted."""
        real, self.commits = sqlite_writer._run, 0

        def run(connection: Connection, statement: str) -> None:
            if statement == "COMMIT":
                self.commits += 1
                if failing:
                    raise OperationalError(statement, None, sqlite3.OperationalError("disk I/O error"))
            real(connection, statement)

        monkeypatch.setattr(sqlite_writer, "_run", run)

    def note(self, number: int) -> list[int]:
        """Write it; then what everybody can read at that moment."""
        with self.database.write() as tx:
            tx.execute(text("INSERT INTO notes (n) VALUES (:n)"), {"n": number})
        return self.notes()

    def notes(self) -> list[int]:
        with self.database.read() as connection:
            return list(connection.scalars(text("SELECT n FROM notes ORDER BY n")))

    def together(self, *writes: Callable[[], object]) -> list[Future[object]]:
        """Each in a thread of its own: the first is in its transaction until the others wait behind it, in order."""
        inside, go = threading.Event(), threading.Event()

        def first() -> object:
            with self.database.write() as tx:
                inside.set()
                assert go.wait(60)
                tx.execute(text("INSERT INTO notes (n) VALUES (0)"))
            return self.notes()

        futures: list[Future[object]] = [self._pool.submit(first)]
        assert inside.wait(60)
        for count, write in enumerate(writes, start=1):
            futures.append(self._pool.submit(write))
            eventually("it waits", partial(self._wait_is, count))
        go.set()
        for future in futures:
            future.exception(60)
        return futures

    def _wait_is(self, count: int) -> bool:
        return self.writer._waiting == count

    def close(self) -> None:
        self._pool.shutdown()
        self.database.close()


@pytest.fixture
def crowd(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    crowd = Crowd(Database(sqlite_url))
    crowd.watch(monkeypatch)
    yield crowd
    crowd.close()


def test_those_who_wait_share_a_commit_and_nobody_returns_before_it(crowd: Crowd) -> None:
    futures = crowd.together(*(partial(crowd.note, n) for n in range(1, 21)))
    assert crowd.commits == 1
    assert [future.result() for future in futures] == [list(range(21))] * 21


def test_one_alone_commits_at_once(crowd: Crowd) -> None:
    assert crowd.note(1) == [1] and crowd.note(2) == [1, 2]
    assert crowd.commits == 2


def test_a_group_ends_when_it_is_large_so_that_other_processes_get_their_turn(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteWriter, "AT_MOST", 4)
    crowd.together(*(partial(crowd.note, n) for n in range(1, 11)))
    assert crowd.commits == 3
    assert crowd.notes() == list(range(11))


def test_what_sqlite_took_back_is_told_to_all_of_the_group_though_the_block_hides_it(crowd: Crowd) -> None:
    """As it takes back the whole transaction where a write is interrupted."""

    def hidden() -> None:
        with crowd.database.write() as tx:
            sqlite_writer._driver(tx).rollback()

    first, one, hiding, two = crowd.together(lambda: crowd.note(1), hidden, lambda: crowd.note(2))
    assert isinstance(hiding.exception(), OperationalError)
    notes = crowd.notes()
    for number, future in enumerate((first, one, two)):
        assert (future.exception() is None) == (number in notes), number


def test_a_transaction_that_raises_takes_back_its_own_part_and_no_others(crowd: Crowd) -> None:
    def half_done() -> None:
        with crowd.database.write() as tx:
            tx.execute(text("INSERT INTO notes (n) VALUES (99)"))
            raise KeyError

    def twice() -> None:
        with crowd.database.write() as tx:
            tx.execute(text("INSERT INTO notes (n) VALUES (98)"))
            tx.execute(text("INSERT INTO notes (n) VALUES (0)"))

    futures = crowd.together(lambda: crowd.note(1), half_done, twice, lambda: crowd.note(2), half_done)
    assert [type(future.exception()) for future in futures] == [
        type(None),
        type(None),
        KeyError,
        IntegrityError,
        type(None),
        KeyError,
    ]
    assert crowd.notes() == [0, 1, 2]
    assert crowd.commits == 1


def test_a_first_transaction_that_raises_leaves_nothing_behind_for_the_next(crowd: Crowd) -> None:
    def half_done() -> None:
        with crowd.database.write() as tx:
            tx.execute(text("INSERT INTO notes (n) VALUES (99)"))
            raise KeyError

    with pytest.raises(KeyError):
        half_done()
    assert crowd.note(1) == [1]


def test_a_commit_that_fails_fails_for_everybody_in_it(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        crowd.watch(patch, failing=True)
        futures = crowd.together(lambda: crowd.note(1), lambda: crowd.note(2))
    assert [type(future.exception()) for future in futures] == [OperationalError] * 3
    assert crowd.notes() == []
    assert crowd.note(5) == [5]


def test_when_sqlite_gives_up_on_the_whole_transaction_nobody_is_told_that_it_was_written(crowd: Crowd) -> None:
    """A full disk may roll back what earlier statements did."""

    def too_large() -> None:
        with crowd.database.write() as tx:
            tx.execute(text("PRAGMA max_page_count = 1"))  # SQLite makes it the present size
            tx.execute(text("INSERT INTO notes (n, data) VALUES (9, zeroblob(10000000))"))

    first, one, large, two = crowd.together(lambda: crowd.note(1), too_large, lambda: crowd.note(2))
    assert isinstance(first.exception(), OperationalError) and isinstance(large.exception(), OperationalError)
    # Who came before the large one is not ours to say; what each was told is true.
    assert crowd.notes() == [number for number, future in ((1, one), (2, two)) if future.exception() is None]


def test_a_thread_that_was_expected_and_gave_up_costs_the_others_a_moment_and_no_more(crowd: Crowd) -> None:
    crowd.writer._waiting = 1
    future = crowd._pool.submit(crowd.note, 1)
    eventually("it waits for the commit", lambda: crowd.writer._open is not None and not crowd.writer._turn.locked())
    crowd.writer._waiting = 0
    assert future.result(60) == [1]


def test_all_who_wait_behind_another_process_give_up_at_one_time_and_not_one_after_the_other(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """Stands still but for what the test lets pass."""

        now = 100.0
        sleep = staticmethod(time.sleep)

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(sqlite_writer, "time", clock)
    with closing(sqlite3.connect(crowd.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        futures = [crowd._pool.submit(crowd.note, n) for n in range(1, 31)]
        eventually("one is at SQLite's own lock, the others wait for their turn", partial(crowd._wait_is, 29))
        clock.now += crowd.writer._busy_seconds + 1
        assert all(isinstance(future.exception(60), AWAY) for future in futures)  # of no one's time more has passed
    assert crowd.writer._waiting == 0 and crowd.note(99) == [99]


def test_who_waited_for_its_turn_in_vain_is_no_longer_expected_and_the_others_commit(crowd: Crowd) -> None:
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with crowd.database.write() as tx:
            inside.set()
            assert go.wait(60)
            tx.execute(text("INSERT INTO notes (n) VALUES (0)"))

    slow = crowd._pool.submit(first)
    assert inside.wait(60)
    crowd.writer._busy_seconds = 0.1
    hasty = [crowd._pool.submit(crowd.note, n) for n in (1, 2)]
    said = [future.exception(60) for future in hasty]
    assert all(isinstance(error, AWAY) and "database is locked" in str(error) for error in said)
    go.set()
    slow.result(60)
    assert crowd.notes() == [0] and crowd.commits == 1 and crowd.writer._waiting == 0


def test_a_group_that_was_left_open_for_one_who_gives_up_is_committed_all_the_same(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first leaves its transaction open for the second, which gives up in that very moment."""
    monkeypatch.setattr(SqliteWriter, "LOOK_SECONDS", 0.05)
    left = threading.Event()

    class Turn:
        """A lock that the first gets, and whoever comes after waits for until it is released, in vain."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.was_taken = False

        def acquire(self, timeout: float) -> bool:
            if self.was_taken:
                assert left.wait(60)
                return False
            self.was_taken = True
            return self.lock.acquire(timeout=timeout)

        def release(self) -> None:
            self.lock.release()
            left.set()

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    crowd.writer._turn = Turn()  # type: ignore[assignment]
    first, second = crowd.together(lambda: crowd.note(1))
    assert first.result(60) == [0] and isinstance(second.exception(60), AWAY)


def test_the_heartbeat_waits_for_its_turn_as_long_as_it_takes_and_so_shows_that_a_thread_never_ends(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    assert database._writer is not None
    monkeypatch.setattr(database._writer, "_busy_seconds", 0.05)
    heartbeat = database.dedicated()

    def beat() -> None:
        with heartbeat.write() as tx:
            tx.execute(text("SELECT 1"))

    with closing(database), closing(heartbeat), ThreadPoolExecutor(1) as pool:
        with database.write(), ThreadPoolExecutor(1) as other:
            beating = pool.submit(beat)
            assert isinstance(other.submit(lambda: database.write().__enter__()).exception(60), OperationalError)
            assert not beating.done()
        beating.result(60)
