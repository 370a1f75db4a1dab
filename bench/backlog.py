"""`./dev bench backlog [--database postgresql] [--quick]`: does a long queue make anything slower?

The API in this process, with four clients, and claims by sixteen threads with a connection each, at 0, 10,000, 100,000
and 1,000,000 waiting jobs. A fifth of them are not due, and stand first. And at 100,000 beside somebody who reads a
state that is a minute old, since which jobs were claimed and ended and as many submitted, at the pace of a worker or as
many as can be: so PostgreSQL could clear no dead row away, and SQLite's log could not begin anew.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flask.testing import FlaskClient
from sqlalchemy import func, insert, select, text

from api.app import build, open_services
from bench.databases import Databases, PostgresDatabases, SqliteDatabases
from bench.figures import cell, percentile
from bench.machine import description
from shared import jobs
from shared.catalogue import MODELS
from shared.database import Database, now, take_as_long_as_it_needs
from shared.errors import JobErrorCode
from shared.ids import new_id
from shared.jobs import Claim, JobError, Terms
from shared.queue_head import QueueHead
from shared.routing import RoutingReason
from shared.settings import Settings
from shared.tables import Billed, Outcome
from shared.tables import jobs as table
from tests.servers import RedisServer

KEY = "dk_" + "b" * 40
BODY = {"input": {"prompt": "a red fox", "seed": 7}}
TERMS = Terms("bench", 3600, 3600, dict.fromkeys(MODELS, 0), 3)
NO_PICTURE = JobError(JobErrorCode.backend_unavailable, "there is no vendor here", True, Billed.no)
WAIT_SECONDS = 86_400
CLIENTS, CLAIMERS = 4, 16
CHUNK = 20_000
NOT_DUE = 5  # one job in so many
#: What one worker claims in a second when its calls take two.
USUAL_PACE = 100

Figures = dict[str, float]


class Backlog:
    """A Darkroom whose workers are all away."""

    def __init__(self, url: str, redis: RedisServer, seconds: float) -> None:
        settings = Settings(
            database_url=url, redis_url=redis.url, api_key=KEY, secret_key="s" * 32, max_queued=10_000_000
        )
        self._seconds = seconds
        self.services = open_services(settings)
        self.app = build(self.services)
        self.database = Database(url, connections=CLAIMERS, wait_seconds=30)
        for _ in range(20):
            self._submit(self._client())
        with self.database.read() as connection:
            self._pattern = dict(connection.execute(select(table).limit(1)).one()._mapping)

    def close(self) -> None:
        self.database.close()
        self.services.close()

    def fill(self, count: int) -> None:
        """Until so many wait. What is not due stands first, as jobs do that were put off."""
        rank = self._pattern["rank"] - count
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            rows = [
                self._pattern
                | {"id": new_id("job"), "rank": rank + number}
                | ({"ready": False, "rank": rank - 10**9} if number % NOT_DUE == 0 else {})
                for number in range(start, start + size)
            ]
            with self.database.write() as tx:
                tx.execute(insert(table), rows)
        with self.database.write() as tx:
            take_as_long_as_it_needs(tx)
            tx.execute(table.update().where(~table.c.ready, table.c.ready_at.is_(None)).values(ready_at=now(86400)))
        self.settle()

    def settle(self) -> None:
        """What a million inserts at once leave to be written and cleared away is done now, not while we measure."""
        todo = ["PRAGMA wal_checkpoint(TRUNCATE)", "ANALYZE"]
        if not self.database.is_sqlite:
            todo = ["SET statement_timeout = 0", "VACUUM (ANALYZE)", "CHECKPOINT", "RESET statement_timeout"]
        with self.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for line in todo:
                connection.execute(text(line))

    def measure(self) -> Figures:
        submits = self._rate(self._submit)
        waiting = self._submit(self._client())
        reads = self._rate(lambda client: self._get(client, f"/v1/jobs/{waiting}"))
        queue = self._times(lambda: self._get(self._client(), "/v1/queue"), 5)
        claims = self.claims()
        return {
            "submits": submits,
            "reads": reads,
            "queue": percentile(queue, 50) * 1000,
            "claim_p50": percentile(claims, 50) * 1000,
            "claim_p99": percentile(claims, 99) * 1000,
        }

    def claims(self, per_second: float | None = None) -> list[float]:
        """What a claim of one job takes, in seconds, with sixteen at once. The jobs end, and as many are submitted.

        `per_second`: so many of all sixteen together; as many as can be without it.
        """
        taken: list[float] = []
        head = QueueHead()
        start = time.monotonic()
        end = start + self._seconds

        def work(number: int) -> None:
            due = start + number / per_second if per_second else start
            while True:
                time.sleep(max(due - time.monotonic(), 0))
                if taken and time.monotonic() >= end:  # one at least, if the machine stands still all the time
                    break
                due += CLAIMERS / per_second if per_second else 0
                began = time.perf_counter()
                with self.database.write() as tx:
                    claimed = jobs.claim(tx, "dataoorts", TERMS, head=head)
                taken.append(time.perf_counter() - began)
                for claim in claimed:
                    self._end_and_submit(claim)

        with ThreadPoolExecutor(CLAIMERS) as pool:
            list(pool.map(work, range(CLAIMERS)))
        return taken

    def _end_and_submit(self, claim: Claim) -> None:
        with self.database.write() as tx:
            jobs.fail(tx, claim, NO_PICTURE)
            jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.failed, Billed.no)
            alike = ("project_id", "model", "backend_asked", "backend", "input", "metadata", "sandbox")
            jobs.submit(
                tx,
                **{name: self._pattern[name] for name in alike},
                reason=RoutingReason.asked,
                deadline_seconds=None,
                max_wait_seconds=WAIT_SECONDS,
            )

    def _client(self) -> FlaskClient:
        client = self.app.test_client(use_cookies=False)
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {KEY}"
        return client

    def _submit(self, client: FlaskClient) -> str:
        answer = client.post("/v1/jobs", json=BODY)
        assert answer.status_code == 202, answer.text
        return str((answer.json or {})["id"])

    def _get(self, client: FlaskClient, path: str) -> None:
        answer = client.get(path)
        assert answer.status_code == 200, answer.text

    def _rate(self, act: Callable[[FlaskClient], object]) -> float:
        """How many of these a second, with four clients at once."""
        done = [0] * CLIENTS
        end = time.monotonic() + self._seconds

        def work(number: int) -> None:
            client = self._client()
            while time.monotonic() < end:
                act(client)
                done[number] += 1

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(work, range(CLIENTS)))
        return sum(done) / self._seconds

    def _times(self, act: Callable[[], object], count: int) -> list[float]:
        taken = []
        for _ in range(count):
            began = time.perf_counter()
            act()
            taken.append(time.perf_counter() - began)
        return taken


@contextmanager
def an_old_snapshot(backlog: Backlog, seconds: float, claims_per_second: float | None) -> Iterator[None]:
    """While the block runs somebody reads a state from before it, so many seconds and claims ago."""
    newest = select(func.max(table.c.id))
    with closing(Database(backlog.database.url, connections=1)) as elsewhere, elsewhere.engine.connect() as old:
        if elsewhere.is_sqlite:
            old.exec_driver_sql("BEGIN")
        else:
            old.execution_options(isolation_level="REPEATABLE READ")
            old.execute(text("SET idle_in_transaction_session_timeout = 0"))
        seen = old.scalar(newest)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            backlog.claims(claims_per_second)
        yield
        assert old.scalar(newest) == seen, "it still reads what was then"
        old.rollback()


ROWS = (
    ("submits", "submits, 4 clients in the API's process, 1/s"),
    ("reads", "reads of a waiting job, 1/s"),
    ("queue", "GET /v1/queue, p50, ms"),
    ("claim_p50", "a claim, 16 at once, p50, ms"),
    ("claim_p99", "the same, p99, ms"),
)


@dataclass(frozen=True)
class Sizes:
    """How long the queues are, how often and how long each is measured, how old the old snapshot is. In seconds."""

    depths: Sequence[int]
    beside_snapshot: int  # how long the queue is that it stands beside
    turns: int
    seconds: float
    minute: float


FULL = Sizes((0, 10_000, 100_000, 1_000_000), 100_000, 3, 3.0, 60.0)
QUICK = Sizes((0, 1_000), 1_000, 1, 0.5, 1.0)


def run(databases: Databases, folder: Path, sizes: Sizes) -> Iterator[str]:
    """The table, a line at a time once it is whole. The queues are measured in turns, as the machine is not always as
    fast: one after the other, the last one looked slower by a third."""
    columns: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        redis = RedisServer()
        redis.start()
        stack.callback(redis.close)
        backlogs: dict[str, Backlog] = {}

        def queue_of(depth: int, name: str) -> Backlog:
            its = folder / str(len(backlogs))
            its.mkdir()
            backlogs[name] = stack.enter_context(closing(Backlog(databases.make(its), redis, sizes.seconds)))
            backlogs[name].fill(depth)
            return backlogs[name]

        for depth in sizes.depths:
            queue_of(depth, f"{depth:,} waiting")
        for pace, said in ((USUAL_PACE, f"{USUAL_PACE} claims a second since"), (None, "as many as can be")):
            backlog = queue_of(sizes.beside_snapshot, f"{sizes.beside_snapshot:,}, and an old snapshot, {said}")
            stack.enter_context(an_old_snapshot(backlog, sizes.minute, pace))
        for _ in range(sizes.turns):
            for name, backlog in backlogs.items():
                columns.setdefault(name, []).append(backlog.measure())
    yield "| | " + " | ".join(columns) + " |"
    yield "| --- " * (len(columns) + 1) + "|"
    for key, title in ROWS:
        cells = [cell([figures[key] for figures in measured]) for measured in columns.values()]
        yield f"| {title} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev bench backlog", description="Does a long queue make anything slower?")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--quick", action="store_true", help="short, and with a thousand jobs")
    wanted = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="darkroom-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        databases = SqliteDatabases(folder) if wanted.database == "sqlite" else PostgresDatabases()
        stack.callback(databases.close)
        _print(description(databases.description))
        for line in run(databases, folder, QUICK if wanted.quick else FULL):
            _print(line)
    return 0


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
