"""/v1/webhook-secret."""

from typing import Any

from flask_openapi3.openapi import OpenAPI
from sqlalchemy import select, update

from api.services import Services
from shared import webhook_secrets
from shared.database import now
from shared.tables import metadata, projects
from shared.tables import webhook_secrets as secrets
from shared.webhook_secrets import Vault
from tests.api.people import KEY, Caller, client_with, on_sqlite
from tests.api.sending import at_once
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here

PATH = "/v1/webhook-secret"


def live(services: Services) -> list[str]:
    """Those of the default project, which sign its jobs' webhooks."""
    vault = Vault(services.settings.secret_key)
    with services.database.read() as connection:
        [project] = connection.scalars(select(projects.c.id).where(projects.c.name == "default"))
        return webhook_secrets.live(connection, vault, project)


def test_it_is_made_when_it_is_first_asked_for_and_stays(api: Caller, services: Services) -> None:
    assert live(services) == []
    answer = api.get(PATH)
    assert answer.status_code == 200 and set(answer.json) == {"secret"}
    assert answer.headers["Cache-Control"] == "no-store"
    secret = answer.json["secret"]
    assert secret.startswith("whsec_") and len(secret) == 50
    assert api.get(PATH).json["secret"] == secret and live(services) == [secret]


def test_those_who_ask_first_at_once_get_the_same(app: OpenAPI, services: Services) -> None:
    answers = at_once(12, lambda _: client_with(app, KEY).get(PATH))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json["secret"] for answer in answers} == set(live(services))
    with services.database.read() as connection:
        assert len(connection.execute(select(secrets)).all()) == 1


def test_the_secret_that_a_sender_makes_is_the_one_that_is_shown(api: Caller, services: Services) -> None:
    with services.database.write() as tx:
        project = tx.scalar(select(projects.c.id)) or ""
        made = webhook_secrets.of_project(tx, Vault(services.settings.secret_key), project)
    assert api.get(PATH).json["secret"] == made


def test_it_is_not_in_the_database_in_clear(api: Caller, services: Services) -> None:
    secret = api.get(PATH).json["secret"]
    with services.database.read() as connection:
        stored = "".join(repr(connection.execute(select(table)).all()) for table in metadata.tables.values())
        sealed = connection.scalars(select(secrets.c.sealed)).one()
    assert sealed in stored and secret.removeprefix("whsec_").rstrip("=") not in stored and "whsec_" not in stored


def test_a_rotation_leaves_two_live_secrets_and_the_next_one_ends_the_oldest(api: Caller, services: Services) -> None:
    first = api.get(PATH).json["secret"]
    answer = api.post(f"{PATH}/rotate")
    second = answer.json["secret"]
    assert answer.status_code == 200 and answer.json["previous_expires_at"] is not None
    assert api.get(PATH).json["secret"] == second and live(services) == [second, first]
    third = api.post(f"{PATH}/rotate").json["secret"]
    assert live(services) == [third, second]
    with services.database.write() as tx:
        tx.execute(update(secrets).where(secrets.c.expires_at.is_not(None)).values(expires_at=now(-1)))
    assert live(services) == [third]


def test_a_first_rotation_replaces_nothing(api: Caller, services: Services) -> None:
    answer = api.post(f"{PATH}/rotate").json
    assert answer["previous_expires_at"] is None and live(services) == [answer["secret"]]


def test_rotations_at_once_follow_each_other(api: Caller, app: OpenAPI, services: Services) -> None:
    api.get(PATH)
    answers = at_once(8, lambda _: client_with(app, KEY).post(f"{PATH}/rotate"))
    made = {answer.json["secret"] for answer in answers}
    assert len(made) == 8 and len(live(services)) == 2 and set(live(services)) < made


def test_each_project_has_its_own(api: Caller, neighbour: Caller, services: Services) -> None:
    ours, theirs = api.get(PATH).json["secret"], neighbour.get(PATH).json["secret"]
    assert ours != theirs
    neighbour.post(f"{PATH}/rotate")
    assert api.get(PATH).json["secret"] == ours and live(services) == [ours]


@on_sqlite
def test_bad_requests_are_told_what_is_wrong(api: Caller, stranger: Caller) -> None:
    for answer, status, code in (
        (stranger.get(PATH), 401, "unauthenticated"),
        (stranger.post(f"{PATH}/rotate"), 401, "unauthenticated"),
        (api.get(f"{PATH}?previous=1"), 422, "invalid"),
        (api.post(f"{PATH}/rotate", json={"secret": "whsec_mine"}), 422, "invalid"),
        (api.post(PATH), 405, "method_not_allowed"),
        (api.get(f"{PATH}/rotate"), 405, "method_not_allowed"),
        (api.get(PATH, headers={"Accept": "text/plain"}), 406, "not_acceptable"),
    ):
        body: Any = answer.json
        assert answer.status_code == status and body["code"] == code, answer.text


def test_one_sealed_under_another_key_is_said_to_be_unreadable_until_it_is_replaced(
    api: Caller, services: Services
) -> None:
    with services.database.write() as tx:
        project = tx.scalar(select(projects.c.id)) or ""
        webhook_secrets.rotate(tx, Vault("another key that was lost meanwhile"), project)
    answer = api.get(PATH)
    assert answer.status_code == 409 and answer.json["code"] == "unreadable_secret"
    made = api.post(f"{PATH}/rotate").json["secret"]
    assert api.get(PATH).json["secret"] == made and live(services) == [made]  # at once, not when the old one expires
