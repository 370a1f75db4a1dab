"""/v1/deliveries and /v1/jobs/{id}/deliveries."""

from functools import partial
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from api import auth
from api.services import Services
from shared import redelivery
from shared.tables import DeliveryStatus
from tests.api.people import KEY, Caller, Submit, client_with, on_sqlite
from tests.api.sending import GIVEN_UP, HOOK, REFUSED, TAKEN, UNREACHED, PostOffice, at_once
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here

NOBODY = "dlv_" + "0" * 32


@pytest.fixture
def post_office(services: Services) -> PostOffice:
    return PostOffice(services.database)


def register(api: Caller, **given: Any) -> str:
    answer = api.post("/v1/endpoints", json={"url": HOOK, "events": ["job.queued"]} | given)
    assert answer.status_code == 201, answer.text
    return str(answer.json["id"])


def listed(api: Caller, path: str = "/v1/deliveries", **query: str) -> list[dict[str, Any]]:
    answer = api.get(path, query_string=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json["data"])


def test_a_delivery_shows_what_goes_where(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    endpoint, job = register(api), submit()
    post_office.plan()
    [delivery] = listed(api)
    assert delivery["id"].startswith("dlv_") and delivery["event_id"].startswith("evt_")
    assert job["created_at"] <= delivery["next_try_at"] <= submit()["created_at"], "at once"
    made_up = {"id": "", "event_id": "", "created_at": "", "next_try_at": ""}
    assert delivery | made_up == made_up | {
        "object": "delivery",
        "type": "job.queued",
        "job_id": job["id"],
        "endpoint_id": endpoint,
        "url": HOOK,
        "status": "pending",
        "completed_at": None,
        "tries": [],
    }
    assert api.get(f"/v1/deliveries/{delivery['id']}").json == delivery
    assert listed(api, f"/v1/jobs/{job['id']}/deliveries") == [delivery]


def test_a_webhook_of_a_job_is_delivered_without_an_endpoint(
    api: Caller, post_office: PostOffice, submit: Submit
) -> None:
    job = submit(webhook={"url": HOOK + "/own", "events": ["job.queued", "job.canceled"]})
    submit()
    api.post(f"/v1/jobs/{job['id']}/cancel")
    assert post_office.send() == 2
    found = listed(api, f"/v1/jobs/{job['id']}/deliveries")
    assert found == listed(api)
    assert [(each["type"], each["url"], each["endpoint_id"]) for each in found] == [
        ("job.canceled", HOOK + "/own", None),
        ("job.queued", HOOK + "/own", None),
    ]


def test_every_try_is_shown_with_what_came_of_it(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    register(api)
    job = submit()
    post_office.plan()
    [claim] = post_office.claim()
    [sending] = listed(api)
    assert sending["status"] == "sending" and sending["next_try_at"] is None
    [one] = sending["tries"]
    assert (one["number"], one["outcome"], one["seconds"], one["status"]) == (1, "running", None, None)
    post_office.settle(claim, REFUSED)
    [failed] = listed(api)
    [one] = failed["tries"]
    assert failed["status"] == "pending" and failed["next_try_at"] > one["started_at"]
    assert one | {"started_at": ""} == {
        "number": 1,
        "started_at": "",
        "outcome": "failed",
        "seconds": 0.5,
        "status": 500,
        "error": None,
        "answer": "oh no",
    }
    post_office.make_due()
    assert post_office.send(UNREACHED) == 1
    post_office.make_due()
    assert post_office.send(TAKEN) == 1
    [delivered] = listed(api, f"/v1/jobs/{job['id']}/deliveries")
    assert delivered["status"] == "delivered" and delivered["next_try_at"] is None and delivered["completed_at"]
    assert [(each["number"], each["outcome"], each["status"]) for each in delivered["tries"]] == [
        (1, "failed", 500),
        (2, "failed", None),
        (3, "delivered", 204),
    ]
    assert delivered["tries"][1]["error"] == {"code": "timeout", "message": "No answer in 15 s."}


def test_filters_choose_by_what_a_delivery_shows(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    one, other = register(api), register(api, events=["job.canceled"])
    job = submit()
    api.post(f"/v1/jobs/{job['id']}/cancel")
    post_office.send(GIVEN_UP)
    submit()
    post_office.plan()

    def found(**query: str) -> list[tuple[str, str]]:
        return [(each["endpoint_id"], each["status"]) for each in listed(api, **query)]

    assert found() == [(one, "pending"), (other, "failed"), (one, "failed")]
    assert found(endpoint=one) == [(one, "pending"), (one, "failed")]
    assert found(status="failed") == [(other, "failed"), (one, "failed")]
    assert found(event_type="job.canceled") == [(other, "failed")]
    assert found(endpoint=one, status="failed", event_type="job.queued") == [(one, "failed")]
    assert found(endpoint=other, status="pending") == found(endpoint="end_" + "0" * 32) == []
    for status in DeliveryStatus:
        assert all(each[1] == status for each in found(status=status))


def test_pages_follow_each_other_while_deliveries_keep_coming(
    api: Caller, post_office: PostOffice, submit: Submit
) -> None:
    register(api)
    job = submit(webhook={"url": HOOK, "events": ["job.queued", "job.canceled"]})
    api.post(f"/v1/jobs/{job['id']}/cancel")
    submit(), submit()
    post_office.plan()
    for path in ("/v1/deliveries", f"/v1/jobs/{job['id']}/deliveries"):
        expected = [each["id"] for each in listed(api, path)]
        seen: list[str] = []
        query: dict[str, Any] = {"limit": 2}
        while True:
            page = api.get(path, query_string=query).json
            seen += [each["id"] for each in page["data"]]
            assert page["has_more"] is (page["next_cursor"] is not None)
            if not page["has_more"]:
                break
            query["cursor"] = page["next_cursor"]
            submit()
            post_office.plan()
        assert seen == expected and seen == sorted(seen, reverse=True)


@on_sqlite
def test_the_tries_of_a_page_are_read_at_once(
    api: Caller, post_office: PostOffice, submit: Submit, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "TRUSTED_SECONDS", 3600)  # the key is looked up once, however long this takes
    register(api)
    for _ in range(6):
        submit()
    post_office.send()
    listed(api)
    asked: list[str] = []
    event.listen(services.database.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    assert [len(each["tries"]) for each in listed(api)] == [1] * 6
    assert len(asked) == 2, asked


def test_one_that_has_ended_is_sent_again_with_its_event(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    register(api)
    submit()
    for number, result in enumerate((GIVEN_UP, TAKEN, TAKEN), 1):
        assert post_office.send(result) == 1
        [before] = listed(api)
        answer = api.post(f"/v1/deliveries/{before['id']}/redeliver")
        assert answer.status_code == 202 and answer.json["status"] == "pending" and answer.json["next_try_at"]
        assert answer.json["completed_at"] is None and len(answer.json["tries"]) == number
        assert answer.json["event_id"] == before["event_id"] and listed(api) == [answer.json]


def test_one_that_waits_for_its_next_try_is_sent_now(
    api: Caller, post_office: PostOffice, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redelivery, "MOST_AT_ONCE", 0)  # so much waits for the endpoint that this one was not reached
    endpoint = register(api)
    submit(webhook={"url": HOOK, "events": ["job.queued"]})
    assert post_office.send(REFUSED) == 2
    api.patch(f"/v1/endpoints/{endpoint}", json={"url": "https://other.example.com"})
    for before in listed(api):
        answer = api.post(f"/v1/deliveries/{before['id']}/redeliver")
        assert answer.status_code == 202 and answer.json["status"] == "pending"
        assert before["next_try_at"] > answer.json["next_try_at"]
        assert answer.json["url"] == ("https://other.example.com" if before["endpoint_id"] else HOOK)
    assert {claim.url for claim in post_office.claim()} == {HOOK, "https://other.example.com"}


def test_one_that_is_on_its_way_is_not_sent_twice(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    register(api)
    submit(webhook={"url": HOOK, "events": ["job.queued"]})
    post_office.plan()
    assert len(post_office.claim()) == 2
    for delivery in listed(api):
        answer = api.post(f"/v1/deliveries/{delivery['id']}/redeliver")
        assert answer.status_code == 409 and answer.json["code"] == "not_ended" and answer.json["retryable"]
    assert [each["status"] for each in listed(api)] == ["sending", "sending"]


def test_many_who_send_it_again_at_once_send_it_once(
    api: Caller, app: OpenAPI, post_office: PostOffice, submit: Submit
) -> None:
    register(api)
    submit(webhook={"url": HOOK, "events": ["job.queued"]})
    assert post_office.send(GIVEN_UP) == 2

    def post(path: str, _: int) -> Any:
        return client_with(app, KEY).post(path)

    for delivery in listed(api):
        path = f"/v1/deliveries/{delivery['id']}/redeliver"
        answers = at_once(4, partial(post, path))
        assert [answer.status_code for answer in answers] == [202] * 4
    assert post_office.send(TAKEN) == 2


def test_it_goes_to_the_url_that_its_endpoint_has_now(api: Caller, post_office: PostOffice, submit: Submit) -> None:
    endpoint = register(api)
    submit()
    post_office.send(GIVEN_UP)
    [before] = listed(api)
    api.patch(f"/v1/endpoints/{endpoint}", json={"url": "https://other.example.com"})
    assert listed(api) == [before]
    answer = api.post(f"/v1/deliveries/{before['id']}/redeliver")
    assert answer.json["url"] == "https://other.example.com"
    post_office.plan()
    [claim] = post_office.claim()
    assert claim.url == "https://other.example.com"


def test_what_a_disabled_or_removed_endpoint_missed_is_not_sent_again(
    api: Caller, post_office: PostOffice, submit: Submit
) -> None:
    endpoint = register(api)
    submit()
    post_office.send(GIVEN_UP)
    [delivery] = listed(api)
    path = f"/v1/deliveries/{delivery['id']}/redeliver"
    api.patch(f"/v1/endpoints/{endpoint}", json={"disabled": True})
    answer = api.post(path)
    assert answer.status_code == 409 and answer.json["code"] == "endpoint_disabled"
    api.patch(f"/v1/endpoints/{endpoint}", json={"disabled": False})
    assert api.post(path).status_code == 202
    api.delete(f"/v1/endpoints/{endpoint}")
    answer = api.post(path)
    assert answer.status_code == 409 and answer.json["code"] == "endpoint_disabled"
    assert api.get(f"/v1/deliveries/{delivery['id']}").json["status"] == "failed"


def test_no_project_sees_the_deliveries_of_another(
    api: Caller, neighbour: Caller, post_office: PostOffice, submit: Submit
) -> None:
    endpoint, job = register(api), submit()
    post_office.send(GIVEN_UP)
    [delivery] = listed(api)
    unknown = neighbour.get(f"/v1/deliveries/{NOBODY}").json
    for answer in (
        neighbour.get(f"/v1/deliveries/{delivery['id']}"),
        neighbour.post(f"/v1/deliveries/{delivery['id']}/redeliver"),
        neighbour.get(f"/v1/jobs/{job['id']}/deliveries"),
    ):
        assert answer.status_code == 404
        assert answer.json | {"request_id": ""} == unknown | {"request_id": ""}
    assert listed(neighbour) == listed(neighbour, endpoint=endpoint) == []
    assert listed(api) == [delivery]


@on_sqlite
def test_bad_requests_are_told_what_is_wrong(api: Caller, stranger: Caller, submit: Submit) -> None:
    job = f"/v1/jobs/{submit()['id']}/deliveries"
    for answer, status, place in (
        (api.get("/v1/deliveries?status=done"), 422, "status"),
        (api.get("/v1/deliveries?endpoint=x"), 422, "endpoint"),
        (api.get("/v1/deliveries?event_type=job.progress"), 422, "event_type"),
        (api.get("/v1/deliveries?limit=0"), 422, "limit"),
        (api.get("/v1/deliveries?limit=1&limit=2"), 422, "limit"),
        (api.get("/v1/deliveries?cursor=" + NOBODY), 422, "cursor"),
        (api.get("/v1/deliveries?job_id=x"), 422, "job_id"),
        (api.get(f"{job}?status=failed"), 422, "status"),
        (api.get(f"{job}?limit=101"), 422, "limit"),
        (api.get(f"/v1/deliveries/{NOBODY}?x=1"), 422, "x"),
        (api.post(f"/v1/deliveries/{NOBODY}/redeliver", json={"url": HOOK}), 422, "#"),
        (api.get("/v1/deliveries/42"), 404, None),
        (api.get("/v1/deliveries/dlv_%00"), 404, None),
        (api.get("/v1/deliveries/evt_" + "0" * 32), 404, None),
        (api.post(f"/v1/deliveries/{NOBODY}/redeliver"), 404, None),
        (api.get(f"/v1/jobs/job_{'0' * 32}/deliveries"), 404, None),
        (api.get("/v1/jobs/x/deliveries"), 404, None),
        (api.delete(f"/v1/deliveries/{NOBODY}"), 405, None),
        (api.get("/v1/deliveries", headers={"Accept": "text/html"}), 406, None),
        (stranger.get("/v1/deliveries"), 401, None),
        (stranger.get(f"/v1/deliveries/{NOBODY}"), 401, None),
    ):
        body: Any = answer.json
        assert answer.status_code == status == body["status"], answer.text
        places = [error.get("parameter") or error["pointer"] for error in body.get("errors", ())]
        assert places == ([] if place is None else [place]), answer.text


@on_sqlite
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None, derandomize=True
)
@given(
    query=st.dictionaries(
        st.sampled_from(["status", "endpoint", "event_type", "limit", "cursor", "other"]),
        st.text(max_size=12) | st.sampled_from(["failed", "job.failed", "5", "0" * 32, "end_" + "0" * 32]),
    ),
    path=st.sampled_from(["/v1/deliveries", f"/v1/jobs/job_{'0' * 32}/deliveries", f"/v1/deliveries/{NOBODY}"]),
)
def test_whatever_is_asked_is_answered_or_refused(api: Caller, query: dict[str, str], path: str) -> None:
    answer = api.get(path, query_string={name: value for name, value in query.items() if value.isprintable()})
    assert answer.status_code in (200, 404, 422), answer.text
