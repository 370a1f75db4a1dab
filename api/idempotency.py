"""`Idempotency-Key`: a repeated request gets the job of the first one, whatever happened to the first one's answer.

The key is kept in the job's own transaction. A twin in flight waits for the first one's commit: on PostgreSQL at the
unique key, on SQLite at the writer's lock. A refused request leaves its transaction, and so keeps no key.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from flask import g, request
from sqlalchemy import Connection, select, update
from sqlalchemy.dialects import postgresql, sqlite

from api.errors import Refused, invalid_parameter
from shared.database import Database, now
from shared.tables import KEYS_KEPT_SECONDS
from shared.tables import idempotency_keys as keys

_VISIBLE = re.compile(r"[\x21-\x7e]{1,255}")


class KeyReused(Exception):
    """The key was used for another request."""


@dataclass(frozen=True)
class Key:
    """A project's key, with the hash of the request that it stands for."""

    project_id: str
    text: str
    request_hash: str


def parse(header: str) -> str:
    """The key in a header: 1 to 255 visible ASCII characters, bare or quoted. ValueError if it is none."""
    quoted = len(header) >= 2 and header[0] == header[-1] == '"'
    text = header[1:-1] if quoted else header
    if not _VISIBLE.fullmatch(text):
        raise ValueError("Must be 1 to 255 visible ASCII characters, given once.")
    return text


def request_hash(method: str, path: str, body: Any) -> str:
    """The same for the same request, however its JSON was written down."""
    canonical = json.dumps([method, path, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def take(tx: Connection, key: Key) -> str | None:
    """Take the key for this request. Returns the job that has it already, None if it is now ours: then `keep()` it.

    Raises KeyReused if it stands for another request.
    """
    mine = {"request_hash": key.request_hash, "job_id": "", "created_at": now()}
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    new = dialect.insert(keys).values(project_id=key.project_id, key=key.text, **mine)
    # One statement, which takes the key or locks its row: after two, the sweep may have forgotten it in between.
    taken = new.on_conflict_do_update(
        index_elements=[keys.c.project_id, keys.c.key],
        set_=mine,
        where=keys.c.created_at < now(-KEYS_KEPT_SECONDS),
    )
    if tx.scalar(taken.returning(keys.c.key)) is not None:
        return None
    is_it = (keys.c.project_id == key.project_id, keys.c.key == key.text)
    first = tx.execute(select(keys.c.request_hash, keys.c.job_id).where(*is_it)).one()
    if first.request_hash != key.request_hash:
        raise KeyReused
    return str(first.job_id)


def seen(database: Database, key: Key | None) -> str | None:
    """The job that an earlier request with this key made, if that is committed: for what is dear to do in vain."""
    if key is None:
        return None
    is_it = (keys.c.project_id == key.project_id, keys.c.key == key.text, keys.c.created_at >= now(-KEYS_KEPT_SECONDS))
    with database.read() as connection:
        found = connection.execute(select(keys.c.request_hash, keys.c.job_id).where(*is_it)).one_or_none()
    if found is None:
        return None
    if found.request_hash != key.request_hash:
        raise _reused()
    return str(found.job_id)


def keep(tx: Connection, key: Key, job_id: str) -> None:
    """The key stands for this job from the commit on."""
    tx.execute(update(keys).where(keys.c.project_id == key.project_id, keys.c.key == key.text).values(job_id=job_id))


def asked_key(body: Any) -> Key | None:
    """The key that this request, with this parsed body, asks for; None if it has no such header."""
    header = request.headers.get("Idempotency-Key")
    if header is None:
        return None
    try:
        text = parse(header)
    except ValueError as error:
        raise invalid_parameter("Idempotency-Key", str(error)) from None
    return Key(g.project_id, text, request_hash(request.method, request.path, body))


def first_of(tx: Connection, key: Key | None) -> str | None:
    """The job that an earlier request with this key made."""
    try:
        return None if key is None else take(tx, key)
    except KeyReused:
        raise _reused() from None


def _reused() -> Refused:
    return Refused(
        "idempotency_key_reused", "Another request was sent with this key in the last 24 hours: use a new one."
    )
