"""What deliveries are signed with: an endpoint's secret, or a project's for the URLs that its jobs name.

Secrets are `whsec_` and base64 of 32 random bytes, as Standard Webhooks has them. Signing needs them in full, so they
are kept encrypted (Fernet: AES-128-CBC and HMAC-SHA256) under a key that is derived from SECRET_KEY. While a secret is
replaced, the old one signs too, so that receivers can change over without losing a delivery.
"""

import base64
import secrets
from contextlib import suppress
from datetime import datetime

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import Connection, delete, func, insert, or_, select, update

from shared.database import now
from shared.tables import projects
from shared.tables import webhook_secrets as kept

#: How long the secret that was replaced goes on signing.
OVERLAP_SECONDS = 24 * 3600


class Unreadable(Exception):
    """A secret was sealed under another SECRET_KEY."""

    def __init__(self) -> None:
        super().__init__("a webhook secret can't be read: DARKROOM_SECRET_KEY is not the one it was sealed under")


class Vault:
    """Seals secrets for the database, and opens them."""

    def __init__(self, secret_key: str) -> None:
        key = HKDF(SHA256(), length=32, salt=None, info=b"darkroom webhook secrets").derive(secret_key.encode())
        self._fernet = Fernet(base64.urlsafe_b64encode(key))

    def seal(self, secret: str) -> str:
        return self._fernet.encrypt(secret.encode()).decode()

    def open(self, sealed: str) -> str:
        """Raises Unreadable."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise Unreadable from None


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def rotate(tx: Connection, vault: Vault, owner_id: str) -> str:
    """A new secret for an endpoint or a project. The one before signs for OVERLAP_SECONDS more; older ones end now.

    The caller holds the owner's row, so that two rotations follow each other.
    """
    its = kept.c.owner_id == owner_id
    number = tx.scalar(select(func.coalesce(func.max(kept.c.number), 0)).where(its)) or 0
    tx.execute(update(kept).where(its, kept.c.number == number).values(expires_at=now(OVERLAP_SECONDS)))
    tx.execute(delete(kept).where(its, kept.c.number < number))
    secret = new_secret()
    row = {"owner_id": owner_id, "number": number + 1, "sealed": vault.seal(secret)}
    tx.execute(insert(kept).values(**row, created_at=now()))
    return secret


def previous_expires_at(connection: Connection, owner_id: str) -> datetime | None:
    """When the secret that was replaced last stops signing. None: none was replaced."""
    replaced = (kept.c.owner_id == owner_id, kept.c.expires_at.is_not(None))
    return connection.scalar(select(kept.c.expires_at).where(*replaced).order_by(kept.c.number.desc()).limit(1))


def hold_project(tx: Connection, project_id: str) -> None:
    """Take the lock of a project's row: its first secret is made once, and its endpoints are counted one at a time."""
    tx.execute(select(projects.c.id).where(projects.c.id == project_id).with_for_update(key_share=True))


def of_project(tx: Connection, vault: Vault, project_id: str) -> str:
    """The secret that signs what goes to the URLs of a project's jobs. The first one is made when it is asked for.

    Raises Unreadable.
    """
    hold_project(tx, project_id)
    known = live(tx, vault, project_id)
    return known[0] if known else rotate(tx, vault, project_id)


def live(connection: Connection, vault: Vault, owner_id: str) -> list[str]:
    """The secrets that sign now, the newest first: one, or two while one is replaced. Raises Unreadable.

    One that was replaced and can't be read is left out: it may have been replaced for that.
    """
    unexpired = or_(kept.c.expires_at.is_(None), kept.c.expires_at > now())
    query = select(kept.c.sealed).where(kept.c.owner_id == owner_id, unexpired).order_by(kept.c.number.desc())
    newest, *replaced = connection.scalars(query).all() or [None]
    opened = [] if newest is None else [vault.open(newest)]
    for sealed in replaced:
        with suppress(Unreadable):
            opened.append(vault.open(sealed))
    return opened


def forget(tx: Connection, owner_id: str) -> None:
    tx.execute(delete(kept).where(kept.c.owner_id == owner_id))
