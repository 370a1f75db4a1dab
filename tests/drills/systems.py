"""The two systems as a drill sees them: the same verbs and questions for both, each answered in its own way."""

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import psycopg
import redis
import requests
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import select, text, update

import migrations
from bench.databases import Databases
from bench.load.dialects import API_KEY
from bench.outside import eventually
from bench.processes import ROOT
from bench.systems import Baseline, Darkroom, System
from bench.vendor import SIDE
from shared.database import AWAY, Database
from shared.settings import child_environ
from shared.tables import Billed, Outcome, Status, attempts, events, images, jobs, workers
from shared.tickets import queue_of
from tests.drills.own_postgres import OwnPostgres
from tests.drills.small_disk import SmallDisk
from tests.fault_proxy import FaultProxy

#: How long a client waits for the answer to one request, in seconds.
CLIENTS_PATIENCE = 30
#: What a newer version may do to the database while the older one still works.
NEXT_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "{number}"
down_revision = "{before}"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("in_{number}", sa.String(10)))
    op.create_index("ix_jobs_in_{number}", "jobs", ["in_{number}"])
    op.execute("UPDATE jobs SET in_{number} = 'old'")
"""
OPEN = (Status.queued, Status.running)


class End(NamedTuple):
    """How a job ended. `exactly`: two ends are the same one only if this is the same."""

    succeeded: bool
    exactly: str


class Books(NamedTuple):
    """What a system itself says of its calls: those whose end it never saw, and those that it may have to pay."""

    unknown: int
    payable: int


class Drilled(System):
    """A system that can be broken, and asked what became of its jobs behind its own back.

    `web`, `worker`: the names of the processes to break; `queue`: the Redis list that its messages wait in.
    """

    web: str
    worker: str
    queue: str
    proxy: FaultProxy | None = None
    #: The small disk that a drill gave it.
    disk: SmallDisk

    def __init__(self) -> None:
        super().__init__()
        #: What is to be undone when it has ended.
        self.at_end = ExitStack()
        #: Refused submissions, by status and whether a Retry-After came with it.
        self.refusals: Counter[tuple[int, bool]] = Counter()

    def migrate_to_next_version(self) -> None:
        """What starts from now on is a newer version, and its database is ready for it; where there is one."""

    def is_up(self, name: str) -> bool:
        """Whether a process that was started is at work; where it can be told."""
        return name != self.web or self.answers()

    def put_redis_behind_proxy(self) -> None:
        """Before it starts: it reaches its Redis through `proxy`."""
        self.proxy = FaultProxy(self.redis_port)
        self.redis_url = f"redis://127.0.0.1:{self.proxy.port}/0"

    def redis(self, patience: float = 60) -> redis.Redis:
        """A client of the drill's own, past any proxy. It waits for so many seconds."""
        return redis.Redis(port=self.redis_port, socket_timeout=patience, retry=Retry(NoBackoff(), 0))

    def kill(self, name: str) -> None:
        """SIGKILL to a process and all its children."""
        self.processes.kill(name)

    def stop(self, name: str, grace: float) -> int | None:
        """Ask a process to end, and wait for it: its exit code, None if it had to be killed."""
        return self.processes.stop(name, grace)

    def freeze(self, name: str) -> None:
        """SIGSTOP to a process and all its children."""
        self.processes.freeze(name)

    def thaw(self, name: str) -> None:
        self.processes.thaw(name)

    def start_second_worker(self) -> str:
        """One more worker on the same queue; its name."""
        self.lines["second-worker"] = f"{self.lines[self.worker]} -n second@%h"
        self.start("second-worker")
        return "second-worker"

    def restart_redis(self, appends: bool) -> None:
        """Start it after a kill: with its append-only file, or without one and so with nothing in it."""
        self.redis_appends = appends
        if not appends:
            shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)
        self.start_redis()

    def redis_answers(self) -> bool:
        with suppress(redis.RedisError), self.redis() as client:
            return bool(client.ping())
        return False

    def take_own_store(self) -> None:
        """Before it starts: what it keeps its jobs in is the drill's to break."""

    @abstractmethod
    def put_store_on(self, folder: Path) -> None:
        """Before it starts: what it keeps its jobs in, or else its pictures, is in this folder."""

    def put_spool_on(self, folder: Path) -> None:
        """Before it starts: what it receives, it writes down in this folder first; if it does such a thing."""

    def store_has_died(self) -> bool:
        """Whether what it keeps its jobs in ended by itself."""
        return False

    def store_answers(self) -> bool:
        """Whether what it keeps its jobs in does; started again if it has died."""
        return True

    @abstractmethod
    def kill_store(self) -> None:
        """SIGKILL to what it keeps its jobs in."""

    @abstractmethod
    def stop_store(self) -> None:
        """As for a restart."""

    @abstractmethod
    def start_store(self) -> None:
        """After a kill or a stop; returns when it answers."""

    @abstractmethod
    def cut_off_store(self) -> None:
        """What it keeps its jobs in answers nothing any more."""

    @abstractmethod
    def reconnect_store(self) -> None:
        """And answers again."""

    @abstractmethod
    def submit(self, http: requests.Session, prompt: str) -> str | None:
        """Ask for a picture; the job's id, or None if it was not accepted. Raises what requests raises."""

    @abstractmethod
    def image(self, http: requests.Session, job_id: str) -> bytes | None:
        """The picture as it is served; None if there is none."""

    @abstractmethod
    def ended(self, ids: Iterable[str]) -> dict[str, End]:
        """Those of these jobs that have ended; none while nobody can tell."""

    @abstractmethod
    def pictures(self, ids: Iterable[str]) -> int:
        """How many of these jobs have their picture."""

    @abstractmethod
    def taken(self, accepted: Mapping[str, str]) -> set[str]:
        """The jobs that workers have in their hands. `accepted`: prompts by job."""

    def books(self, ids: Iterable[str]) -> Books | None:
        """What it says of the calls for these jobs; None if it keeps no books."""
        return None

    def books_by_job(self, ids: Iterable[str]) -> dict[str, Books]:
        """The same, job by job; nothing if it keeps no books."""
        return {}

    def ended_twice(self) -> int:
        """Jobs with more than one end, or more than one picture, by its own books."""
        return 0

    def still_in_redis(self, ids: Iterable[str]) -> int:
        """How many of these jobs lie in Redis, so that somebody may find them yet."""
        return 0

    def failed_with(self, job_id: str) -> str | None:
        """The code of a failed job's error; None if there is no such thing."""
        return None

    def spooled(self) -> int | None:
        """Pictures that it received and has not stored; None if it does not write them down."""
        return None

    def storing_held(self) -> AbstractContextManager[None]:
        """While the block runs no picture can be stored; where there are others than files."""
        return nullcontext()

    def waiting_to_store(self) -> int | None:
        """Pictures that can't be stored now; None if nobody waits with one."""
        return None

    def close(self) -> None:
        super().close()
        if self.proxy is not None:
            self.proxy.close()
        self.at_end.close()


class Elsewhere(Databases):
    """For a database that the drill itself made, and ends."""

    def make(self, folder: Path) -> str:
        raise NotImplementedError

    def drop(self, url: str) -> None:
        """It goes with its server, or its folder."""

    def close(self) -> None:
        """It goes with its server, or its folder."""


class DrilledDarkroom(Darkroom, Drilled):
    web, worker = "api", "worker-dataoorts"
    queue = queue_of("dataoorts")
    #: Its database, if that is the drill's to break.
    postgres: OwnPostgres | None = None

    def __init__(self, databases: Databases, lease_seconds: float) -> None:
        super().__init__(databases, DARKROOM_LEASE_SECONDS=f"{lease_seconds:g}")
        self._database = Database(self.database_url, connections=4)
        self._house = ROOT
        self._versions = 0

    def _home(self) -> Path:
        return self._house

    def migrate_to_next_version(self) -> None:
        """The version that runs, with one more migration. The old processes meet its columns, as in any deploy."""
        number = int(migrations.newest()) + self._versions + 1
        self._versions += 1
        house = self.folder / f"version-{number}"
        for room in ("api", "worker", "shared", "migrations"):
            shutil.copytree(self._house / room, house / room, ignore=shutil.ignore_patterns("__pycache__"))
        migration = NEXT_MIGRATION.format(number=f"{number:04}", before=f"{number - 1:04}")
        (house / "migrations" / "versions" / f"{number:04}_next.py").write_text(migration)
        subprocess.run([sys.executable, "-m", "migrations"], cwd=house, env=child_environ(self._environ()), check=True)
        self._house = house

    def is_up(self, name: str) -> bool:
        if name == self.web:
            return self.answers()
        its_row = select(workers.c.name).where(workers.c.name.endswith(f":{self.processes.running[name].pid}"))
        with suppress(*AWAY), self._database.read() as connection:
            return connection.execute(its_row).first() is not None
        return False

    def take_own_store(self) -> None:
        self._take(OwnPostgres())

    def put_store_on(self, folder: Path) -> None:
        if self._database.is_sqlite:
            file = shutil.copy(str(self._database.engine.url.database), folder / "darkroom.db")
            self._settings["DARKROOM_DATA_DIR"] = str(folder)
            self._move_to(f"sqlite:///{file}", f"sqlite:///{file}")
        else:
            self._take(OwnPostgres(folder))

    def put_spool_on(self, folder: Path) -> None:
        self._settings["DARKROOM_SPOOL"] = str(folder / "spool")

    def _take(self, postgres: OwnPostgres) -> None:
        self.postgres = postgres
        self.at_end.callback(postgres.close)
        self._move_to(postgres.url, postgres.own_url)

    def _move_to(self, url: str, own_url: str) -> None:
        self._database.close()
        self._databases.drop(self.database_url)
        self._databases = Elsewhere()
        self.database_url = url
        self._database = Database(own_url, connections=4)

    def _own(self) -> OwnPostgres:
        assert self.postgres is not None
        return self.postgres

    def store_has_died(self) -> bool:
        return self.postgres is not None and self.postgres.has_died()

    def store_answers(self) -> bool:
        with suppress(*AWAY, psycopg.OperationalError):
            if self.store_has_died():
                self._own().start()
            with self._database.write() as tx:
                tx.execute(update(jobs).where(jobs.c.id == "").values(fence=0))
            return True
        return False

    def kill_store(self) -> None:
        self._own().kill()

    def stop_store(self) -> None:
        self._own().stop()

    def start_store(self) -> None:
        self._own().start()

    def cut_off_store(self) -> None:
        self._own().cut_off()

    def reconnect_store(self) -> None:
        self._own().reconnect()

    @contextmanager
    def storing_held(self) -> Iterator[None]:
        """On PostgreSQL."""
        with self._database.engine.connect() as connection, connection.begin() as holding:
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            connection.execute(text("LOCK TABLE images IN EXCLUSIVE MODE"))  # can be read, not written
            yield
            holding.rollback()

    def waiting_to_store(self) -> int | None:
        waiting = text("SELECT count(*) FROM pg_locks WHERE relation = 'images'::regclass AND NOT granted")
        with self._database.read() as connection:
            return int(connection.execute(waiting).scalar_one())

    def failed_with(self, job_id: str) -> str | None:
        with self._database.read() as connection:
            error = connection.scalar(select(jobs.c.error).where(jobs.c.id == job_id))
        return str(error["code"]) if error else None

    def spooled(self) -> int | None:
        spool = self._settings.get("DARKROOM_SPOOL") or Path(self._environ()["DARKROOM_DATA_DIR"]) / "spool"
        return sum(1 for _ in Path(spool).rglob("*.picture"))

    def freeze(self, name: str) -> None:
        """Not in the middle of a write to SQLite: whoever stops there keeps the one lock, and all others wait."""
        super().freeze(name)
        while self._database.is_sqlite and not self._can_be_written():
            self.thaw(name)
            super().freeze(name)

    def _can_be_written(self) -> bool:
        """Asked twice: it takes a moment until every thread has stopped."""
        return self._lock_is_free() and not threading.Event().wait(0.2) and self._lock_is_free()

    def _lock_is_free(self) -> bool:
        with closing(sqlite3.connect(str(self._database.engine.url.database), timeout=0.5)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            return True

    def submit(self, http: requests.Session, prompt: str) -> str | None:
        answer = http.post(
            f"http://127.0.0.1:{self.port}/v1/jobs",
            json={"input": {"prompt": prompt, "width": SIDE, "height": SIDE}},
            headers={"Authorization": f"Bearer {API_KEY}", "Idempotency-Key": prompt.replace(" ", "-")},
            timeout=CLIENTS_PATIENCE,
        )
        if answer.status_code in (200, 202):
            return str(answer.json()["id"])
        self.refusals[answer.status_code, "Retry-After" in answer.headers] += 1
        return None

    def image(self, http: requests.Session, job_id: str) -> bytes | None:
        answer = http.get(
            f"http://127.0.0.1:{self.port}/v1/jobs/{job_id}/image",
            headers={"Authorization": f"Bearer {API_KEY}"},
            timeout=CLIENTS_PATIENCE,
        )
        return answer.content if answer.status_code == 200 else None

    def ended(self, ids: Iterable[str]) -> dict[str, End]:
        wanted = set(ids)
        facts = select(jobs.c.id, jobs.c.status, jobs.c.sequence, jobs.c.image_attempt, jobs.c.completed_at)
        with suppress(*AWAY), self._database.read() as connection:
            rows = connection.execute(facts.where(jobs.c.status.not_in(OPEN))).all()
            return {row.id: End(row.status == Status.succeeded, str(tuple(row))) for row in rows if row.id in wanted}
        return {}

    def pictures(self, ids: Iterable[str]) -> int:
        with self._database.read() as connection:
            return len(set(ids) & set(connection.scalars(select(images.c.job_id))))

    def taken(self, accepted: Mapping[str, str]) -> set[str]:
        with self._database.read() as connection:
            return set(connection.scalars(select(jobs.c.id).where(jobs.c.status == Status.running)))

    def books(self, ids: Iterable[str]) -> Books | None:
        books = self.books_by_job(ids).values()
        return Books(sum(its.unknown for its in books), sum(its.payable for its in books))

    def books_by_job(self, ids: Iterable[str]) -> dict[str, Books]:
        with self._database.read() as connection:
            rows = connection.execute(select(attempts.c.job_id, attempts.c.outcome, attempts.c.billed)).all()
        unknown = Counter(row.job_id for row in rows if row.outcome == Outcome.unknown)
        payable = Counter(row.job_id for row in rows if row.billed in (Billed.yes, Billed.unknown))
        return {job_id: Books(unknown[job_id], payable[job_id]) for job_id in ids}

    def ended_twice(self) -> int:
        ends = [f"job.{status}" for status in Status if status not in OPEN]
        with self._database.read() as connection:
            ended = Counter(connection.scalars(select(events.c.subject_id).where(events.c.type.in_(ends))))
            drawn = Counter(connection.scalars(select(images.c.job_id)))
        return sum(1 for count in (ended | drawn).values() if count > 1)

    def close(self) -> None:
        self._database.close()
        super().close()


class DrilledBaseline(Baseline, Drilled):
    web, worker = "web", "worker"
    queue = "celery"

    def __init__(self, visibility_seconds: float) -> None:
        """What was not acked for so long is given out again; Redis is looked through for it every 5 s."""
        super().__init__(visibility_timeout=visibility_seconds, unacked_restore_interval=5, unacked_restore_throttle=1)

    def put_store_on(self, folder: Path) -> None:
        self.pictures_folder = folder / "pictures"

    def kill_store(self) -> None:
        self.kill("redis")

    def stop_store(self) -> None:
        self.kill("redis")

    def start_store(self) -> None:
        self.restart_redis(appends=True)
        eventually("Redis answers", self.processes, self.redis_answers)

    def cut_off_store(self) -> None:
        self.freeze("redis")

    def reconnect_store(self) -> None:
        self.thaw("redis")

    def submit(self, http: requests.Session, prompt: str) -> str | None:
        answer = http.post(
            f"http://127.0.0.1:{self.port}/jobs",
            json={"prompt": prompt, "width": SIDE, "height": SIDE},
            timeout=CLIENTS_PATIENCE,
        )
        return str(answer.json()["id"]) if answer.status_code == 202 else None

    def image(self, http: requests.Session, job_id: str) -> bytes | None:
        answer = http.get(f"http://127.0.0.1:{self.port}/jobs/{job_id}/image", timeout=CLIENTS_PATIENCE)
        return answer.content if answer.status_code == 200 else None

    def ended(self, ids: Iterable[str]) -> dict[str, End]:
        asked = list(ids)
        found: list[bytes | None] = []
        with suppress(redis.RedisError), self.redis(patience=2) as client:  # it may be frozen: then nobody can tell
            found = client.mget([f"celery-task-meta-{job_id}" for job_id in asked]) if asked else []
        results = {job_id: json.loads(result) for job_id, result in zip(asked, found, strict=False) if result}
        return {job_id: End(result["status"] == "SUCCESS", str(result)) for job_id, result in results.items()}

    def pictures(self, ids: Iterable[str]) -> int:
        return sum(1 for job_id in ids if (self.pictures_folder / f"{job_id}.png").exists())

    def taken(self, accepted: Mapping[str, str]) -> set[str]:
        called = self.vendor.book()["by_prompt"]
        over = self.ended(accepted)
        return {job_id for job_id, prompt in accepted.items() if prompt in called and job_id not in over}

    def still_in_redis(self, ids: Iterable[str]) -> int:
        with self.redis() as client:
            held = b"\n".join([*client.hvals("unacked"), *client.lrange(self.queue, 0, -1)])
        return sum(1 for job_id in ids if job_id.encode() in held)
