"""/v1/endpoints."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, insert, select, update

from api.services import Services
from shared import webhook_secrets
from shared.database import now
from shared.events import EventType
from shared.ids import new_id
from shared.receivers import lock as hold_receiver
from shared.tables import Disabled, endpoints, events, metadata, receivers
from shared.tables import deliveries as told
from shared.tables import webhook_secrets as secrets
from shared.webhook_secrets import Vault
from tests.api.people import KEY, Caller, Submit, Worker, client_with, on_sqlite
from tests.api.sending import GIVEN_UP, GONE, HOOK, REFUSED, TAKEN, PostOffice, at_once
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.service import eventually

ENDS = ["job.succeeded", "job.failed", "job.canceled", "job.expired"]
EPOCH = "1970-01-01T00:00:00Z"


@pytest.fixture
def post_office(services: Services) -> PostOffice:
    return PostOffice(services.database)


def register(api: Caller, **given: Any) -> dict[str, Any]:
    """A new endpoint, with its secret."""
    answer = api.post("/v1/endpoints", json={"url": HOOK} | given)
    assert answer.status_code == 201, answer.text
    return dict(answer.json)


def live(services: Services, endpoint_id: str) -> list[str]:
    with services.database.read() as connection:
        return webhook_secrets.live(connection, Vault(services.settings.secret_key), endpoint_id)


def types_told(api: Caller, **query: str) -> list[str]:
    return [delivery["type"] for delivery in api.get("/v1/deliveries", query_string=query).json["data"]]


def test_a_url_is_enough_and_the_rest_is_filled_in(api: Caller) -> None:
    answer = api.post("/v1/endpoints", json={"url": HOOK})
    endpoint = answer.json
    assert answer.status_code == 201 and answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Location"] == f"http://localhost/v1/endpoints/{endpoint['id']}"
    secret = endpoint.pop("secret")
    assert secret.startswith("whsec_") and len(secret) == 50
    assert endpoint | {"id": "", "created_at": ""} == {
        "id": "",
        "object": "endpoint",
        "url": HOOK,
        "description": "",
        "events": ENDS,
        "disabled": False,
        "disabled_reason": None,
        "disabled_at": None,
        "created_at": "",
    }
    assert api.get(answer.headers["Location"]).json == endpoint
    assert api.get("/v1/endpoints").json == {"data": [endpoint], "has_more": False, "next_cursor": None}


def test_what_is_given_is_kept_as_given(api: Caller) -> None:
    chosen = ["endpoint.disabled", "job.queued", "job.started"]
    endpoint = register(api, url="http://10.0.0.1:8080/x?y=z", events=chosen, description="für uns 猫")
    assert endpoint["events"] == chosen and endpoint["url"] == "http://10.0.0.1:8080/x?y=z"
    assert endpoint["description"] == "für uns 猫"


def test_every_event_but_a_test_can_be_chosen(api: Caller) -> None:
    every = [event.value for event in EventType if event != EventType.endpoint_test]
    assert register(api, events=every)["events"] == every


def test_endpoints_are_listed_newest_first_a_page_at_a_time(api: Caller) -> None:
    made = [register(api, description=str(number))["id"] for number in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = api.get("/v1/endpoints", query_string=query).json
        seen += [endpoint["id"] for endpoint in page["data"]]
        assert page["has_more"] is (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == made[::-1]


def test_a_secret_is_shown_once_and_is_nowhere_in_the_database_in_clear(api: Caller, services: Services) -> None:
    endpoint = register(api)
    project = api.get("/v1/webhook-secret").json["secret"]
    second = api.post(f"/v1/endpoints/{endpoint['id']}/rotate-secret").json["secret"]
    for path in (f"/v1/endpoints/{endpoint['id']}", "/v1/endpoints"):
        assert "whsec_" not in api.get(path).text
    with services.database.read() as connection:
        stored = "".join(repr(connection.execute(select(table)).all()) for table in metadata.tables.values())
    assert endpoint["id"] in stored and "whsec_" not in stored
    for secret in (endpoint["secret"], second, project):
        assert secret.removeprefix("whsec_").rstrip("=") not in stored
    assert live(services, endpoint["id"]) == [second, endpoint["secret"]]


def test_only_what_a_change_names_is_changed(api: Caller) -> None:
    endpoint = register(api, description="old", events=["job.queued"])
    del endpoint["secret"]
    path = f"/v1/endpoints/{endpoint['id']}"
    assert api.patch(path, json={}).json == endpoint
    for change in (
        {"url": HOOK + "/2"},
        {"description": ""},
        {"events": ["job.failed", "endpoint.disabled"]},
        {"disabled": False},
    ):
        endpoint |= change
        answer = api.patch(path, json=change)
        assert answer.status_code == 200 and answer.json == endpoint == api.get(path).json


def test_what_waits_goes_to_the_new_url(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    endpoint = register(api, events=["job.queued"])
    submit()
    post_office.send(REFUSED)
    [delivery] = api.get("/v1/deliveries").json["data"]
    assert (delivery["status"], delivery["url"]) == ("pending", HOOK)
    api.patch(f"/v1/endpoints/{endpoint['id']}", json={"url": "https://other.example.com"})
    [delivery] = api.get("/v1/deliveries").json["data"]
    assert (delivery["status"], delivery["url"]) == ("pending", "https://other.example.com")


def test_a_change_to_what_it_is_already_forgets_no_failures(
    api: Caller, post_office: PostOffice, submit: Submit, services: Services
) -> None:
    endpoint = register(api, events=["job.queued"])
    submit()
    post_office.send(REFUSED)
    failures = []
    for change in ({"url": HOOK, "disabled": False}, {"url": HOOK + "/2"}):
        assert api.patch(f"/v1/endpoints/{endpoint['id']}", json=change).status_code == 200
        with services.database.read() as connection:
            failures.append(connection.execute(select(receivers.c.failures)).scalar_one())
    assert failures == [1, 0]


def test_disabled_it_is_told_nothing_and_enabled_it_is_told_again(
    api: Caller, post_office: PostOffice, submit: Submit, services: Services
) -> None:
    endpoint = register(api, events=["job.queued"])
    witness = register(api, events=["endpoint.disabled"])
    path = f"/v1/endpoints/{endpoint['id']}"
    submit()
    post_office.plan()
    disabled = api.patch(path, json={"disabled": True}).json
    assert disabled["disabled"] and disabled["disabled_reason"] == "by_hand" and disabled["disabled_at"]
    assert [each["status"] for each in api.get("/v1/deliveries").json["data"]] == ["failed"]  # what waited for it
    submit()
    post_office.plan()
    assert types_told(api, endpoint=endpoint["id"]) == ["job.queued"]
    assert types_told(api, endpoint=witness["id"]) == ["endpoint.disabled"]
    assert api.patch(path, json={"disabled": True}).json == disabled  # once is enough, also for the others
    enabled = api.patch(path, json={"disabled": False}).json
    assert (enabled["disabled"], enabled["disabled_reason"], enabled["disabled_at"]) == (False, None, None)
    submit()
    post_office.plan()
    assert types_told(api, endpoint=endpoint["id"]) == ["job.queued", "job.queued"]
    assert types_told(api, endpoint=witness["id"]) == ["endpoint.disabled"]


def test_one_that_answered_410_says_so(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    endpoint = register(api, events=["job.queued"])
    submit()
    assert post_office.send(GONE) == 1
    shown = api.get(f"/v1/endpoints/{endpoint['id']}").json
    assert shown["disabled"] and shown["disabled_reason"] == Disabled.gone
    again = api.patch(f"/v1/endpoints/{endpoint['id']}", json={"disabled": True}).json
    assert again["disabled_reason"] == Disabled.gone  # why it was disabled first


def test_removed_it_is_gone_and_what_it_was_sent_stays(
    api: Caller, post_office: PostOffice, submit: Submit, services: Services
) -> None:
    endpoint = register(api, events=["job.queued"])
    submit(), submit()
    post_office.plan()
    post_office.settle(post_office.claim()[0], TAKEN)
    path = f"/v1/endpoints/{endpoint['id']}"
    answer = api.delete(path)
    assert answer.status_code == 204 and answer.data == b""
    for method in ("GET", "DELETE"):
        assert api.open(path, method=method).status_code == 404
    for deed in ("test", "rotate-secret"):
        assert api.post(f"{path}/{deed}").status_code == 404
    assert api.get("/v1/endpoints").json["data"] == []
    kept = api.get("/v1/deliveries", query_string={"endpoint": endpoint["id"]}).json["data"]
    assert len(kept) == 2 and "delivered" in {each["status"] for each in kept}
    with services.database.read() as connection:
        assert connection.execute(select(secrets)).all() == []
    submit()
    post_office.plan()
    assert len(api.get("/v1/deliveries").json["data"]) == 2


def test_a_test_is_an_event_for_this_endpoint_alone(api: Caller, post_office: PostOffice) -> None:
    endpoint, other = register(api), register(api)
    answer = api.post(f"/v1/endpoints/{endpoint['id']}/test")
    delivery = answer.json
    assert answer.status_code == 202 and delivery["type"] == "endpoint.test" and delivery["status"] == "pending"
    assert delivery["endpoint_id"] == endpoint["id"] and delivery["job_id"] is None and delivery["tries"] == []
    assert post_office.send() == 1
    assert api.get(f"/v1/deliveries/{delivery['id']}").json["status"] == "delivered"
    assert types_told(api, endpoint=other["id"]) == []


@on_sqlite
def test_a_disabled_endpoint_takes_nothing(api: Caller) -> None:
    path = f"/v1/endpoints/{register(api)['id']}"
    api.patch(path, json={"disabled": True})
    for answer in (api.post(f"{path}/test"), api.post(f"{path}/redeliver", json={"since": EPOCH})):
        assert answer.status_code == 409 and answer.json["code"] == "endpoint_disabled"
        assert "by_hand" in answer.json["detail"]
    assert api.get("/v1/deliveries").json["data"] == []


def test_a_rotation_leaves_two_live_secrets_and_the_next_one_ends_the_oldest(api: Caller, services: Services) -> None:
    endpoint = register(api)
    path = f"/v1/endpoints/{endpoint['id']}/rotate-secret"
    answer = api.post(path)
    second = answer.json
    assert answer.status_code == 200 and set(second) == {"secret", "previous_expires_at"}
    assert live(services, endpoint["id"]) == [second["secret"], endpoint["secret"]]
    third = api.post(path).json["secret"]
    assert live(services, endpoint["id"]) == [third, second["secret"]]
    with services.database.write() as tx:
        tx.execute(update(secrets).where(secrets.c.expires_at.is_not(None)).values(expires_at=now(-1)))
    assert live(services, endpoint["id"]) == [third]


def test_rotations_at_once_follow_each_other(api: Caller, app: OpenAPI, services: Services) -> None:
    endpoint = register(api)
    path = f"/v1/endpoints/{endpoint['id']}/rotate-secret"
    answers = at_once(8, lambda _: client_with(app, KEY).post(path))
    made = {answer.json["secret"] for answer in answers}
    assert {answer.status_code for answer in answers} == {200} and len(made) == 8
    assert len(live(services, endpoint["id"])) == 2 and set(live(services, endpoint["id"])) < made


def test_a_project_has_at_most_fifty_of_them_however_many_ask_at_once(app: OpenAPI, api: Caller) -> None:
    for _ in range(40):
        register(api)
    answers = at_once(20, lambda _: client_with(app, KEY).post("/v1/endpoints", json={"url": HOOK}))
    assert sorted(answer.status_code for answer in answers) == [201] * 10 + [409] * 10
    assert {answer.json["code"] for answer in answers if answer.status_code == 409} == {"too_many_endpoints"}
    page = api.get("/v1/endpoints?limit=100").json
    assert len(page["data"]) == 50
    assert api.delete(f"/v1/endpoints/{page['data'][0]['id']}").status_code == 204
    register(api)


def test_the_places_of_one_project_are_not_anothers(api: Caller, neighbour: Caller, services: Services) -> None:
    first = register(api)
    with services.database.write() as tx:
        row = tx.execute(select(endpoints)).one()._mapping
        tx.execute(insert(endpoints), [{**row, "id": new_id("end")} for _ in range(49)])
    assert api.post("/v1/endpoints", json={"url": HOOK}).status_code == 409
    assert register(neighbour)["id"] != first["id"]


def test_what_failed_is_sent_again(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    endpoint = register(api, events=["job.queued"])
    for _ in range(3):
        submit()
    assert post_office.send(GIVEN_UP) == 3
    submit()
    assert post_office.send(TAKEN) == 1
    submit()
    post_office.plan()  # still waiting
    before = api.get("/v1/deliveries").json["data"]
    api.patch(f"/v1/endpoints/{endpoint['id']}", json={"url": HOOK + "/2"})
    path = f"/v1/endpoints/{endpoint['id']}/redeliver"
    since = before[-1]["created_at"]
    answer = api.post(path, json={"since": since})
    assert answer.status_code == 202 and answer.json == {"redelivered": 3, "has_more": False}
    assert api.post(path, json={"since": since}).json == {"redelivered": 0, "has_more": False}
    after = api.get("/v1/deliveries").json["data"]
    assert [each["id"] for each in after] == [each["id"] for each in before]
    assert [each["event_id"] for each in after] == [each["event_id"] for each in before]
    assert [each["status"] for each in after] == ["pending", "delivered", "pending", "pending", "pending"]
    assert [each["url"] for each in after] == [HOOK + "/2", HOOK] + [HOOK + "/2"] * 3
    assert post_office.send(TAKEN) == 4
    assert {each["status"] for each in api.get("/v1/deliveries").json["data"]} == {"delivered"}
    again = api.get(f"/v1/deliveries/{after[-1]['id']}").json
    assert [each["outcome"] for each in again["tries"]] == ["failed", "delivered"]


def test_what_happened_while_it_was_disabled_is_sent_when_it_is_asked_for(
    api: Caller, post_office: PostOffice, submit: Submit, worker: Worker
) -> None:
    submit()  # before it was there
    post_office.plan()
    endpoint = register(api, events=["job.queued", "job.canceled"])
    path = f"/v1/endpoints/{endpoint['id']}"
    api.patch(path, json={"disabled": True})
    job = submit()
    worker.claim()  # the first job: what it did not ask for
    api.post(f"/v1/jobs/{job['id']}/cancel")
    post_office.plan()
    api.patch(path, json={"disabled": False})
    submit()
    post_office.plan()
    submit()  # not planned yet: it will be told of it anyway
    answer = api.post(f"{path}/redeliver", json={"since": EPOCH})
    assert answer.json == {"redelivered": 2, "has_more": False}
    assert types_told(api) == ["job.canceled", "job.queued", "job.queued"]
    post_office.plan()
    assert api.post(f"{path}/redeliver", json={"since": EPOCH}).json["redelivered"] == 0
    told_of = [each["event_id"] for each in api.get("/v1/deliveries").json["data"]]
    assert len(told_of) == len(set(told_of)) == 4


def who_wait(services: Services) -> int:
    """How many of this database's connections wait for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with services.database.read() as connection:
        return int(connection.exec_driver_sql(waiting).scalar_one())


def test_what_is_planned_while_it_is_enabled_is_not_lost(
    api: Caller, post_office: PostOffice, submit: Submit, services: Services
) -> None:
    if services.database.is_sqlite:
        return  # one writer at a time
    endpoint = register(api, events=["job.queued"])
    other = register(api, events=["job.queued"])
    path = f"/v1/endpoints/{endpoint['id']}"
    api.patch(path, json={"disabled": True})
    post_office.plan()
    submit()

    def enable() -> None:
        assert api.patch(path, json={"disabled": False}).status_code == 200
        assert api.post(f"{path}/redeliver", json={"since": EPOCH}).status_code == 202

    with ThreadPoolExecutor(2) as pool:
        with services.database.write() as tx:
            hold_receiver(tx, other["id"])  # the round waits for it, and has seen which endpoints listen
            planned = pool.submit(post_office.plan)
            eventually("the round waits", lambda: who_wait(services) == 1)
            enabled = pool.submit(enable)
            eventually("the change waits for the round", lambda: who_wait(services) == 2)
        planned.result()
        enabled.result()
    assert types_told(api, endpoint=endpoint["id"]) == ["job.queued"]


def test_only_what_happened_since_then_is_sent_again(
    api: Caller, post_office: PostOffice, submit: Submit, services: Services
) -> None:
    endpoint = register(api, events=["job.queued"])
    submit()
    post_office.send(GIVEN_UP)
    with services.database.write() as tx:
        tx.execute(update(endpoints).values(created_at=now(-3600)))
        tx.execute(update(told).values(created_at=now(-60)))
    path = f"/v1/endpoints/{endpoint['id']}/redeliver"
    later = api.get(f"/v1/jobs/{submit()['id']}").json["created_at"]
    assert api.post(path, json={"since": later}).json["redelivered"] == 0
    assert api.post(path, json={"since": "9999-12-31T23:59:59Z"}).json["redelivered"] == 0
    assert api.post(path, json={"since": EPOCH}).json["redelivered"] == 1


def test_a_thousand_are_sent_again_at_once_and_the_rest_when_asked_again(
    api: Caller, post_office: PostOffice, submit: Submit, services: Services
) -> None:
    endpoint = register(api, events=["job.queued"])
    submit()
    post_office.send(GIVEN_UP)
    with services.database.write() as tx:
        delivery, event = tx.execute(select(told)).one()._mapping, tx.execute(select(events)).one()._mapping
        numbers = range(2, 702)
        ids = {number: new_id("evt") for number in numbers}
        tx.execute(insert(events), [{**event, "id": ids[n], "sequence": n, "number": n} for n in numbers])
        failed = [{**delivery, "id": new_id("dlv"), "event_id": ids[n]} for n in numbers if n > 251]
        missed = [{**event, "id": new_id("evt"), "sequence": n, "number": n} for n in range(1000, 1500)]
        tx.execute(insert(told), failed)
        tx.execute(insert(events), missed)
    path = f"/v1/endpoints/{endpoint['id']}/redeliver"
    counts = [api.post(path, json={"since": EPOCH}).json for _ in range(3)]
    assert counts == [
        {"redelivered": 1000, "has_more": True},
        {"redelivered": 201, "has_more": False},
        {"redelivered": 0, "has_more": False},
    ]
    with services.database.read() as connection:
        assert connection.scalar(select(func.count()).where(told.c.status == "pending")) == 1201


def test_several_who_ask_at_once_send_nothing_twice(
    api: Caller, app: OpenAPI, post_office: PostOffice, submit: Submit, services: Services
) -> None:
    endpoint = register(api, events=["job.queued"])
    for _ in range(5):
        submit()
    post_office.send(GIVEN_UP)
    path = f"/v1/endpoints/{endpoint['id']}/redeliver"
    answers = at_once(6, lambda _: client_with(app, KEY).post(path, json={"since": EPOCH}))
    assert {answer.status_code for answer in answers} == {202}
    assert sorted(answer.json["redelivered"] for answer in answers) == [0, 0, 0, 0, 0, 5]


def test_deeds_of_all_kinds_at_once_neither_fail_nor_block_each_other(
    api: Caller, app: OpenAPI, post_office: PostOffice, submit: Submit
) -> None:
    endpoint = register(api, events=["job.queued"])
    path = f"/v1/endpoints/{endpoint['id']}"

    def act(index: int) -> list[int]:
        caller = client_with(app, KEY)
        deeds = (
            lambda: caller.post(f"{path}/test"),
            lambda: caller.patch(path, json={"disabled": index % 2 == 0, "url": f"{HOOK}/{index}"}),
            lambda: caller.post(f"{path}/rotate-secret"),
            lambda: caller.post(f"{path}/redeliver", json={"since": EPOCH}),
        )
        codes = [deeds[(index + step) % 4]().status_code for step in range(4)]
        caller.post("/v1/jobs", json={"input": {"prompt": "a cat"}})
        post_office.plan()
        for claim in post_office.claim():
            post_office.settle(claim, (TAKEN, REFUSED, GONE)[index % 3])
        return codes

    for _ in range(3):
        submit()
    found = at_once(12, act)
    assert not [each for each in found if isinstance(each, BaseException)]
    assert {code for codes in found for code in codes} <= {200, 202, 409}
    assert api.delete(path).status_code == 204


def test_no_project_sees_the_endpoints_of_another(api: Caller, neighbour: Caller, post_office: PostOffice) -> None:
    endpoint = register(api)
    path = f"/v1/endpoints/{endpoint['id']}"
    unknown = neighbour.get(f"/v1/endpoints/end_{'0' * 32}").json
    for answer in (
        neighbour.get(path),
        neighbour.patch(path, json={"url": "https://evil.example.com"}),
        neighbour.delete(path),
        neighbour.post(f"{path}/test"),
        neighbour.post(f"{path}/rotate-secret"),
        neighbour.post(f"{path}/redeliver", json={"since": EPOCH}),
    ):
        assert answer.status_code == 404
        assert answer.json | {"request_id": ""} == unknown | {"request_id": ""}
    assert neighbour.get("/v1/endpoints").json["data"] == []
    assert api.get(path).json | {"secret": endpoint["secret"]} == endpoint


def test_no_endpoint_is_told_of_another_projects_events(
    api: Caller, neighbour: Caller, post_office: PostOffice, submit: Submit
) -> None:
    register(api, events=["job.queued"])
    theirs = register(neighbour, events=["job.queued"])
    submit()
    post_office.plan()
    assert types_told(api) == ["job.queued"] and types_told(neighbour) == []
    answer = neighbour.post(f"/v1/endpoints/{theirs['id']}/redeliver", json={"since": EPOCH})
    assert answer.json["redelivered"] == 0


WRONG = [
    ("", {}, "#/url"),
    ("", {"url": None}, "#/url"),
    ("", {"url": 5}, "#/url"),
    ("", {"url": ""}, "#/url"),
    ("", {"url": "hooks.example.com"}, "#/url"),
    ("", {"url": "file:///etc/passwd"}, "#/url"),
    ("", {"url": "https://"}, "#/url"),
    ("", {"url": "https://example.com/" + "x" * 2048}, "#/url"),
    ("", {"url": "https://example.com/\0"}, "#/url"),
    ("", {"url": HOOK, "events": []}, "#/events"),
    ("", {"url": HOOK, "events": "job.failed"}, "#/events"),
    ("", {"url": HOOK, "events": None}, "#/events"),
    ("", {"url": HOOK, "events": ["job.failed", "job.failed"]}, "#/events"),
    ("", {"url": HOOK, "events": ["job.failed", "job.progress"]}, "#/events/1"),
    ("", {"url": HOOK, "events": ["endpoint.test"]}, "#/events/0"),
    ("", {"url": HOOK, "events": [None]}, "#/events/0"),
    ("", {"url": HOOK, "description": "x" * 201}, "#/description"),
    ("", {"url": HOOK, "description": None}, "#/description"),
    ("", {"url": HOOK, "description": "\0"}, "#/description"),
    ("", {"url": HOOK, "disabled": True}, "#/disabled"),
    ("", {"url": HOOK, "secret": "whsec_mine"}, "#/secret"),
    ("", [], "#"),
    ("PATCH", {"url": None}, "#/url"),
    ("PATCH", {"url": "ftp://example.com"}, "#/url"),
    ("PATCH", {"events": []}, "#/events"),
    ("PATCH", {"description": None}, "#/description"),
    ("PATCH", {"disabled": "yes"}, "#/disabled"),
    ("PATCH", {"disabled": None}, "#/disabled"),
    ("PATCH", {"disabled_reason": "gone"}, "#/disabled_reason"),
    ("PATCH", {"id": "end_x"}, "#/id"),
    ("redeliver", {}, "#/since"),
    ("redeliver", {"since": None}, "#/since"),
    ("redeliver", {"since": 0}, "#/since"),
    ("redeliver", {"since": "yesterday"}, "#/since"),
    ("redeliver", {"since": "2026-01-01T00:00:00"}, "#/since"),
    ("redeliver", {"since": "2026-02-30T00:00:00Z"}, "#/since"),
    ("redeliver", {"since": EPOCH, "until": EPOCH}, "#/until"),
    ("test", {"type": "job.failed"}, "#"),
    ("rotate-secret", {"secret": "whsec_mine"}, "#"),
]


@on_sqlite
def test_a_wrong_body_is_refused_the_field_named_and_nothing_changed(api: Caller) -> None:
    endpoint = register(api)
    path = f"/v1/endpoints/{endpoint['id']}"
    for where, body, pointer in WRONG:
        if where == "PATCH":
            answer = api.patch(path, json=body)
        else:
            answer = api.post(f"{path}/{where}" if where else "/v1/endpoints", json=body)
        assert answer.status_code == 422 and answer.json["code"] == "invalid", (where, body, answer.text)
        assert [error["pointer"] for error in answer.json["errors"]] == [pointer], (where, body, answer.text)
    assert api.get("/v1/endpoints").json["data"] == [{k: v for k, v in endpoint.items() if k != "secret"}]
    assert api.get("/v1/deliveries").json["data"] == []


@on_sqlite
def test_other_bad_requests_are_told_what_is_wrong(api: Caller) -> None:
    path = f"/v1/endpoints/{register(api)['id']}"
    json = {"Content-Type": "application/json"}
    for answer, status, code in (
        (api.post("/v1/endpoints", data=b"{", headers=json), 400, "malformed"),
        (api.patch(path, data=b"", headers=json), 400, "malformed"),
        (api.post("/v1/endpoints", data={"url": HOOK}), 415, "unsupported_media_type"),
        (api.post("/v1/endpoints", json={"url": HOOK}, headers={"Accept": "text/html"}), 406, "not_acceptable"),
        (api.post("/v1/endpoints", data=b" " * 1_000_001, headers=json), 413, "too_large"),
        (api.put(path, json={}), 405, "method_not_allowed"),
        (api.get(f"{path}/test"), 405, "method_not_allowed"),
        (api.get("/v1/endpoints?limit=101"), 422, "invalid"),
        (api.get("/v1/endpoints?cursor=end_x"), 422, "invalid"),
        (api.get("/v1/endpoints?url=x"), 422, "invalid"),
        (api.get(f"{path}?secret=1"), 422, "invalid"),
        (api.get("/v1/endpoints/42"), 404, "not_found"),
        (api.get("/v1/endpoints/job_" + "0" * 32), 404, "not_found"),
        (api.delete("/v1/endpoints/end_%00"), 404, "not_found"),
        (api.get("/v1/endpoints/"), 404, "not_found"),
    ):
        body: Any = answer.json
        assert answer.status_code == status and body["code"] == code, answer.text


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
_URL = st.one_of(
    _JSON,
    st.text(max_size=40).map("https://".__add__),
    st.from_regex(r"https?://[a-z0-9.\-:\[\]@%]{0,30}(/[!-~]*)?", fullmatch=True),
)
_EVENTS = st.lists(st.sampled_from([*EventType, "job.*", ""]).map(str), max_size=4) | _JSON


@on_sqlite
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None, derandomize=True
)
@given(body=st.fixed_dictionaries({}, optional={"url": _URL, "events": _EVENTS, "description": _JSON, "x": _JSON}))
def test_whatever_is_sent_is_taken_or_refused_where_it_is_wrong(api: Caller, body: dict[str, Any]) -> None:
    answer = api.post("/v1/endpoints", json=body)
    assert answer.status_code in (201, 422), (body, answer.text)
    if answer.status_code == 201:
        assert set(body) <= {"url", "events", "description"}
        assert answer.json["url"] == body["url"]
        assert api.delete(f"/v1/endpoints/{answer.json['id']}").status_code == 204
    else:
        assert all(error["pointer"].startswith("#") and error["detail"] for error in answer.json["errors"])
    changed = api.patch(f"/v1/endpoints/end_{'0' * 32}", json=body)
    assert changed.status_code in (404, 422), (body, changed.text)
