"""What the tests of deliveries share: a receiver on loopback, and senders that may reach it."""

import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from typing import Any

import pytest
from sqlalchemy import insert

from shared.database import Database, now
from shared.tables import projects
from shared.webhook_secrets import Vault
from tests.receiver import Receiver
from worker.posting import Poster
from worker.sender import Sender

VAULT = Vault("s" * 32)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def poster() -> Iterator[Poster]:
    poster = Poster([ip_network("127.0.0.0/8")], connections=10)
    yield poster
    poster.close()


@pytest.fixture
def a_sender(database: Database, poster: Poster) -> Callable[..., Sender]:
    with database.write() as tx:
        for name in ("prj_a", "prj_b"):
            tx.execute(insert(projects).values(id=name, name=name, created_at=now()))

    def make(**changes: Any) -> Sender:
        given: dict[str, Any] = {
            "database": database,
            "poster": poster,
            "vault": VAULT,
            "worker": "w",
            "slots": 10,
            "base_url": "https://images.example",
            "secret_key": "k" * 32,
            "stopping": threading.Event(),
        }
        return Sender(**(given | changes))

    return make
