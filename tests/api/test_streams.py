"""Streams of events as clients meet them: real gunicorn processes, real sockets."""

import json
import queue
import signal
import socket
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import delete, insert, update

from local.web import free_port
from migrations import migrate
from shared import jobs as life
from shared.announcements import Announcer
from shared.catalogue import MODELS
from shared.database import Database, now
from shared.ids import new_id
from shared.progress import ProgressTeller, Report
from shared.settings import Settings
from shared.tables import events, keys
from shared.tables import jobs as table
from tests.api.people import KEY
from tests.api.stores import patient_client, redis_away
from tests.api.test_gunicorn import HEADERS, PATIENCE, gunicorn
from tests.lives import TERMS, an_image
from tests.servers import PostgresServer, RedisServer
from tests.service import eventually
from worker.feed import Feed

pytestmark = pytest.mark.slow

STREAM = HEADERS | {"Accept": "text/event-stream"}
BODY = {"input": {"prompt": "a cat"}}
ANY_MODEL = replace(TERMS, prices=dict.fromkeys(MODELS, 8000))


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here, unless a test says otherwise."""
    return sqlite_url


class Api:
    """One API, of one process, at a port of its own, as many as a test starts; and what its worker does to jobs."""

    def __init__(self, database_url: str, redis_url: str, folder: Path) -> None:
        self.settings = Settings(database_url=database_url, redis_url=redis_url, api_key=KEY, secret_key="s" * 32)
        self.database = Database(database_url)
        self._announcer = Announcer(patient_client(self.settings))  # it tells only once
        self.database.after_commit = self._announcer.tell
        self.feed = Feed(self.database)
        self._running = ExitStack()
        self._folder = folder

    def start(self, **constants: object) -> tuple[str, subprocess.Popen[str]]:
        """A process with these constants of `api.events` or `api.app` changed, that waits for its stores; its URL."""
        port = free_port()
        app = self._folder / f"changed_{port}.py"
        lines = [f"api.{name.replace('__', '.')} = {value!r}" for name, value in constants.items()]
        imports = "import api.app, api.auth, api.events, api.waiting, tests.api.stores"
        patience = "tests.api.stores.wait_for_stores()"
        app.write_text("\n".join([imports, patience, *lines, "create_app = api.app.create_app"]))
        process = self._running.enter_context(
            gunicorn(
                port,
                "--workers=1",
                "--graceful-timeout=3600",
                f"--pythonpath={self._folder}",
                app=f"{app.stem}:create_app()",
                DARKROOM_DATABASE_URL=self.settings.database_url,
                DARKROOM_REDIS_URL=self.settings.redis_url,
                DARKROOM_API_KEY=KEY,
                DARKROOM_SECRET_KEY="s" * 32,
            )
        )
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None
            with suppress(requests.RequestException):  # it listens before it answers
                return requests.get(f"{url}/healthz", timeout=PATIENCE).ok
            return False

        eventually("the API answers", answers, 60)
        return url, process

    def submit(self, url: str) -> str:
        answer = requests.post(f"{url}/v1/jobs", json=BODY, headers=HEADERS, timeout=PATIENCE)
        assert answer.status_code == 202
        return str(answer.json()["id"])

    def claim(self) -> life.Claim:
        with self.database.write() as tx:
            [claim] = life.claim(tx, "dataoorts", ANY_MODEL)
        return claim

    def requeue(self, claim: life.Claim) -> None:
        with self.database.write() as tx:
            assert life.requeue(tx, claim, reason="transient", after_seconds=0, counts=False)

    def succeed(self, claim: life.Claim) -> None:
        with self.database.write() as tx:
            assert life.succeed(tx, claim, an_image(claim))

    def close(self) -> None:
        self._running.close()
        self._announcer.close()
        self.database.close()


@pytest.fixture
def make_api(tmp_path: Path) -> Iterator[Callable[[str, str], Api]]:
    """Makes one on a database and a Redis, and closes it with the test."""
    with ExitStack() as made:

        def make(database_url: str, redis_url: str) -> Api:
            return made.enter_context(closing(Api(database_url, redis_url, tmp_path)))

        yield make


@pytest.fixture
def api(make_api: Callable[[str, str], Api], database_url: str, redis_url: str) -> Api:
    return make_api(database_url, redis_url)


@pytest.fixture
def without_redis(make_api: Callable[[str, str], Api], database_url: str) -> Iterator[Api]:
    with redis_away() as away:
        yield make_api(database_url, away)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with closing(RedisServer()) as redis:
        redis.start()
        yield redis


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """Migrated, for a test to stop and start."""
    with closing(PostgresServer()) as postgres:
        postgres.start()
        with closing(Database(postgres.url("postgres"), connections=1)) as database:
            migrate.upgrade(database)
        yield postgres


class Reader:
    """A client of one stream, in a thread of its own. `next()` waits for what comes; `end()` for the end."""

    def __init__(self, url: str, **headers: str) -> None:
        self.response = requests.get(url, headers=STREAM | headers, stream=True, timeout=PATIENCE)
        assert self.response.status_code == 200, self.response.text
        assert self.response.headers["Content-Type"] == "text/event-stream"
        self._blocks: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._block() == "retry: 2000"

    def _read(self) -> None:
        block: list[str] = []
        with suppress(requests.RequestException, OSError, AttributeError):  # it was closed meanwhile
            for line in self.response.iter_lines(chunk_size=None):
                if line:
                    block.append(line.decode())
                elif block:
                    self._blocks.put("\n".join(block))
                    block = []
        self._blocks.put(None)

    def _block(self) -> str | None:
        return self._blocks.get(timeout=60)

    def next(self) -> dict[str, Any]:
        """The next message, comments left out."""
        while (block := self._block()) is not None:
            if not block.startswith(":"):
                fields = dict(line.split(": ", 1) for line in block.split("\n"))
                return fields | {"data": json.loads(fields["data"])}
        raise AssertionError("the stream has ended")

    def comment(self) -> str:
        block = self._block()
        assert block is not None and block.startswith(":"), block
        return block

    def end(self) -> list[dict[str, Any]]:
        """What comes until the end."""
        messages: list[dict[str, Any]] = []
        while True:
            block = self._block()
            if block is None:
                return messages
            if not block.startswith(":"):
                fields = dict(line.split(": ", 1) for line in block.split("\n"))
                messages.append(fields | {"data": json.loads(fields["data"])})

    def close(self) -> None:
        self.response.close()


def sequences(messages: list[dict[str, Any]]) -> list[int]:
    assert all(int(message["id"]) == message["data"]["sequence"] for message in messages)
    return [message["data"]["sequence"] for message in messages]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_stream_begins_with_a_snapshot_tells_each_event_and_ends_with_the_job(
    kind: str, request: pytest.FixtureRequest, redis_url: str, make_api: Callable[[str, str], Api]
) -> None:
    api = make_api(request.getfixturevalue(f"{kind}_url"), redis_url)
    # Nobody looks by himself: what comes was announced.
    url, _ = api.start(waiting__READ_AGAIN=3600)
    job = api.submit(url)
    stream = Reader(f"{url}/v1/jobs/{job}/events")
    assert stream.response.headers["Cache-Control"] == "no-store"
    assert stream.response.headers["X-Accel-Buffering"] == "no"
    first = stream.next()
    assert (first["event"], first["id"]) == ("snapshot", "1") and first["data"]["data"]["status"] == "queued"
    claim = api.claim()
    second = stream.next()
    assert (second["event"], second["id"]) == ("job.started", "2") and second["data"]["data"]["status"] == "running"
    api.succeed(claim)
    assert [message["event"] for message in stream.end()] == ["job.succeeded"]


def test_a_stream_tells_how_far_the_job_is_between_its_events(api: Api) -> None:
    url, _ = api.start(waiting__READ_AGAIN=3600, events__HEARTBEAT_SECONDS=0.05)
    job = api.submit(url)
    teller = ProgressTeller(patient_client(api.settings))
    stream, feed = Reader(f"{url}/v1/jobs/{job}/events"), Reader(f"{url}/v1/events")
    assert stream.next()["event"] == "snapshot"
    stream.comment()  # it has read what there was: what comes now was heard, so that hints, told once, are heard too
    claim = api.claim()
    assert stream.next()["event"] == "job.started"
    teller.tell(job, Report(claim.attempt, 5, 20, b"a small picture"))
    hint = stream.next()
    assert hint["event"] == "job.progress" and "id" not in hint, "a resume goes on from the event before it"
    assert hint["data"]["data"] == {
        "id": job,
        "attempt": 1,
        "progress": {"fraction": 0.25, "step": 5, "steps": 20},
        "preview": {"content_type": "image/jpeg", "base64": b64encode(b"a small picture").decode()},
    }
    other = ProgressTeller(patient_client(api.settings))
    other.tell(job, Report(claim.attempt + 1, 6, 20, None))  # of an attempt that is none: nobody shows it
    with patient_client(api.settings) as redis:
        eventually("it is told", lambda: redis.exists(f"darkroom:progress:{job}:{claim.attempt + 1}"))
    teller.tell(job, Report(claim.attempt, 7, 20, None))
    assert stream.next()["data"]["data"]["progress"]["step"] == 7, "and nothing is told twice"
    api.succeed(claim)
    assert [message["event"] for message in stream.end()] == ["job.succeeded"]
    assert api.feed.round() == 3
    assert [feed.next()["event"] for _ in range(4)] == ["snapshot", "job.queued", "job.started", "job.succeeded"]
    teller.close()
    other.close()


def test_a_resume_at_every_point_misses_nothing_and_doubles_nothing(api: Api) -> None:
    url, _ = api.start()
    job = api.submit(url)
    for _ in range(3):
        api.requeue(api.claim())
    path = f"{url}/v1/jobs/{job}/events"
    # Seven have happened, two will.
    readers = [Reader(path, **{"Last-Event-ID": str(last)}) for last in range(8)]
    for last, reader in enumerate(readers):
        assert sequences([reader.next() for _ in range(7 - last)]) == list(range(last + 1, 8))
    claim = api.claim()
    assert [reader.next()["data"]["sequence"] for reader in readers] == [8] * 8
    resumed = Reader(path, **{"Last-Event-ID": "8"})
    api.succeed(claim)
    assert [sequences(reader.end()) for reader in [*readers, resumed]] == [[9]] * 9
    for last in range(9):
        assert sequences(Reader(path, **{"Last-Event-ID": str(last)}).end()) == list(range(last + 1, 10))
    over = requests.get(path, headers=STREAM | {"Last-Event-ID": "9"}, timeout=PATIENCE)
    assert over.status_code == 204 and over.content == b""
    [snapshot] = Reader(path).end()
    assert snapshot["event"] == "snapshot" and snapshot["id"] == "9"


def test_the_feed_streams_what_is_numbered_and_does_not_end(api: Api) -> None:
    url, _ = api.start(waiting__READ_AGAIN=3600)
    first = api.submit(url)
    assert api.feed.round() == 1
    stream = Reader(f"{url}/v1/events")
    snapshot = stream.next()
    assert (snapshot["event"], snapshot["id"]) == ("snapshot", "1")
    assert set(snapshot["data"]) == {"type", "timestamp", "number"} and snapshot["data"]["number"] == 1
    whole = Reader(f"{url}/v1/events?after=0")
    assert whole.next()["data"]["data"]["id"] == first
    api.succeed(api.claim())
    second = api.submit(url)
    assert api.feed.round() == 3
    for reader in (stream, whole):
        told = [reader.next() for _ in range(3)]
        assert [(message["id"], message["event"]) for message in told] == [
            ("2", "job.started"),
            ("3", "job.succeeded"),
            ("4", "job.queued"),
        ]
        assert [message["data"]["number"] for message in told] == [2, 3, 4]
        assert told[-1]["data"]["data"]["id"] == second
    resumed = Reader(f"{url}/v1/events", **{"Last-Event-ID": "2"})
    assert [resumed.next()["id"] for _ in range(2)] == ["3", "4"]


def test_a_quiet_stream_is_kept_alive_by_comments(api: Api) -> None:
    url, _ = api.start(events__HEARTBEAT_SECONDS=0.05)
    job = api.submit(url)
    for path in (f"/v1/jobs/{job}/events", "/v1/events"):
        stream = Reader(url + path)
        stream.next()
        assert [stream.comment() for _ in range(3)] == [": still here"] * 3
    # Between them, events still come.
    stream = Reader(f"{url}/v1/jobs/{job}/events")
    stream.next(), stream.comment()
    api.succeed(api.claim())
    assert sequences(stream.end()) == [2, 3]


def test_a_stream_ends_when_its_key_is_no_longer_good(api: Api) -> None:
    url, _ = api.start(events__HEARTBEAT_SECONDS=0.05, auth__TRUSTED_SECONDS=0)
    job = api.submit(url)
    streams = [Reader(url + path) for path in (f"/v1/jobs/{job}/events", "/v1/events")]
    for stream in streams:
        stream.next(), stream.comment()
    with api.database.write() as tx:
        tx.execute(delete(keys))
    for stream in streams:
        assert stream.end() == []


def test_events_arrive_through_every_process(api: Api) -> None:
    (one, _), (other, _) = (api.start(waiting__READ_AGAIN=3600) for _ in range(2))
    job = api.submit(one)
    streams = [Reader(f"{url}/v1/jobs/{job}/events") for url in (one, other)]
    for stream in streams:
        stream.next()
    canceled = requests.post(f"{other}/v1/jobs/{job}/cancel", headers=HEADERS, timeout=PATIENCE)
    assert canceled.status_code == 200
    for stream in streams:
        assert [message["event"] for message in stream.end()] == ["job.canceled"]


def test_without_redis_streams_go_on(without_redis: Api) -> None:
    api = without_redis
    url, _ = api.start()
    job = api.submit(url)
    stream, feed = Reader(f"{url}/v1/jobs/{job}/events"), Reader(f"{url}/v1/events")
    stream.next(), feed.next()
    claim = api.claim()  # in another process, which can't tell anybody
    assert stream.next()["event"] == "job.started"
    assert api.feed.round() == 2
    assert [feed.next()["event"] for _ in range(2)] == ["job.queued", "job.started"]
    api.succeed(claim)
    assert [message["event"] for message in stream.end()] == ["job.succeeded"]


def test_without_redis_a_stream_is_woken_by_what_its_own_process_does(without_redis: Api) -> None:
    api = without_redis
    url, _ = api.start(waiting__READ_AGAIN=3600)
    job = api.submit(url)
    stream = Reader(f"{url}/v1/jobs/{job}/events")
    stream.next()
    requests.post(f"{url}/v1/jobs/{job}/cancel", headers=HEADERS, timeout=PATIENCE)
    assert [message["event"] for message in stream.end()] == ["job.canceled"]


def test_a_redis_that_goes_and_comes_back_costs_no_event(
    own_redis: RedisServer, make_api: Callable[[str, str], Api], database_url: str
) -> None:
    api = make_api(database_url, own_redis.url)
    url, _ = api.start()
    job = api.submit(url)
    stream = Reader(f"{url}/v1/jobs/{job}/events")
    stream.next()
    own_redis.stop(signal.SIGKILL)
    claim = api.claim()
    assert stream.next()["event"] == "job.started"
    own_redis.start()
    api.requeue(claim)
    assert stream.next()["event"] == "job.queued"
    api.succeed(api.claim())
    assert sequences(stream.end()) == [4, 5]


def test_streams_end_at_sigterm_and_a_resume_elsewhere_misses_nothing(api: Api) -> None:
    """With a grace that no test waits for: what ends, ends by itself."""
    url, process = api.start()
    job = api.submit(url)
    stream, feed = Reader(f"{url}/v1/jobs/{job}/events"), Reader(f"{url}/v1/events")
    assert stream.next()["id"] == "1" and feed.next()["id"] == "0"
    process.send_signal(signal.SIGTERM)
    assert stream.end() == [] and feed.end() == []
    assert process.wait(60) == 0
    assert process.stderr is not None and "Traceback" not in process.stderr.read()
    claim = api.claim()
    assert api.feed.round() == 2
    url, _ = api.start()
    stream = Reader(f"{url}/v1/jobs/{job}/events", **{"Last-Event-ID": "1"})
    feed = Reader(f"{url}/v1/events", **{"Last-Event-ID": "0"})
    assert stream.next()["data"]["sequence"] == 2
    assert [feed.next()["event"] for _ in range(2)] == ["job.queued", "job.started"]
    api.succeed(claim)
    assert sequences(stream.end()) == [3]


def test_streams_and_waits_have_places_apart_and_leave_room_for_the_rest(api: Api) -> None:
    url, _ = api.start(app__STREAM_PLACES=2, app__WAITING_PLACES=2)
    job = api.submit(url)
    path = f"{url}/v1/jobs/{job}/events"
    streams = [Reader(path), Reader(f"{url}/v1/events")]
    for stream in streams:
        stream.next()
    for full in (path, f"{url}/v1/events"):
        refused = requests.get(full, headers=STREAM, timeout=PATIENCE)
        assert refused.status_code == 429 and refused.headers["Content-Type"] == "application/problem+json"
        assert refused.json()["code"] == "too_many_streams" and refused.json()["retryable"] is True
        assert int(refused.headers["Retry-After"]) > 0
    # What is not there is not found all the same, and the rest is served, waiting too.
    assert requests.get(f"{url}/v1/jobs/job_{'0' * 32}/events", headers=STREAM, timeout=PATIENCE).status_code == 404
    assert requests.get(path, headers=HEADERS, timeout=PATIENCE).json()["data"]
    waited = requests.get(f"{url}/v1/jobs/{job}", headers=HEADERS | {"Prefer": "wait=1"}, timeout=PATIENCE)
    assert waited.headers["Preference-Applied"] == "wait=1"
    # Who hangs up gives his place free, though nothing is ever sent to him again.
    streams[1].close()

    def has_room() -> bool:
        answer = requests.get(f"{url}/v1/events", headers=STREAM, timeout=PATIENCE, stream=True)
        answer.close()
        return answer.status_code == 200

    eventually("a place is free again", has_room, 60)
    # A job that has ended needs no place.
    eventually("all places are taken", lambda: _takes_all(path, streams), 60)
    other = api.submit(url)
    requests.post(f"{url}/v1/jobs/{other}/cancel", headers=HEADERS, timeout=PATIENCE)
    assert [message["event"] for message in Reader(f"{url}/v1/jobs/{other}/events").end()] == ["snapshot"]
    assert sequences(Reader(f"{url}/v1/jobs/{other}/events?after=0").end()) == [1, 2]


def _takes_all(path: str, streams: list[Reader]) -> bool:
    answer = requests.get(path, headers=STREAM, timeout=PATIENCE, stream=True)
    if answer.status_code == 200:
        streams.append(Reader.__new__(Reader))  # kept open
        streams[-1].response = answer
    return answer.status_code == 429


def crowded(api: Api, job: str, count: int) -> None:
    """So many more events of a job at once, whose snapshots are large."""
    prompt = "\N{GRINNING FACE}" * 2048  # 8 kB
    with api.database.write() as tx:
        row = tx.execute(table.select().where(table.c.id == job)).one()
        large = row.input | {"prompt": prompt, "negative_prompt": prompt}
        tx.execute(update(table).where(table.c.id == job).values(sequence=row.sequence + count, input=large))
        made: list[dict[str, Any]] = [
            {
                "id": new_id("evt"),
                "subject_id": job,
                "project_id": row.project_id,
                "sequence": row.sequence + number,
                "type": "job.queued",
                "data": {"attempts": 0, "error": None},
            }
            for number in range(1, count + 1)
        ]
        tx.execute(insert(events).values(created_at=now()), made)
        tx.info["moved"].append(job)


def test_a_reader_that_does_not_read_is_dropped_and_can_resume(api: Api) -> None:
    url, process = api.start(events__SEND_SECONDS=2.0, app__STREAM_PLACES=1)
    port, job = int(url.rpartition(":")[2]), api.submit(url)
    path = f"/v1/jobs/{job}/events"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        lines = [f"GET {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in STREAM.items()), "", ""]
        slow.sendall("\r\n".join(lines).encode())
        start = slow.recv(64)
        assert start.startswith(b"HTTP/1.1 200")
        crowded(api, job, 60)  # a megabyte: more than the system holds for it

        def has_room() -> bool:
            answer = requests.get(url + path, headers=STREAM, timeout=PATIENCE, stream=True)
            answer.close()
            return answer.status_code == 200

        eventually("its place is free", has_room, 60)
        # What it had been sent is still there; then it is hung up on.
        received = start
        with suppress(ConnectionResetError):
            while part := slow.recv(65536):
                received += part
        assert not received.endswith(b"\r\n0\r\n\r\n")  # cut off, not ended
    whole = [block for block in received.decode(errors="replace").split("\n\n") if "\nevent: job.queued\n" in block]
    last = max((int(block.split("id: ")[1].split("\n")[0]) for block in whole[:-1]), default=1)
    assert last < 61
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stderr is not None
    said = process.stderr.read()
    assert "had not read" in said and "Traceback" not in said
    # Where there is more time to read: it is a megabyte, and this process may stand still for seconds too.
    url, _ = api.start(events__SEND_SECONDS=60.0)
    resumed = Reader(url + path, **{"Last-Event-ID": str(last)})
    assert sequences([resumed.next() for _ in range(61 - last)]) == list(range(last + 1, 62))


def test_a_stream_outlives_a_database_that_is_away(
    own_postgres: PostgresServer, make_api: Callable[[str, str], Api], redis_url: str
) -> None:
    api = make_api(own_postgres.url("postgres"), redis_url)
    url, _ = api.start(events__HEARTBEAT_SECONDS=0.2)
    job = api.submit(url)
    stream = Reader(f"{url}/v1/jobs/{job}/events")
    stream.next()
    own_postgres.stop()
    assert stream.comment() and stream.comment()
    own_postgres.start()
    eventually("it can be canceled", lambda: _cancels(url, job), 60)
    assert [message["event"] for message in stream.end()] == ["job.canceled"]


def _cancels(url: str, job: str) -> bool:
    return requests.post(f"{url}/v1/jobs/{job}/cancel", headers=HEADERS, timeout=PATIENCE).status_code == 200


def test_nobody_holds_a_connection_to_the_database_while_a_stream_waits(api: Api) -> None:
    url, _ = api.start(app__CONNECTIONS=1)
    job = api.submit(url)
    streams = [Reader(f"{url}/v1/jobs/{job}/events") for _ in range(8)]
    for stream in streams:
        stream.next()
    assert requests.get(f"{url}/v1/jobs/{job}", headers=HEADERS, timeout=PATIENCE).status_code == 200
    api.succeed(api.claim())
    assert [sequences(stream.end()) for stream in streams] == [[2, 3]] * 8
