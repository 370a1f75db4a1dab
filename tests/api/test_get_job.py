"""GET /v1/jobs/{id}."""

import re
from contextlib import closing

import pytest
from sqlalchemy import event
from sqlalchemy.dialects import postgresql

from api import auth
from api.forecast import Forecast
from api.job_object import _AHEAD
from api.services import Services
from shared.database import Database
from shared.ids import new_id
from shared.tables import Billed, Outcome
from tests.api.people import KEY, Caller, Submit, Worker, client_with, on_sqlite
from tests.lives import many

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def test_a_new_job_reads_as_it_was_answered(api: Caller, submit: Submit) -> None:
    job = submit(metadata={"ticket": "ABC-1"})
    response = api.get(f"/v1/jobs/{job['id']}")
    assert job["queue_position"] is None, "not counted at a submission"
    assert response.status_code == 200 and response.json == job | {"queue_position": 1}
    assert response.headers["ETag"] == 'W/"1"' and response.headers["Retry-After"] == "1"
    assert response.headers["Cache-Control"] == "no-store"
    assert job["attempts"] == 0 and job["cost_usd"] == "0" and job["warnings"] == []
    assert job["image"] is job["error"] is job["started_at"] is job["completed_at"] is None
    assert MOMENT.fullmatch(job["created_at"])


@on_sqlite
def test_what_is_not_built_yet_is_absent(submit: Submit) -> None:
    fields = "id object status sequence model backend routing sandbox input queue_position progress attempts cost_usd"
    fields += (
        " image error warnings metadata retried_from created_at started_at completed_at deadline_at data_removed urls"
    )
    job = submit()
    assert list(job) == fields.split() and list(job["urls"]) == ["self", "image", "cancel"]


def test_a_running_job_costs_nothing_yet(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    worker.claim()
    response = api.get(f"/v1/jobs/{job['id']}")
    assert response.json["status"] == "running" and response.json["sequence"] == 2 and response.json["attempts"] == 1
    assert response.json["cost_usd"] == "0" and MOMENT.fullmatch(response.json["started_at"])
    assert response.headers["Retry-After"] == "1"


def test_a_succeeded_job_shows_its_image(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    worker.succeed(worker.claim())
    response = api.get(f"/v1/jobs/{job['id']}")
    ended = response.json
    assert ended["status"] == "succeeded" and ended["cost_usd"] == "0.008" and "Retry-After" not in response.headers
    assert ended["image"].pop("sha256") and ended["image"] == {
        "url": job["urls"]["image"],
        "content_type": "image/png",
        "width": 640,
        "height": 480,
        "bytes": 1032,
    }
    assert ended["warnings"] == [{"code": "size_differs", "message": "512 x 512 was asked for."}]
    assert MOMENT.fullmatch(ended["completed_at"]) and ended["error"] is None


def test_a_failed_job_says_why(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    worker.fail(worker.claim())
    ended = api.get(f"/v1/jobs/{job['id']}").json
    assert ended["status"] == "failed" and ended["image"] is None and ended["cost_usd"] == "0"
    assert ended["error"] == {
        "code": "rejected",
        "message": "The vendor refused it.",
        "retryable": False,
        "billed": "no",
    }


def test_the_cost_counts_what_is_unknown_and_not_what_was_free(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    for price, billed in ((8000, Billed.unknown), (1100, Billed.no), (500, Billed.yes)):
        claim = worker.claim(price)
        worker.requeue(claim)
        worker.close_attempt(claim, Outcome.failed, billed)
    worker.claim(1_000_000)
    assert api.get(f"/v1/jobs/{job['id']}").json["cost_usd"] == "0.0085"


def test_an_unchanged_job_is_not_sent_again(api: Caller, submit: Submit, worker: Worker) -> None:
    url = submit()["urls"]["self"]
    response = api.get(url, headers={"If-None-Match": 'W/"1"'})
    assert response.status_code == 304 and response.data == b""
    assert response.headers["ETag"] == 'W/"1"' and response.headers["Retry-After"] == "1"
    worker.claim()
    response = api.get(url, headers={"If-None-Match": 'W/"1"'})
    assert response.status_code == 200 and response.headers["ETag"] == 'W/"2"'
    assert api.get(url, headers={"If-None-Match": '"9", W/"2"'}).status_code == 304


def test_nobody_learns_which_ids_exist(api: Caller, neighbour: Caller, submit: Submit) -> None:
    own = submit()["id"]
    named = {"X-Request-Id": "r1"}
    for rest in ("", "/image", "/attempts"):
        ids = (own, new_id("job"), new_id("evt"), "nonsense", own.upper(), own + "0", "job_%00", "%F0%28", "' OR 1=1")
        answers = {
            (response.status_code, response.data, tuple(response.headers))
            for response in [neighbour.get(f"/v1/jobs/{id}{rest}", headers=named) for id in ids]
        }
        assert len(answers) == 1 and next(iter(answers))[0] == 404
    assert api.get(f"/v1/jobs/{own}").status_code == 200


def test_a_poll_is_one_statement_and_one_more_for_the_place_in_the_queue_or_the_bill(
    api: Caller, submit: Submit, worker: Worker, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is looked up once in a few seconds is looked up by the submission, however long this takes.
    monkeypatch.setattr(auth, "TRUSTED_SECONDS", 3600)
    monkeypatch.setattr(Forecast, "LOOK_UP_SECONDS", 3600.0)
    url = submit()["urls"]["self"]
    statements: list[str] = []
    event.listen(services.database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))

    def a_poll() -> int:
        statements.clear()
        api.get(url)
        return len(statements)

    assert a_poll() == 2
    claim = worker.claim()
    assert a_poll() == 1
    worker.succeed(claim)
    assert a_poll() == 2  # whether its bill is settled: what has ended is seldom asked for again


@on_sqlite
def test_head_answers_without_a_body(api: Caller, submit: Submit) -> None:
    response = api.head(submit()["urls"]["self"])
    assert response.status_code == 200 and response.data == b"" and response.headers["ETag"] == 'W/"1"'


@on_sqlite
def test_addresses_start_with_the_public_url(services: Services) -> None:
    from dataclasses import replace

    from api.app import build

    settings = services.settings.model_copy(update={"public_url": "https://images.example.com/darkroom/"})
    api = client_with(build(replace(services, settings=settings)), KEY)
    response = api.post("/v1/jobs", json={"input": {"prompt": "a cat"}}, headers={"Host": "evil.example"})
    url = f"https://images.example.com/darkroom/v1/jobs/{response.json['id']}"
    assert response.json["urls"] == {"self": url, "image": f"{url}/image", "cancel": f"{url}/cancel"}
    assert response.headers["Location"] == url


@on_sqlite
@pytest.mark.parametrize("host", ["a b", "x" * 300, "", "[::1", "é", "a\x00b"])
def test_a_strange_host_is_no_fault_of_ours(api: Caller, submit: Submit, host: str) -> None:
    path = f"/v1/jobs/{submit()['id']}"
    assert api.get(path, headers={"Host": host}).status_code in (200, 400)


def test_its_place_is_counted_by_the_queues_index_whatever_the_plan_knows(postgresql_url: str) -> None:
    """A plan that is kept for all values expects a thousand rows soon, and would walk the table when there are none."""
    with closing(Database(postgresql_url)) as database:
        many(database, 20_000)
        its = {"of_backend": "dataoorts", "its_rank": 1, "its_id": "job_a"}
        dialect = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
        statement = _AHEAD.params(its).compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        with database.read() as connection:
            lines = connection.exec_driver_sql(f"EXPLAIN (GENERIC_PLAN) {statement}").scalars().all()
    plan = "\n".join(lines)
    assert "ix_jobs_claim" in plan and "Seq Scan" not in plan, plan


def test_a_bill_that_is_settled_late_is_no_304(api: Caller, submit: Submit, worker: Worker) -> None:
    url = submit()["urls"]["self"]
    claim = worker.claim()
    assert api.get(url).headers["ETag"] == 'W/"2"'  # what runs is not settled late
    api.post(f"{url}/cancel")
    known = api.get(url)
    assert known.json["cost_usd"] == "0" and known.headers["ETag"] == 'W/"3-0"'
    for outcome, billed, cost, etag in (
        (Outcome.unknown, Billed.unknown, "0.008", 'W/"3-8000"'),
        (Outcome.canceled, Billed.no, "0", 'W/"3"'),
    ):
        assert api.get(url, headers={"If-None-Match": known.headers["ETag"]}).status_code == 304
        worker.close_attempt(claim, outcome, billed)
        known = api.get(url, headers={"If-None-Match": known.headers["ETag"]})
        assert known.status_code == 200 and known.json["cost_usd"] == cost and known.headers["ETag"] == etag
    assert api.delete(url).status_code == 204 and api.get(url).headers["ETag"] == 'W/"3-removed"'


@on_sqlite
def test_a_job_that_was_tried_in_vain_and_billed_for_it_has_its_plain_etag(
    api: Caller, submit: Submit, worker: Worker
) -> None:
    url = submit()["urls"]["self"]
    first = worker.claim()
    worker.requeue(first)
    assert api.get(url).headers["ETag"] == 'W/"3-0"'  # its worker has not said yet what the call cost
    worker.close_attempt(first, Outcome.failed, Billed.yes)
    assert api.get(url).headers["ETag"] == 'W/"3"'
    worker.succeed(worker.claim())
    answer = api.get(url)
    assert answer.headers["ETag"] == 'W/"5"' and answer.json["cost_usd"] == "0.016"
