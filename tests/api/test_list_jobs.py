"""GET /v1/jobs."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import update

from api.services import Services
from shared.tables import jobs
from tests.api.people import Caller, Submit, Worker, on_sqlite


def listed(api: Caller, **query: str) -> list[str]:
    response = api.get("/v1/jobs", query_string=query)
    assert response.status_code == 200, response.text
    return [job["id"] for job in response.json["data"]]


@on_sqlite
def test_an_empty_list_is_a_list(api: Caller) -> None:
    assert api.get("/v1/jobs").json == {"data": [], "has_more": False, "next_cursor": None}


def test_the_newest_job_comes_first_and_reads_as_alone(api: Caller, submit: Submit, worker: Worker) -> None:
    first, second = submit()["id"], submit()["id"]
    worker.succeed(worker.claim())
    data = api.get("/v1/jobs").json["data"]
    alone = [api.get(f"/v1/jobs/{id}").json for id in (second, first)]
    assert [job.pop("queue_position") for job in alone] == [1, None]
    assert [job.pop("queue_position") for job in data] == [None, None]  # not counted for lists
    assert data == alone
    assert [job["cost_usd"] for job in data] == ["0", "0.008"]


def test_pages_follow_each_other_while_jobs_keep_coming(api: Caller, submit: Submit) -> None:
    made = [submit()["id"] for _ in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = api.get("/v1/jobs", query_string=query).json
        seen += [job["id"] for job in page["data"]]
        assert page["has_more"] is (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        query["cursor"] = page["next_cursor"]
        submit()
    assert seen == made[::-1]


@on_sqlite
def test_a_last_page_that_is_full_has_no_next(api: Caller, submit: Submit) -> None:
    submit(), submit()
    assert api.get("/v1/jobs?limit=2").json["has_more"] is False


def test_filters_choose_by_what_a_job_shows(api: Caller, submit: Submit, worker: Worker) -> None:
    flux = submit(model="black-forest-labs/flux-1-schnell")["id"]
    worker.fail(worker.claim())
    named = submit(backend="dataoorts")["id"]
    assert listed(api, status="failed") == [flux] == listed(api, model="black-forest-labs/flux-1-schnell")
    assert listed(api, status="queued") == [named] == listed(api, backend="dataoorts")
    assert listed(api, backend="auto", status="queued") == [] == listed(api, model="unknown")


def test_metadata_is_matched_exactly_whatever_it_is(api: Caller, submit: Submit) -> None:
    strange = {'a.b"]\\': 'it\'s "x" \\ \n', "ü😀": "é", "[0]": "", "$": "1"}
    job, other = submit(metadata=strange)["id"], submit(metadata={"$": "2", "é": "ü😀"})["id"]
    for key, value in strange.items():
        assert listed(api, **{f"metadata[{key}]": value}) == [job], key
    assert listed(api, **{f"metadata[{key}]": value for key, value in strange.items()}) == [job]
    assert listed(api, **{"metadata[$]": "2"}) == [other]
    assert listed(api, **{"metadata[$]": "1", "metadata[é]": "ü😀"}) == []
    assert listed(api, **{"metadata[$]": ""}) == [] == listed(api, **{"metadata[none]": ""})


def test_times_are_compared_as_they_are_shown(api: Caller, submit: Submit, services: Services) -> None:
    job = submit()["id"]
    at = api.get(f"/v1/jobs/{job}").json["created_at"]
    assert listed(api, created_after=at) == [] == listed(api, created_before=at)
    assert listed(api, created_after="2020-01-01T00:00:00Z", created_before="9999-12-31T23:59:59.999999Z") == [job]
    assert listed(api, created_after="0001-01-01T00:00:00+23:59") == [job]
    assert listed(api, created_before="0001-01-01T00:00:00+23:59") == []
    assert listed(api, created_after="9999-12-31T23:59:59.9999-23:59") == []
    # Finer than is shown: .0005 lies after .000 and before .001.
    assert (
        listed(api, created_before=at.replace("Z", "5Z")) == [job]
        and listed(api, created_after=at.replace("Z", "5Z")) == []
    )
    with services.database.write() as tx:
        tx.execute(update(jobs).values(created_at=datetime(2026, 1, 31, 12, 0, 0, 7999, UTC)))
    assert (
        listed(api, created_after="2026-01-31T12:00:00.007Z")
        == []
        == listed(api, created_before="2026-01-31T12:00:00.007Z")
    )
    assert listed(api, created_after="2026-01-31T14:00:00.006+02:00") == [job]


def test_another_projects_jobs_are_not_listed(api: Caller, neighbour: Caller, submit: Submit) -> None:
    own = submit(metadata={"a": "b"})["id"]
    assert listed(api) == [own] and listed(neighbour) == [] == listed(neighbour, **{"metadata[a]": "b"})
    assert listed(neighbour, cursor="f" * 32) == [] == listed(neighbour, status="queued")


@on_sqlite
def test_wrong_parameters_are_refused_and_named(api: Caller) -> None:
    for query, name in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=", "limit"),
        ("limit=+5", "limit"),
        ("limit=5.0", "limit"),
        ("limit=1_0", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=1&limit=2", "limit"),
        ("status=done", "status"),
        ("status=", "status"),
        ("status=queued&status=failed", "status"),
        ("cursor=abc", "cursor"),
        ("cursor=job_" + "0" * 32, "cursor"),
        ("created_after=yesterday", "created_after"),
        ("created_after=1700000000", "created_after"),
        ("created_after=2026-01-01", "created_after"),
        ("created_after=2026-01-01T00:00:00", "created_after"),
        ("created_after=2026-02-30T00:00:00Z", "created_after"),
        ("created_before=2026-01-01T00:00:00+02:00", "created_before"),  # a + in a query is a blank
        ("model=%00", "model"),
        ("model=" + "x" * 101, "model"),
        ("metadata=x", "metadata"),
        ("metadata[]=x", "metadata[]"),
        ("metadata[a]=x&metadata[a]=y", "metadata[a]"),
        ("metadata[a]=%00", "metadata[a]"),
        ("metadata[" + "k" * 65 + "]=x", "metadata[" + "k" * 65 + "]"),
        ("sort=asc", "sort"),
        ("Limit=5", "Limit"),
    ]:
        response = api.get(f"/v1/jobs?{query}")
        assert response.status_code == 422, (query, response.text)
        assert [error["parameter"] for error in response.json["errors"]] == [name], (query, response.text)
