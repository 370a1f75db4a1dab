"""The API under test: wired as in production, on a migrated database and a real Redis, with a worker at hand."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from sqlalchemy import insert

from api.app import build, open_services
from api.auth import PREFIX_LENGTH, hash_key
from api.services import Services
from shared.database import now
from shared.ids import new_id
from shared.inspector import Inspector
from shared.settings import Settings
from shared.tables import keys, projects
from tests.api.people import KEY, Caller, Submit, Worker, client_with

NEIGHBOURS_KEY = "dk_neighbour" + "n" * 32


@pytest.fixture
def backends() -> tuple[str, ...]:
    return ("dataoorts",)


@pytest.fixture
def settings(database_url: str, redis_url: str, backends: tuple[str, ...]) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, api_key=KEY, secret_key="s" * 32, backends=backends)


@pytest.fixture(scope="session")
def inspector() -> Iterator[Inspector]:
    """One for the whole run: its children take a moment to start."""
    inspector = Inspector(seconds=60, wait_seconds=60)  # a child may stand still for seconds, on a busy machine
    yield inspector
    inspector.close()


@pytest.fixture
def services(settings: Settings, inspector: Inspector) -> Iterator[Services]:
    services = open_services(settings)
    yield replace(services, inspector=inspector)
    services.close()


@pytest.fixture
def app(services: Services) -> OpenAPI:
    return build(services)


@pytest.fixture
def api(app: OpenAPI) -> Caller:
    """A client with the project's key."""
    return client_with(app, KEY)


@pytest.fixture
def stranger(app: OpenAPI) -> Caller:
    """A client without a key."""
    return client_with(app, None)


@pytest.fixture
def neighbour(app: OpenAPI, services: Services) -> Caller:
    """A client with the key of another project."""
    project = new_id("prj")
    with services.database.write() as tx:
        tx.execute(insert(projects).values(id=project, name="neighbour", created_at=now()))
        tx.execute(
            insert(keys).values(
                prefix=NEIGHBOURS_KEY[:PREFIX_LENGTH],
                project_id=project,
                hash=hash_key(NEIGHBOURS_KEY, services.settings.secret_key),
                bootstrap=False,
                created_at=now(),
            )
        )
    return client_with(app, NEIGHBOURS_KEY)


@pytest.fixture
def submit(api: Caller) -> Submit:
    """Submit a job, with whatever differs from the shortest body that is valid; returns the answered job."""

    def submit(**body: Any) -> dict[str, Any]:
        response = api.post("/v1/jobs", json={"input": {"prompt": "a cat"}} | body)
        assert response.status_code == 202, response.text
        return dict(response.json)

    return submit


@pytest.fixture
def worker(services: Services) -> Worker:
    return Worker(services)
