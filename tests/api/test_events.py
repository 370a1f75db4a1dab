"""GET /v1/jobs/{id}/events and GET /v1/events, as lists; and what a stream answers before it streams."""

import json
from typing import Any

import pytest

from api.services import Services
from shared.tables import events
from tests.api.people import Caller, Submit, Worker, on_sqlite
from tests.lives import plan
from worker.feed import Feed

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def feed(services: Services) -> Feed:
    return Feed(services.database)


def told(stream: str) -> list[dict[str, Any]]:
    """The messages of a stream: their fields by name, `data` read as JSON."""
    blocks = [block for block in stream.split("\n\n") if block and not block.startswith((":", "retry:"))]
    messages: list[dict[str, Any]] = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    return [message | {"data": json.loads(message["data"])} for message in messages]


def lived(submit: Submit, worker: Worker) -> dict[str, Any]:
    """A job that was tried, came back, was tried again and succeeded: five events."""
    job = submit(metadata={"ticket": "ABC-1"})
    worker.requeue(worker.claim())
    worker.succeed(worker.claim())
    return job


def test_the_events_of_a_job_tell_its_life_in_order(api: Caller, submit: Submit, worker: Worker, feed: Feed) -> None:
    job = lived(submit, worker)
    response = api.get(f"/v1/jobs/{job['id']}/events")
    assert response.status_code == 200 and response.headers["Vary"] == "Accept"
    assert response.headers["Cache-Control"] == "no-store"
    body = response.json
    assert (body["has_more"], body["next_cursor"]) == (False, "5")
    data = body["data"]
    assert [event["type"] for event in data] == [
        "job.queued",
        "job.started",
        "job.queued",
        "job.started",
        "job.succeeded",
    ]
    assert [event["sequence"] for event in data] == [event["data"]["sequence"] for event in data] == [1, 2, 3, 4, 5]
    assert [event["number"] for event in data] == [None] * 5
    assert [event["reason"] for event in data] == [None, None, "transient", None, None]
    statuses = ["queued", "running", "queued", "running", "succeeded"]
    assert [event["data"]["status"] for event in data] == statuses
    assert [event["data"]["attempts"] for event in data] == [0, 1, 1, 2, 2]
    assert all(event["object"] == "event" and event["id"].startswith("evt_") for event in data)
    assert all(event["data"]["metadata"] == {"ticket": "ABC-1"} for event in data)
    assert job["created_at"] <= data[0]["timestamp"] <= data[-1]["timestamp"]
    # The last one is the job as it is.
    assert data[-1]["data"] == api.get(f"/v1/jobs/{job['id']}").json
    assert [event["data"]["image"] is None for event in data] == [True] * 4 + [False]
    assert feed.round() == 5
    again = api.get(f"/v1/jobs/{job['id']}/events").json["data"]
    assert [event["number"] for event in again] == [1, 2, 3, 4, 5]


def test_pages_follow_each_other_without_gap_or_double(api: Caller, submit: Submit, worker: Worker, feed: Feed) -> None:
    job = lived(submit, worker)
    feed.round()
    for path, place in ((f"/v1/jobs/{job['id']}/events", "sequence"), ("/v1/events", "number")):
        whole = api.get(path).json["data"]
        for limit in (1, 2, 4, 5):
            seen: list[dict[str, Any]] = []
            body = {"has_more": True, "next_cursor": "0"}
            while body["has_more"]:
                body = api.get(f"{path}?after={body['next_cursor']}&limit={limit}").json
                assert 0 < len(body["data"]) <= limit
                assert body["next_cursor"] == str(body["data"][-1][place])
                seen += body["data"]
            assert seen == whole and len(whole) == 5
        # A poller goes on from there.
        assert api.get(f"{path}?after=5").json == {"data": [], "has_more": False, "next_cursor": None}


def test_the_feed_has_what_was_numbered_of_this_project_alone(
    api: Caller, neighbour: Caller, submit: Submit, worker: Worker, feed: Feed
) -> None:
    first, second = submit(), submit()
    assert api.get("/v1/events").json == {"data": [], "has_more": False, "next_cursor": None}
    other = neighbour.post("/v1/jobs", json={"input": {"prompt": "a dog"}}).json
    assert feed.round() == 3
    worker.succeed(worker.claim())
    body = api.get("/v1/events").json
    assert [(event["number"], event["data"]["id"]) for event in body["data"]] == [(1, first["id"]), (2, second["id"])]
    theirs = neighbour.get("/v1/events").json["data"]
    assert [(event["number"], event["data"]["id"]) for event in theirs] == [(1, other["id"])]
    assert feed.round() == 2 and feed.round() == 0
    later = api.get("/v1/events?after=2").json["data"]
    assert [(event["number"], event["type"]) for event in later] == [(3, "job.started"), (4, "job.succeeded")]
    # Told as it stood then, though the job has moved on since.
    assert [event["data"]["status"] for event in api.get("/v1/events").json["data"]] == [
        "queued",
        "queued",
        "running",
        "succeeded",
    ]


def test_what_was_removed_from_a_job_is_gone_from_its_events_too(
    api: Caller, submit: Submit, worker: Worker, feed: Feed
) -> None:
    job = lived(submit, worker)
    feed.round()
    assert api.delete(f"/v1/jobs/{job['id']}").status_code == 204
    for path in (f"/v1/jobs/{job['id']}/events", "/v1/events"):
        response = api.get(path)
        assert "a cat" not in response.text and "ABC-1" not in response.text
        assert all(event["data"]["data_removed"] for event in response.json["data"])
    assert "a cat" not in api.get(f"/v1/jobs/{job['id']}/events?after=0", headers=STREAM).text


@on_sqlite
@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("after=x", "after"),
        ("after=-1", "after"),
        ("after=", "after"),
        ("after=1.0", "after"),
        ("after=1e3", "after"),
        ("after=1&after=2", "after"),
        ("after=" + "9" * 19, "after"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("cursor=1", "cursor"),
        ("type=job.failed", "type"),
    ],
)
def test_wrong_parameters_are_refused_by_name(api: Caller, submit: Submit, query: str, parameter: str) -> None:
    for path in (f"/v1/jobs/{submit()['id']}/events", "/v1/events"):
        for accept in ({}, STREAM):
            response = api.get(f"{path}?{query}", headers=accept)
            assert response.status_code == 422 and response.content_type == "application/problem+json"
            assert [error["parameter"] for error in response.json["errors"]] == [parameter]


def test_the_largest_place_there_is_has_nothing_after_it(api: Caller, submit: Submit) -> None:
    for path in (f"/v1/jobs/{submit()['id']}/events", "/v1/events"):
        assert api.get(f"{path}?after={'9' * 18}").json == {"data": [], "has_more": False, "next_cursor": None}


def test_anothers_job_is_not_found_whatever_is_asked_of_it(
    api: Caller, neighbour: Caller, stranger: Caller, submit: Submit
) -> None:
    job = submit()
    for accept in ({}, STREAM):
        for path in (f"/v1/jobs/{job['id']}/events", "/v1/jobs/job_" + "0" * 32 + "/events", "/v1/jobs/x/events"):
            for query in ("", "?after=0", "?after=7"):
                response = neighbour.get(path + query, headers=accept)
                assert response.status_code == 404 and response.json["code"] == "not_found"
            assert stranger.get(path, headers=accept).status_code == 401
        assert stranger.get("/v1/events", headers=accept).status_code == 401


@on_sqlite
@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/json, text/event-stream", "application/json"),
        ("text/event-stream;q=0.5, application/json", "application/json"),
        ("text/html, */*;q=0.8", "application/json"),
        ("text/event-stream", "text/event-stream"),
        ("text/event-stream; charset=utf-8", "text/event-stream"),
        ("TEXT/EVENT-STREAM", "text/event-stream"),
        ("text/event-stream, */*", "text/event-stream"),
        ("text/event-stream, application/json;q=0.9", "text/event-stream"),
        ("text/*", "text/event-stream"),
        ("image/png", None),
        ("text/event-stream;q=0", None),
    ],
)
def test_the_form_is_the_one_that_is_more_welcome(
    api: Caller, submit: Submit, accept: str | None, kind: str | None
) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    response = api.get(f"/v1/jobs/{job['id']}/events", headers={} if accept is None else {"Accept": accept})
    if kind is None:
        assert response.status_code == 406 and response.json["code"] == "not_acceptable"
    else:
        assert (response.status_code, response.content_type) == (200, kind)


def test_a_job_that_has_ended_is_shown_and_the_stream_ends(api: Caller, submit: Submit, worker: Worker) -> None:
    job = lived(submit, worker)
    response = api.get(f"/v1/jobs/{job['id']}/events", headers=STREAM)
    assert response.status_code == 200 and response.content_type == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-store" and response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Vary"] == "Accept" and "ETag" not in response.headers
    assert response.text.startswith("retry: 2000\n\nid: 5\nevent: snapshot\ndata: {")
    [snapshot] = told(response.text)
    assert (snapshot["id"], snapshot["event"]) == ("5", "snapshot")
    assert list(snapshot["data"]) == ["type", "timestamp", "sequence", "data"]
    assert snapshot["data"]["sequence"] == 5 and snapshot["data"]["data"] == api.get(f"/v1/jobs/{job['id']}").json


def test_a_resume_gets_exactly_what_came_after_it(api: Caller, submit: Submit, worker: Worker) -> None:
    path = f"/v1/jobs/{lived(submit, worker)['id']}/events"
    whole = api.get(path).json["data"]
    for last in range(5):
        by_header = api.get(path, headers=STREAM | {"Last-Event-ID": str(last)})
        messages = told(by_header.text)
        assert [message["data"] for message in messages] == whole[last:]
        assert [message["id"] for message in messages] == [str(event["sequence"]) for event in whole[last:]]
        assert [message["event"] for message in messages] == [event["type"] for event in whole[last:]]
        assert api.get(f"{path}?after={last}", headers=STREAM).text == by_header.text
        # A client that comes back by itself sends the header to the URL that it began with.
        assert api.get(f"{path}?after=0", headers=STREAM | {"Last-Event-ID": str(last)}).text == by_header.text
    for over_the_end in ("5", "6", "999999999999999999"):
        over = api.get(path, headers=STREAM | {"Last-Event-ID": over_the_end})
        assert over.status_code == 204 and over.data == b""


def test_a_resume_after_what_has_not_happened_is_refused(api: Caller, submit: Submit) -> None:
    for path in (f"/v1/jobs/{submit()['id']}/events", "/v1/events"):
        for last in ("2", "999999999999999999", "9" * 19, "x", "-1", "1.5", "evt_1", "\N{SUPERSCRIPT TWO}"):
            response = api.get(path, headers=STREAM | {"Last-Event-ID": last})
            assert response.status_code == 422
            assert [error["parameter"] for error in response.json["errors"]] == ["Last-Event-ID"]
        response = api.get(f"{path}?after=2", headers=STREAM)
        assert response.status_code == 422 and response.json["errors"][0]["parameter"] == "after"


@on_sqlite
def test_a_stream_has_no_pages(api: Caller, submit: Submit) -> None:
    for path in (f"/v1/jobs/{submit()['id']}/events", "/v1/events"):
        response = api.get(f"{path}?limit=5", headers=STREAM)
        assert response.status_code == 422 and response.json["errors"][0]["parameter"] == "limit"


@on_sqlite
def test_the_head_of_a_stream_takes_no_place_and_has_no_body(api: Caller, submit: Submit, services: Services) -> None:
    free = services.waiting._free_streams._value
    for path in (f"/v1/jobs/{submit()['id']}/events", "/v1/events"):
        for headers in (STREAM, STREAM | {"Last-Event-ID": "0", "If-None-Match": "*"}, {}):
            response = api.open(path, method="HEAD", headers=headers)
            assert response.status_code == 200 and response.data == b""
            assert response.content_type == ("text/event-stream" if headers else "application/json")
        refused = api.open(f"{path}?after=99", method="HEAD", headers=STREAM)
        assert refused.status_code == 422
    assert services.waiting._free_streams._value == free


@on_sqlite
def test_no_place_is_lost_to_a_stream_that_was_refused_or_has_ended(
    api: Caller, neighbour: Caller, submit: Submit, services: Services
) -> None:
    free = services.waiting._free_streams._value
    job = submit()
    path = f"/v1/jobs/{job['id']}/events"
    neighbour.get(path, headers=STREAM, buffered=True)
    api.get(path, headers=STREAM | {"Last-Event-ID": "7"}, buffered=True)
    api.post(job["urls"]["cancel"])
    api.get(path, headers=STREAM, buffered=True)
    api.get(path, headers=STREAM | {"Last-Event-ID": "0"}, buffered=True)
    api.get(path, headers=STREAM | {"Last-Event-ID": "2"}, buffered=True)
    assert services.waiting._free_streams._value == free and not services.waiting._places


def test_pages_are_found_by_an_index(services: Services, submit: Submit) -> None:
    from api.events import _OF_JOB, _OF_PROJECT

    for query, index in ((_OF_JOB, "events"), (_OF_PROJECT, "ix_events_feed")):
        asked = query.params(job_id="job_a", project="prj_a", after=5, at_most=101)
        how = plan(services.database, asked)
        assert index in how and "SCAN events" not in how and "Sort" not in how and "B-TREE" not in how, how
    assert events.c.number.nullable
