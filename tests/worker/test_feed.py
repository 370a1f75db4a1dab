"""The project's feed: numbers without gaps, whatever the order in which transactions commit."""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from api.app import build, open_services
from api.auth import PREFIX_LENGTH, hash_key
from local.web import free_port
from shared import jobs
from shared.database import AWAY, Database, now
from shared.settings import Settings
from shared.tables import events, keys, projects
from tests import lives
from tests.api.people import Caller, client_with
from tests.lives import SUBMISSION, TERMS
from tests.service import eventually
from worker.feed import Feed

WRITERS = 16
JOBS = 6  # of each writer
SECRET = "s" * 32


@pytest.fixture(autouse=True)
def two_projects(database: Database) -> None:
    with database.write() as tx:
        for name in ("a", "b"):
            tx.execute(insert(projects).values(id=f"prj_{name}", name=name, created_at=now()))


def stored(database: Database, project: str = "prj_a") -> list[tuple[int | None, str, int]]:
    """(number, subject, sequence) of all events of a project, in the order of their numbers."""
    query = select(events.c.number, events.c.subject_id, events.c.sequence).where(events.c.project_id == project)
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(query.order_by(events.c.number))]


def feed_of(database: Database, project: str = "prj_a") -> int:
    with database.read() as connection:
        return int(connection.execute(select(projects.c.feed).where(projects.c.id == project)).scalar_one())


def is_sound(seen: list[tuple[int | None, str, int]]) -> None:
    """Numbers from 1 without a gap; the events of each subject in order, from its first, none twice."""
    assert [number for number, _, _ in seen] == list(range(1, len(seen) + 1))
    sequences = defaultdict(list)
    for _, subject, sequence in seen:
        sequences[subject].append(sequence)
    for subject, found in sequences.items():
        assert found == list(range(1, len(found) + 1)), subject


def test_events_are_numbered_in_each_project_apart(database: Database) -> None:
    moved: list[list[str]] = []
    first, second = lives.submit(database), lives.submit(database, project_id="prj_b")
    third = lives.submit(database)
    database.after_commit = moved.append
    assert Feed(database).round() == 3
    assert stored(database) == [(1, first.id, 1), (2, third.id, 1)] and stored(database, "prj_b") == [(1, second.id, 1)]
    assert (feed_of(database), feed_of(database, "prj_b")) == (2, 1)
    assert moved == [["prj_a", "prj_b"]]  # so that its streams are woken


def test_where_there_is_nothing_to_number_nothing_is_locked(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives.submit(database)
    feed = Feed(database)
    assert feed.round() == 1

    def no_writing() -> None:
        raise AssertionError("it opened a transaction")

    monkeypatch.setattr(database, "write", no_writing)
    assert feed.round() == 0


def test_a_round_numbers_some_and_the_next_goes_on(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.feed.AT_MOST", 2)
    for _ in range(5):
        lives.submit(database)
    feed = Feed(database)
    assert [feed.round() for _ in range(4)] == [2, 2, 1, 0]
    is_sound(stored(database))


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # where two transactions are open at once
def test_what_is_not_committed_yet_is_numbered_later_and_what_never_is_leaves_no_gap(database: Database) -> None:
    feed = Feed(database)
    with database.write() as tx:
        early = jobs.submit(tx, **SUBMISSION)
        late = lives.submit(database)
        assert feed.round() == 1
        assert stored(database) == [(1, late.id, 1)]
    with suppress(RuntimeError), database.write() as tx:
        jobs.submit(tx, **SUBMISSION)
        raise RuntimeError
    last = lives.submit(database)
    assert feed.round() == 2
    assert stored(database) == [(1, late.id, 1), (2, early.id, 1), (3, last.id, 1)]


@pytest.mark.parametrize("hours", [1, 48])
def test_a_clock_that_steps_back_changes_the_order_of_no_jobs_events(database: Database, hours: int) -> None:
    feed = Feed(database)
    before, job = lives.submit(database), lives.submit(database)
    with database.write() as tx:
        assert jobs.cancel(tx, job.id)
    step_back(database, job.id, 2, hours)
    assert feed.round() == 3
    is_sound(stored(database))
    # And again when the earlier ones have their numbers.
    with database.write() as tx:
        assert jobs.cancel(tx, before.id)
    step_back(database, before.id, 2, hours)
    assert feed.round() == 1
    is_sound(stored(database))
    assert stored(database)[-1] == (4, before.id, 2)


def step_back(database: Database, job_id: str, sequence: int, hours: int) -> None:
    """As if the clock had been set back by so many hours before this event."""
    its = (events.c.subject_id == job_id, events.c.sequence == sequence)
    with database.write() as tx:
        tx.execute(update(events).where(*its).values(created_at=now(-3600 * hours)))


def one_life(database: Database, project: str, backend: str, pause: Callable[[], None]) -> None:
    """A job with five events, each in a transaction that stands open for a while before its commit."""

    @contextmanager
    def slowly() -> Iterator[Any]:
        with database.write() as tx:
            yield tx
            pause()

    with slowly() as tx:
        job = jobs.submit(tx, **{**SUBMISSION, "project_id": project, "backend": backend})
    for _ in range(2):
        with slowly() as tx:
            [claim] = jobs.claim(tx, backend, TERMS)
        if claim.attempt == 1:
            with slowly() as tx:
                assert jobs.requeue(tx, claim, reason="transient", after_seconds=0, counts=False)
    with slowly() as tx:
        assert jobs.cancel(tx, job.id)


class Threads:
    """Threads whose errors are raised by join()."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, work: Callable[[], object]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  it is raised again
                self._errors.append(error)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(100)
            assert not thread.is_alive()
        if self._errors:
            raise self._errors[0]


@contextmanager
def reader_of(database: Database, project: str) -> Iterator[Caller]:
    """A client of the API with a key of this project."""
    key = f"dk_reader{project[-1]}" + "r" * 32
    with database.write() as tx:
        hashed = hash_key(key, SECRET)
        tx.execute(
            insert(keys).values(
                prefix=key[:PREFIX_LENGTH], project_id=project, hash=hashed, bootstrap=False, created_at=now()
            )
        )
    redis_url = f"redis://127.0.0.1:{free_port()}/0"  # nobody is there, and nobody needs it
    services = open_services(Settings(database_url=database.url, redis_url=redis_url, secret_key=SECRET))
    yield client_with(build(services), key)
    services.close()


@pytest.mark.slow
@pytest.mark.parametrize("feeds", [1, 2])
def test_whoever_reads_while_many_write_misses_nothing_and_sees_nothing_twice(database: Database, feeds: int) -> None:
    """Sixteen writers whose transactions commit in another order than they began; readers who go on from a number."""
    longest = 0.005 if database.is_sqlite else 0.03  # SQLite has one writer at a time
    database.patient = True  # if one stands still for seconds with its turn, the others wait as long
    writing, others = Threads(), Threads()
    over = threading.Event()
    seen: dict[str, list[dict[str, Any]]] = {"prj_a": [], "prj_b": []}

    def write(number: int) -> None:
        dice = random.Random(number)
        project = "prj_a" if number % 2 else "prj_b"
        for _ in range(JOBS):
            one_life(database, project, f"backend{number}", lambda: time.sleep(dice.uniform(0, longest)))

    def number_them() -> None:
        feed = Feed(database)
        while not over.is_set():
            with suppress(*AWAY):  # SQLite may be locked for a moment; then comes the next round
                feed.round()

    def read(project: str, reader: Caller) -> None:
        mine, after = seen[project], "0"
        while not over.is_set():
            answer = reader.get(f"/v1/events?after={after}&limit=7")
            if answer.status_code == 503:  # the same
                continue
            body = answer.json
            mine.extend(body["data"])
            after = body["next_cursor"] or after

    serving = ExitStack()
    for project in seen:
        reader = serving.enter_context(reader_of(database, project))
        others.start(lambda project=project, reader=reader: read(project, reader))  # type: ignore[misc]
    for _ in range(feeds):
        others.start(number_them)
    for number in range(WRITERS):
        writing.start(lambda number=number: write(number))  # type: ignore[misc]
    try:
        writing.join()
        expected = WRITERS // 2 * JOBS * 5
        eventually("all is numbered", lambda: all(feed_of(database, project) == expected for project in seen), 60)
        eventually("all is read", lambda: all(len(mine) >= expected for mine in seen.values()), 60)
    finally:
        over.set()
        others.join()
        serving.close()
    for project, mine in seen.items():
        read_so = [(event["number"], event["data"]["id"], event["sequence"]) for event in mine]
        is_sound(read_so)
        assert read_so == stored(database, project) and len(read_so) == expected
        assert len({event["id"] for event in mine}) == expected
        assert all(event["data"]["sequence"] == event["sequence"] for event in mine)
