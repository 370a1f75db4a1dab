"""A repeat, or a wish for another picture? Clients of the vendor send the same body for both, and no key.

The rule (docs/decisions.md says why): the project's latest job of the same body is joined as long as it is open, or
its picture has reached nobody for an hour, or the body has a seed, for a day. Else it is a wish for another picture.

It stands in the table of the idempotency keys, under a key that is made from the body: so it holds at any concurrency,
on both databases, and within one project alone. What is delivered is taken out of it *before* it is sent: a client may
ask for the next picture the moment it has this one.
"""

from contextlib import suppress
from typing import Any

from flask import request
from sqlalchemy import Connection, delete, select

from api import idempotency
from api.idempotency import Key
from shared.database import AWAY, Database, now
from shared.standing import TERMINAL
from shared.tables import Status, jobs
from shared.tables import idempotency_keys as keys

#: For how long after its end a picture that reached nobody is given to the next who asks for the same.
OFFERED_SECONDS = 3600


def key_of(project_id: str, submission: Any) -> Key:
    """What stands for this wish: the same for bodies that ask for the same, however they spell it."""
    hashed = idempotency.request_hash(request.method, request.path, submission)
    # With a blank, which no key of a client can have.
    return Key(project_id, f"compat {hashed}", hashed)


def first_of(tx: Connection, key: Key, *, has_seed: bool) -> str | None:
    """The job that this request repeats. None if it wants another picture: the key is ours then, for `keep()`."""
    while (first := idempotency.take(tx, key)) is not None:
        if _is_joined(tx, first, has_seed):
            return first
        # If somebody else was faster on PostgreSQL, the next round finds the job that he made.
        _forget(tx, key, first)
    return None


def _is_joined(tx: Connection, job_id: str, has_seed: bool) -> bool:
    fresh = jobs.c.completed_at > now(-OFFERED_SECONDS)
    query = select(jobs.c.status, jobs.c.data_removed, fresh.label("fresh")).where(jobs.c.id == job_id)
    job = tx.execute(query).one()
    if job.status not in TERMINAL:
        return True
    return job.status == Status.succeeded and not job.data_removed and (has_seed or job.fresh)


def delivered(database: Database, key: Key, job_id: str) -> None:
    """This picture is on its way to a client: the next request like this wants another one."""
    # If the database is away, the client gets its picture all the same; the next one may then get it again.
    with suppress(*AWAY), database.write() as tx:
        _forget(tx, key, job_id)


def offer_again(database: Database, key: Key, job_id: str) -> None:
    """This picture did not reach its client. If another job was made meanwhile, that one is what is joined."""
    with suppress(*AWAY), database.write() as tx:
        if idempotency.take(tx, key) is None:
            idempotency.keep(tx, key, job_id)


def _forget(tx: Connection, key: Key, job_id: str) -> None:
    tx.execute(delete(keys).where(keys.c.project_id == key.project_id, keys.c.key == key.text, keys.c.job_id == job_id))
