"""Jobs brought into a state of their life with the moves themselves, for the tests of every room."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from sqlalchemy import Connection, Row, insert, select, text

from shared import jobs
from shared.database import Database
from shared.ids import new_id
from shared.image_store import Image
from shared.jobs import Claim, Terms
from shared.routing import RoutingReason
from shared.tables import Billed, Outcome
from shared.tables import jobs as table

PRICES: Mapping[str, int] = {"m": 8000}
TERMS = Terms(worker="w", lease_seconds=20, attempt_seconds=60, prices=PRICES, max_crashes=3)

SUBMISSION: Mapping[str, Any] = {
    "project_id": "prj_a",
    "model": "m",
    "backend_asked": "auto",
    "backend": "dataoorts",
    "reason": RoutingReason.first,
    "input": {"prompt": "a red fox"},
    "metadata": {},
    "sandbox": True,
    "deadline_seconds": None,
    "max_wait_seconds": 3600,
}

#: Of these, what a retry decides anew.
AGAIN = ("backend", "reason", "sandbox", "max_wait_seconds")


def submit(database: Database, **changes: Any) -> Row[Any]:
    with database.write() as tx:
        return jobs.submit(tx, **{**SUBMISSION, **changes})


def many(database: Database, count: int, **changes: Any) -> None:
    """So many queued jobs at once, written past jobs.submit(): for tests that need a crowd and no history."""
    first = submit(database)._mapping
    with database.write() as tx:
        tx.execute(insert(table), [{**first, "id": new_id("job"), **changes} for _ in range(count - 1)])
        tx.execute(text("ANALYZE"))


def claim_one(database: Database, tx: Connection | None = None) -> Claim:
    """The next job, claimed as a worker does. Fails if there is none."""
    with nullcontext(tx) if tx is not None else database.write() as connection:
        [claim] = jobs.claim(connection, "dataoorts", TERMS)
    return claim


def an_image(claim: Claim, data: bytes = b"picture", **changes: Any) -> Image:
    values = {
        "job_id": claim.job_id,
        "attempt": claim.attempt,
        "content_type": "image/png",
        "width": 512,
        "height": 512,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "warnings": [],
    }
    return Image(**{**values, **changes})


def ended(database: Database, claim: Claim) -> None:
    """The claimed job succeeds."""
    with database.write() as tx:
        assert jobs.succeed(tx, claim, an_image(claim))
        jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.succeeded, Billed.yes)


def job_row(database: Database, job_id: str) -> Row[Any]:
    with database.read() as connection:
        return connection.execute(select(table).where(table.c.id == job_id)).one()


def plan(database: Database, query: Any, options: str = "") -> str:
    """How the database would run a query. `options`: of PostgreSQL's EXPLAIN."""
    explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else f"EXPLAIN ({options or 'COSTS'}) "
    with database.read() as connection:
        compiled = query.compile(database.engine, compile_kwargs={"literal_binds": True, "render_postcompile": True})
        return " ".join(str(row) for row in connection.execute(text(explain + str(compiled))))


def pass_time(database: Database, seconds: float) -> None:
    """Every delivery and receiver that waits for a time has waited for so much longer."""

    earlier = "strftime('%Y-%m-%d %H:%M:%f', {0}, '-{1} seconds')" if database.is_sqlite else "{0} - interval '{1} s'"
    with database.write() as tx:
        for rows, columns in (
            ("deliveries", ("due_at", "lease_until", "created_at", "scheduled_at")),
            ("receivers", ("rest_until", "next_due_at", "failing_since")),
        ):
            changes = ", ".join(f"{name} = {earlier.format(name, seconds)}" for name in columns)
            tx.execute(text(f"UPDATE {rows} SET {changes}"))  # noqa: S608  nothing here comes from outside
