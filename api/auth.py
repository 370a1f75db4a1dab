"""Who is asking: from a key to the project whose jobs it may see.

Keys are stored as an HMAC under SECRET_KEY, found by their first characters and compared in constant time.
"""

import hmac
import logging
import re
import time

from flask import Flask, g, request
from sqlalchemy import ColumnElement, and_, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ProgrammingError

from api.errors import Refused, not_found
from shared.database import AWAY, Database, now
from shared.ids import is_id, new_id
from shared.image_link import is_ours, seconds_left
from shared.settings import Settings
from shared.tables import jobs, keys, projects

log = logging.getLogger(__name__)

DEFAULT_PROJECT = "default"

#: How much of a key finds its row: `dk_` and eight characters.
PREFIX_LENGTH = 11

#: A key that was verified is trusted for so long without a look at the database.
TRUSTED_SECONDS = 10

#: The one route that a signed link opens as well as a key.
_LINKED = "/v1/jobs/<id>/image"
_MOMENT = re.compile("[0-9]{1,12}")
_NO_REFERRER = {"Referrer-Policy": "no-referrer"}

_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_KEY = re.compile(r"dk_[\x21-\x7e]{8,}")


def hash_key(key: str, secret_key: str) -> str:
    """What is stored of a key."""
    return hmac.digest(secret_key.encode(), key.encode(), "sha256").hex()


def install_bootstrap_key(database: Database, settings: Settings) -> None:
    """Make the default project, and make API_KEY its key in place of an earlier one.

    Several processes may do so at once. A setting that is gone takes its key with it.
    """
    key = settings.api_key
    wanted = [] if key is None else [(key[:PREFIX_LENGTH], hash_key(key, settings.secret_key))]
    is_bootstrap = select(keys.c.prefix, keys.c.hash).where(keys.c.bootstrap)
    with database.read() as connection:
        project_id = connection.scalar(select(projects.c.id).where(projects.c.name == DEFAULT_PROJECT))
        if project_id and [tuple(row) for row in connection.execute(is_bootstrap)] == wanted:
            return
    insert = sqlite.insert if database.is_sqlite else postgresql.insert
    with database.write() as tx:
        tx.execute(
            insert(projects)
            .values(id=new_id("prj"), name=DEFAULT_PROJECT, created_at=now())
            .on_conflict_do_nothing(index_elements=["name"])
        )
        # Locked, so that those who install different keys at once do so one after the other.
        default = select(projects.c.id).where(projects.c.name == DEFAULT_PROJECT).with_for_update()
        project_id = tx.scalar(default)
        tx.execute(delete(keys).where(keys.c.bootstrap, keys.c.prefix.not_in([prefix for prefix, _ in wanted])))
        for prefix, hashed in wanted:
            statement = insert(keys).values(
                prefix=prefix, project_id=project_id, hash=hashed, bootstrap=True, created_at=now()
            )
            tx.execute(
                statement.on_conflict_do_update(
                    index_elements=["prefix"],
                    set_={"hash": statement.excluded.hash, "created_at": statement.excluded.created_at},
                    where=keys.c.bootstrap,  # somebody else's key with the same start stays what it is
                )
            )


class Keys:
    """The keys of this service, as the database knows them."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._bootstrapped = False
        self._trusted: dict[str, tuple[float, str]] = {}  # hash of a key -> until when, and its project
        try:
            self._bootstrap()
        except (*AWAY, Refused) as error:
            log.warning("the bootstrap key is not installed yet (%s); the first request will", type(error).__name__)

    def _bootstrap(self) -> None:
        if self._bootstrapped:
            return
        try:
            install_bootstrap_key(self._database, self._settings)
        except ProgrammingError:  # PostgreSQL's way to say that there is no such table
            raise Refused("unavailable", "The database is not migrated yet.", headers={"Retry-After": "5"}) from None
        self._bootstrapped = True

    def project_of(self, authorization: str | None) -> str:
        """The project of the key in this header; refused if there is no such key."""
        bearer = _BEARER.fullmatch(authorization or "")
        if bearer is None:
            raise _unauthenticated("Send a key: `Authorization: Bearer dk_...`.", "Bearer")
        key = bearer[1]
        if not _KEY.fullmatch(key):
            raise _unknown_key()
        hashed = hash_key(key, self._settings.secret_key)
        until, project_id = self._trusted.get(hashed, (0.0, ""))
        if time.monotonic() < until:
            return project_id
        return self._look_up(key, hashed)

    def _look_up(self, key: str, hashed: str) -> str:
        self._bootstrap()
        with self._database.read() as connection:
            row = connection.execute(
                select(keys.c.hash, keys.c.project_id).where(keys.c.prefix == key[:PREFIX_LENGTH])
            ).one_or_none()
        if row is None or not hmac.compare_digest(row.hash, hashed):
            self._trusted.pop(hashed, None)
            raise _unknown_key()
        self._trusted[hashed] = (time.monotonic() + TRUSTED_SECONDS, row.project_id)
        return str(row.project_id)


def _unauthenticated(detail: str, challenge: str) -> Refused:
    return Refused("unauthenticated", detail, headers={"WWW-Authenticate": challenge})


def _unknown_key() -> Refused:
    return _unauthenticated("This key is not known.", 'Bearer error="invalid_token"')


def check_link(secret_key: str, job_id: str) -> int:
    """For how many seconds the signed link of this request is still good. Refused if it is not.

    Nothing is read for it, so that whoever tries links learns nothing about jobs.
    """
    expires, signature = request.args.get("expires", ""), request.args.get("signature", "")
    if not _MOMENT.fullmatch(expires) or not is_ours(secret_key, job_id, int(expires), signature):
        raise Refused("link_invalid", "Use the link whole, as it was made; or ask with a key.", headers=_NO_REFERRER)
    left = seconds_left(int(expires))
    if left <= 0:
        detail = f"Have a new one made: POST /v1/jobs/{job_id}/image/link, with a key."
        raise Refused("link_expired", detail, headers=_NO_REFERRER)
    return left


def readable_image(job_id: str) -> ColumnElement[bool]:
    """The condition for this job, if the caller may read its image: by a link that was checked, or as his own."""
    return own_job(job_id) if g.get("link_seconds") is None else jobs.c.id == job_id


def own_job(job_id: str) -> ColumnElement[bool]:
    """The condition for this job, if it is the caller's. Refuses as not found what has not even the shape of an id."""
    if not is_id("job", job_id):
        raise not_found()
    return and_(jobs.c.id == job_id, jobs.c.project_id == g.project_id)


def install(app: Flask, known: Keys, secret_key: str) -> None:
    """Ask for a key on every route under /v1/, and on the vendor's own. A new route cannot forget it.

    In its place an image takes a signed link, which leaves no project to act for: with it, only that image is read.
    """

    @app.before_request
    def require_key() -> None:
        rule = "" if request.url_rule is None else request.url_rule.rule
        if rule == _LINKED and not {"expires", "signature"}.isdisjoint(request.args):
            g.link_seconds = check_link(secret_key, (request.view_args or {})["id"])
        elif rule.startswith(("/v1/", "/api/")):
            g.project_id = known.project_of(request.headers.get("Authorization"))
