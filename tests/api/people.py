"""Who calls the API in these tests, and the worker whose deeds it shows."""

import hashlib
from typing import Any, Protocol

import pytest
from flask import Flask
from flask.testing import FlaskClient

from api.services import Services
from shared import jobs as life
from shared.catalogue import MODELS
from shared.database import Database
from shared.errors import JobErrorCode
from shared.image_store import Image
from shared.tables import Billed, Outcome

#: For tests that reach the database with nothing of their own: one of the two is enough.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

KEY = "dk_project0" + "p" * 32
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4


class Submit(Protocol):
    def __call__(self, **body: Any) -> dict[str, Any]: ...


class Caller(FlaskClient):
    """Flask's test client, whose answers mypy does not look into."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        return super().get(*args, **kwargs)

    def post(self, *args: Any, **kwargs: Any) -> Any:
        return super().post(*args, **kwargs)

    def patch(self, *args: Any, **kwargs: Any) -> Any:
        return super().patch(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        return super().delete(*args, **kwargs)


def client_with(app: Flask, key: str | None) -> Caller:
    """A client that sends this key, if any, with each request."""
    client = Caller(app, app.response_class, use_cookies=False)
    if key is not None:
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    return client


class Worker:
    """What a worker does to jobs, by the verbs that it uses."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._database: Database = services.database

    def claim(self, price: int = 8000, backend: str = "dataoorts") -> life.Claim:
        prices = dict.fromkeys(MODELS, price)
        terms = life.Terms(worker="w1", lease_seconds=20, attempt_seconds=300, prices=prices, max_crashes=3)
        with self._database.write() as tx:
            [claim] = life.claim(tx, backend, terms)
        return claim

    def close_attempt(self, claim: life.Claim, outcome: Outcome, billed: Billed, error: Any = None) -> None:
        with self._database.write() as tx:
            assert life.close_attempt(tx, claim.job_id, claim.attempt, outcome, billed, error)

    def succeed(self, claim: life.Claim, data: bytes = PICTURE, content_type: str = "image/png") -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        warnings = [{"code": "size_differs", "message": "512 x 512 was asked for."}]
        image = Image(claim.job_id, claim.attempt, content_type, 640, 480, len(data), sha256, warnings)
        self._services.images.put(image, data)
        with self._database.write() as tx:
            assert life.succeed(tx, claim, image)
            assert life.close_attempt(tx, claim.job_id, claim.attempt, Outcome.succeeded, Billed.yes)

    def fail(self, claim: life.Claim, code: JobErrorCode = JobErrorCode.rejected) -> None:
        error = {"code": code.value, "message": "The vendor refused it."}
        with self._database.write() as tx:
            assert life.fail(tx, claim, life.JobError(code, "The vendor refused it.", False, Billed.no))
            assert life.close_attempt(tx, claim.job_id, claim.attempt, Outcome.failed, Billed.no, error)

    def requeue(self, claim: life.Claim) -> None:
        with self._database.write() as tx:
            assert life.requeue(tx, claim, reason="transient", after_seconds=0, counts=True)
