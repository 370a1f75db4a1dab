"""Keys: who may ask."""

import hmac
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update

from api import auth
from api.app import build, create_app, open_services
from api.services import Services
from migrations import migrate
from shared.database import Database
from shared.settings import Settings
from shared.tables import jobs, keys, projects
from tests.api.people import KEY, Caller, Submit, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.servers import PostgresServer

OTHER = "dk_another0" + "o" * 32


def get(stranger: Caller, header: str | None) -> tuple[int, str | None]:
    response = stranger.get("/v1/models", headers={} if header is None else {"Authorization": header})
    if response.status_code != 200:
        assert response.json["code"] == "unauthenticated" and response.content_type == "application/problem+json"
    return response.status_code, response.headers.get("WWW-Authenticate")


def test_a_key_opens(stranger: Caller) -> None:
    assert get(stranger, f"Bearer {KEY}") == (200, None)
    assert get(stranger, f"bearer  {KEY} ") == (200, None)


@on_sqlite
def test_without_a_key_nothing_opens(stranger: Caller) -> None:
    for header in (None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY} x", f"Token {KEY}"):
        assert get(stranger, header) == (401, "Bearer"), header


@on_sqlite
def test_a_wrong_key_opens_nothing(stranger: Caller, services: Services) -> None:
    refused = (401, 'Bearer error="invalid_token"')
    stored = auth.hash_key(KEY, services.settings.secret_key)
    for key in (OTHER, KEY[:-1], KEY + "p", KEY[:11], KEY[:-1] + "q", KEY.upper(), stored, "dk_", "dk_\xff" + "x" * 40):
        assert get(stranger, f"Bearer {key}") == refused, key


@on_sqlite
def test_what_decides_of_a_key_takes_as_long_for_any_other(stranger: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmac, "compare_digest", lambda *_: True)
    assert get(stranger, f"Bearer {KEY[:-1]}q") == (200, None), "it was another comparison that refused it"


@on_sqlite
def test_every_route_of_v1_asks_for_a_key(stranger: Caller) -> None:
    paths = stranger.get("/openapi.json").json["paths"]
    asked = [(path, method) for path, item in paths.items() for method in item if path.startswith("/v1/")]
    assert len(asked) == 28
    for path, method in asked:
        or_a_link: list[dict[str, list[str]]] = [{"link": []}] if path.endswith("/image") else []
        assert paths[path][method]["security"] == [*or_a_link, {"key": []}]
        assert stranger.open(path.replace("{id}", "job_x"), method=method).status_code == 401, path


@on_sqlite
def test_a_stranger_learns_nothing_about_parameters_or_bodies(stranger: Caller) -> None:
    for answer in (stranger.get("/v1/jobs?a=1&a=2"), stranger.post("/v1/jobs", data=b"x" * 2_000_000)):
        assert answer.status_code == 401


@on_sqlite
def test_keys_are_stored_as_hashes(stranger: Caller, services: Services) -> None:
    with services.database.read() as connection:
        row = connection.execute(select(keys)).one()
    assert row.prefix == KEY[:11] and KEY not in repr(row) and len(row.hash) == 64 and row.bootstrap


def test_a_project_sees_its_own_jobs_alone(neighbour: Caller, submit: Submit, api: Caller) -> None:
    own = submit()["id"]
    theirs = neighbour.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).json["id"]
    assert [job["id"] for job in api.get("/v1/jobs").json["data"]] == [own]
    assert [job["id"] for job in neighbour.get("/v1/jobs").json["data"]] == [theirs]
    assert api.get(f"/v1/jobs/{theirs}").status_code == neighbour.get(f"/v1/jobs/{own}").status_code == 404


def test_a_new_bootstrap_key_replaces_the_old_one_and_keeps_its_project(
    services: Services, settings: Settings, submit: Submit
) -> None:
    job = submit()["id"]
    for changed, expected in ((OTHER, 200), (KEY[:11] + "x" * 32, 200), (None, 401)):
        services = open_services(settings.model_copy(update={"api_key": changed}))
        app = build(services)
        assert get(client_with(app, None), f"Bearer {changed}")[0] == expected
        assert get(client_with(app, None), f"Bearer {KEY}")[0] == 401
        if changed:
            assert client_with(app, changed).get(f"/v1/jobs/{job}").status_code == 200
        services.close()


@on_sqlite
def test_another_secret_key_needs_the_key_anew(services: Services, settings: Settings) -> None:
    other = open_services(settings.model_copy(update={"secret_key": "t" * 32}))
    assert get(client_with(build(other), None), f"Bearer {KEY}")[0] == 200
    other.close()


def test_several_processes_may_install_the_key_at_once(database: Database, settings: Settings) -> None:
    twins = [settings.model_copy(update={"api_key": key}) for key in (KEY, KEY, OTHER, KEY, OTHER, None, KEY)]
    failed: list[BaseException] = []

    def install(settings: Settings) -> None:
        try:
            own = Database(settings.database_url, connections=1)
            auth.install_bootstrap_key(own, settings)
            own.close()
        except BaseException as error:  # noqa: BLE001  a thread has nobody else to tell
            failed.append(error)

    threads = [threading.Thread(target=install, args=(twin,)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    auth.install_bootstrap_key(database, settings)
    with database.read() as connection:
        assert connection.scalars(select(projects.c.name)).all() == ["default"]
        assert connection.scalars(select(keys.c.prefix)).all() == [KEY[:11]]
    assert failed == []


@on_sqlite
def test_a_key_of_somebody_else_with_the_same_start_is_left_alone(database: Database, settings: Settings) -> None:
    auth.install_bootstrap_key(database, settings)
    with database.write() as tx:
        tx.execute(update(keys).values(bootstrap=False))
    auth.install_bootstrap_key(database, settings.model_copy(update={"api_key": KEY[:11] + "z" * 32}))
    with database.read() as connection:
        row = connection.execute(select(keys)).one()
    assert row.hash == auth.hash_key(KEY, settings.secret_key) and not row.bootstrap


def test_a_key_that_is_gone_stops_working_within_seconds(
    api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api.get("/v1/models").status_code == 200
    with services.database.write() as tx:
        tx.execute(delete(keys))
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + auth.TRUSTED_SECONDS)
    assert api.get("/v1/models").status_code == 401


@on_sqlite
def test_a_database_that_is_migrated_later_is_used_then(settings: Settings, tmp_path: Path) -> None:
    later = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/later.db"})
    api = client_with(create_app(later), KEY)
    assert api.get("/v1/jobs").status_code == 503 and api.get("/readyz").status_code == 503
    database = Database(later.database_url)
    migrate.upgrade(database)
    database.close()
    assert api.get("/v1/jobs").status_code == 200 and api.get("/readyz").status_code == 200


def test_postgresql_that_is_not_migrated_is_not_a_fault_of_ours(postgres: PostgresServer, redis_url: str) -> None:
    name = postgres.new_database()
    settings = Settings(database_url=postgres.url(name), redis_url=redis_url, api_key=KEY, secret_key="s" * 32)
    services = open_services(settings)
    response = client_with(build(services), KEY).get("/v1/jobs")
    assert response.status_code == 503 and response.json["detail"] == "The database is not migrated yet."
    services.close()
    postgres.drop(name)


@on_sqlite
def test_jobs_of_no_project_are_nobodys(api: Caller, services: Services, submit: Submit) -> None:
    job = submit()["id"]
    with services.database.write() as tx:
        tx.execute(update(jobs).values(project_id="prj_" + "0" * 32))
    assert api.get(f"/v1/jobs/{job}").status_code == 404 and api.get("/v1/jobs").json["data"] == []
