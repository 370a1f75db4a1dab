"""DELETE /v1/jobs/{id}."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from api.services import Services
from shared import jobs as life
from shared.tables import jobs
from tests.api.people import PICTURE, Caller, Submit, Worker, on_sqlite
from tests.api.sending import HOOK, TAKEN, PostOffice
from tests.lives import an_image, job_row

SECRET = "a secret plan"


def test_image_prompt_and_metadata_go_and_the_row_and_its_bill_stay(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    job = submit(input={"prompt": SECRET}, metadata={"ticket": SECRET})
    worker.succeed(worker.claim())
    before = api.get(job["urls"]["self"])
    response = api.delete(job["urls"]["self"])
    assert response.status_code == 204 and response.data == b"" and response.headers["X-Request-Id"]
    assert "Content-Type" not in response.headers
    after = api.get(job["urls"]["self"])
    gone: dict[str, Any] = {"input": {}, "metadata": {}, "image": None, "warnings": [], "data_removed": True}
    assert after.json == before.json | gone
    assert after.json["status"] == "succeeded" and after.json["cost_usd"] == "0.008"
    assert after.headers["ETag"] != before.headers["ETag"]
    image = api.get(job["urls"]["image"])
    assert image.status_code == 410 and image.json["code"] == "removed"
    assert services.images.of_job(job["id"]) == [] and SECRET not in repr(job_row(services.database, job["id"]))
    assert SECRET not in api.get("/v1/jobs").text


def test_what_the_receivers_of_its_webhooks_repeated_goes_too(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    job = submit(input={"prompt": SECRET}, webhook={"url": HOOK, "events": ["job.queued"]})
    PostOffice(services.database).send(replace(TAKEN, answer=f"thanks for {SECRET}"))
    worker.succeed(worker.claim())
    shown = api.get(f"{job['urls']['self']}/deliveries")
    assert SECRET in shown.text
    api.delete(job["urls"]["self"])
    after = api.get(f"{job['urls']['self']}/deliveries")
    assert SECRET not in after.text and SECRET not in api.get("/v1/deliveries").text
    assert after.json["data"][0]["tries"] == [shown.json["data"][0]["tries"][0] | {"answer": None}]


@on_sqlite
def test_who_knew_the_job_before_is_told_that_it_changed(api: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    known = {"If-None-Match": api.get(job["urls"]["self"]).headers["ETag"]}
    api.delete(job["urls"]["self"])
    response = api.get(job["urls"]["self"], headers=known)
    assert response.status_code == 200 and response.json["data_removed"] is True
    known = {"If-None-Match": response.headers["ETag"]}
    assert api.get(job["urls"]["self"], headers=known).status_code == 304


def test_removing_twice_is_fine(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    worker.fail(worker.claim())
    assert [api.delete(job["urls"]["self"]).status_code for _ in range(2)] == [204, 204]
    assert api.get(job["urls"]["self"]).json["error"]["code"] == "rejected"


def test_an_open_job_is_not_removed(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    answers = [api.delete(job["urls"]["self"])]
    worker.claim()
    answers.append(api.delete(job["urls"]["self"]))
    for response, status in zip(answers, ("queued", "running"), strict=True):
        assert response.status_code == 409 and response.json["code"] == "not_ended" and response.json["retryable"]
        assert response.json["detail"].startswith(f"The job is {status}")
    assert api.get(job["urls"]["self"]).json["input"]["prompt"] == "a cat"


def test_every_stored_picture_of_the_job_goes(api: Caller, services: Services, submit: Submit, worker: Worker) -> None:
    """A picture that nothing points at, from an attempt that was lost, must not outlive the removal either."""
    job = submit()
    claim = worker.claim()
    services.images.put(an_image(claim, PICTURE, attempt=7), PICTURE)
    worker.succeed(claim)
    assert api.delete(job["urls"]["self"]).status_code == 204
    assert services.images.of_job(job["id"]) == []


@on_sqlite
def test_the_other_jobs_stay(api: Caller, services: Services, submit: Submit, worker: Worker) -> None:
    job, other = submit(), submit()
    worker.succeed(worker.claim())
    worker.succeed(worker.claim())
    api.delete(job["urls"]["self"])
    assert api.get(other["urls"]["image"]).data == PICTURE
    with services.database.read() as connection:
        assert connection.scalars(select(jobs.c.id).where(jobs.c.data_removed)).all() == [job["id"]]


@on_sqlite
def test_a_late_picture_of_a_removed_job_is_not_kept(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    job = submit()
    claim = worker.claim()
    api.post(job["urls"]["cancel"])
    api.delete(job["urls"]["self"])
    with services.database.write() as tx:
        assert not life.succeed(tx, claim, an_image(claim)) and not life.adopt(tx, an_image(claim))
    assert api.get(job["urls"]["self"]).json["image"] is None


@on_sqlite
def test_an_image_that_is_removed_while_it_is_read_is_said_to_be(
    api: Caller, services: Services, submit: Submit, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit()
    worker.succeed(worker.claim())
    real = services.images.get

    def removed_just_before(job_id: str, attempt: int) -> Any:
        assert api.delete(job["urls"]["self"]).status_code == 204
        return real(job_id, attempt)

    monkeypatch.setattr(services.images, "get", removed_just_before)
    response = api.get(job["urls"]["image"])
    assert response.status_code == 410 and response.json["code"] == "removed"


@on_sqlite
def test_a_neighbour_removes_nothing(api: Caller, neighbour: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    for path in (f"/v1/jobs/{job['id']}", f"/v1/jobs/job_{'0' * 32}", "/v1/jobs/x"):
        assert neighbour.delete(path).status_code == 404
    assert api.get(job["urls"]["self"]).json["data_removed"] is False


@on_sqlite
def test_a_body_is_refused(api: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    response = api.delete(job["urls"]["self"], json={"only": "image"})
    assert response.status_code == 422 and response.json["errors"][0]["pointer"] == "#"
    assert api.get(job["urls"]["self"]).json["data_removed"] is False
