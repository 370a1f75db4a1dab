"""POST /v1/jobs/{id}/cancel."""

import pytest
from sqlalchemy import select

from api.services import Services
from shared import jobs as life
from shared.tables import Billed, Outcome, events
from tests.api.people import Caller, Submit, Worker, on_sqlite
from tests.lives import an_image


def event_types(services: Services, job_id: str) -> list[str]:
    with services.database.read() as connection:
        query = select(events.c.type).where(events.c.subject_id == job_id).order_by(events.c.sequence)
        return list(connection.scalars(query))


def test_a_queued_job_is_canceled_and_never_claimed(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    other = submit()
    response = api.post(job["urls"]["cancel"])
    canceled = response.json
    assert response.status_code == 200 and canceled["status"] == "canceled" and canceled["sequence"] == 2
    assert (
        canceled["completed_at"] and canceled["started_at"] is canceled["error"] is canceled["queue_position"] is None
    )
    assert canceled["cost_usd"] == "0" and canceled == api.get(job["urls"]["self"]).json
    assert worker.claim().job_id == other["id"]


def test_a_running_job_is_canceled_at_once_and_its_call_is_still_billed(
    api: Caller, submit: Submit, worker: Worker
) -> None:
    job = submit()
    claim = worker.claim()
    assert api.post(job["urls"]["cancel"]).json["status"] == "canceled"
    assert api.get(job["urls"]["self"]).json["cost_usd"] == "0"
    worker.close_attempt(claim, Outcome.canceled, Billed.yes)
    ended = api.get(job["urls"]["self"]).json
    assert ended["status"] == "canceled" and ended["cost_usd"] == "0.008" and ended["image"] is None
    [attempt] = api.get(f"{job['urls']['self']}/attempts").json["data"]
    assert (attempt["outcome"], attempt["billed"], attempt["billed_usd"]) == ("canceled", "yes", "0.008")


def test_the_worker_of_a_canceled_job_has_no_say_in_it_any_more(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    job = submit()
    claim = worker.claim()
    api.post(job["urls"]["cancel"])
    with services.database.write() as tx:
        assert life.renew(tx, [(claim.job_id, claim.fence)], 20) == set()
        assert not life.succeed(tx, claim, an_image(claim)) and not life.adopt(tx, an_image(claim))
        assert not life.release(tx, claim, reason="x")
    assert event_types(services, job["id"]) == ["job.queued", "job.started", "job.canceled"]


def test_cancelling_twice_changes_nothing(api: Caller, services: Services, submit: Submit) -> None:
    job = submit()
    first, second = (api.post(job["urls"]["cancel"]) for _ in range(2))
    assert first.status_code == second.status_code == 200 and first.json == second.json
    assert event_types(services, job["id"]) == ["job.queued", "job.canceled"]


@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_an_ended_job_is_returned_unchanged(api: Caller, submit: Submit, worker: Worker, end: str) -> None:
    job = submit()
    getattr(worker, end)(worker.claim())
    before = api.get(job["urls"]["self"]).json
    response = api.post(job["urls"]["cancel"])
    assert response.status_code == 200 and response.json == before


@on_sqlite
def test_the_image_of_a_canceled_job_is_none(api: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    response = api.get(job["urls"]["image"])
    assert response.status_code == 409 and response.json["code"] == "no_image"


@on_sqlite
def test_a_job_that_backs_off_can_be_canceled(api: Caller, services: Services, submit: Submit, worker: Worker) -> None:
    job = submit()
    claim = worker.claim()
    with services.database.write() as tx:
        life.requeue(tx, claim, reason="transient", after_seconds=3600, counts=True)
    waiting = api.get(job["urls"]["self"]).json
    assert waiting["status"] == "queued" and waiting["queue_position"] is None
    assert api.post(job["urls"]["cancel"]).json["status"] == "canceled"


@on_sqlite
def test_a_neighbour_cancels_nothing(api: Caller, neighbour: Caller, submit: Submit) -> None:
    job = submit()
    for path in (f"/v1/jobs/{job['id']}/cancel", f"/v1/jobs/job_{'0' * 32}/cancel", "/v1/jobs/x/cancel"):
        assert neighbour.post(path).status_code == 404
    assert api.get(job["urls"]["self"]).json["status"] == "queued"


@on_sqlite
def test_no_body_is_taken_but_an_empty_one(api: Caller, submit: Submit) -> None:
    job = submit()
    for body in (b'{"reason": "changed my mind"}', b"[]", b"null", b"x", b"\x00"):
        response = api.post(job["urls"]["cancel"], data=body)
        assert response.status_code == 422 and response.json["errors"][0]["pointer"] == "#", body
    assert api.get(job["urls"]["self"]).json["status"] == "queued"
    for empty in (b"", b" ", b"{}", b" { \n } "):
        assert api.post(job["urls"]["cancel"], data=empty).json["status"] == "canceled", empty
