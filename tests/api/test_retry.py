"""POST /v1/jobs/{id}/retry."""

import threading
from typing import Any

from flask_openapi3.openapi import OpenAPI
from sqlalchemy import func, select, update

from api.services import Services
from shared import jobs as life
from shared.database import now
from shared.tables import Status, jobs
from tests.api.people import KEY, Caller, Submit, Worker, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.lives import submit as submit_row

SAME = ("model", "backend", "input", "metadata", "sandbox")


def retry(api: Caller, job: dict[str, Any]) -> Any:
    return api.post(f"{job['urls']['self']}/retry")


def test_an_ended_job_is_submitted_again_with_the_same_seed(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    canceled, failed, expired = submit(metadata={"ticket": "ABC-1"}), submit(), submit(deadline_seconds=60)
    api.post(canceled["urls"]["cancel"])
    worker.fail(worker.claim())
    with services.database.write() as tx:
        tx.execute(update(jobs).where(jobs.c.id == expired["id"]).values(deadline_at=now(-1)))
        assert life.expire(tx, expired["id"]) == Status.expired
    for job in (canceled, failed, expired):
        response = retry(api, job)
        again = response.json
        assert response.status_code == 202 and response.headers["Location"] == again["urls"]["self"]
        assert response.headers["Retry-After"] and response.headers["Vary"] == "Prefer"
        assert again["id"] != job["id"] and again["retried_from"] == job["id"] and again["status"] == "queued"
        assert {name: again[name] for name in SAME} == {name: job[name] for name in SAME}
        assert again["attempts"] == 0 and again["cost_usd"] == "0" and again["deadline_at"] is None
        found = api.get(again["urls"]["self"]).json
        assert found.pop("queue_position") and found.items() <= again.items()
        assert api.get(job["urls"]["self"]).json["retried_from"] is None
    assert worker.claim().job_id


def test_while_one_is_open_it_is_that_one(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    first = retry(api, job).json
    assert retry(api, job).json["id"] == first["id"]
    claim = worker.claim()
    response = retry(api, job)
    assert response.status_code == 200 and response.json["id"] == first["id"] and response.json["status"] == "running"
    assert response.headers["Location"] == first["urls"]["self"] and "Idempotent-Replayed" not in response.headers
    worker.fail(claim)
    response = retry(api, job)
    assert response.status_code == 202 and response.json["id"] != first["id"]


def test_fifty_at_once_make_one_job(app: OpenAPI, api: Caller, services: Services, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    answers: list[Any] = []
    start = threading.Barrier(50)

    def ask() -> None:
        client = client_with(app, KEY)
        start.wait(60)
        answers.append(retry(client, job))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 49 + [202]
    assert len({answer.json["id"] for answer in answers}) == 1
    with services.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(jobs)) == 2


def test_what_is_open_or_succeeded_is_not_submitted_again(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    answers = [retry(api, job)]
    claim = worker.claim()
    answers.append(retry(api, job))
    worker.succeed(claim)
    answers.append(retry(api, job))
    for response, status in zip(answers, ("queued", "running", "succeeded"), strict=True):
        assert response.status_code == 409 and response.json["code"] == "not_retryable"
        assert response.json["detail"] == f"The job is {status}."


def test_what_was_removed_is_not_submitted_again(api: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    api.delete(job["urls"]["self"])
    response = retry(api, job)
    assert response.status_code == 410 and response.json["code"] == "removed"


@on_sqlite
def test_data_that_are_removed_while_it_is_retried_are_said_to_be(
    api: Caller, services: Services, submit: Submit, monkeypatch: Any
) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    real = life.retry

    def removed_just_before(tx: Any, *args: Any, **kwargs: Any) -> Any:
        life.remove_data(tx, job["id"])
        return real(tx, *args, **kwargs)

    monkeypatch.setattr(life, "retry", removed_just_before)
    assert retry(api, job).status_code == 410


@on_sqlite
def test_a_model_that_is_no_longer_served_is_not_submitted_again(
    api: Caller, services: Services, submit: Submit
) -> None:
    project = submit()["id"]
    with services.database.read() as connection:
        project = connection.scalars(select(jobs.c.project_id)).one()
    for model, asked in (("m", "auto"), ("stabilityai/stable-diffusion-xl-base-1.0", "diffusers")):
        row = submit_row(services.database, project_id=project, model=model, backend_asked=asked)
        path = f"/v1/jobs/{row.id}"
        assert api.post(f"{path}/cancel").json["status"] == "canceled"
        response = api.post(f"{path}/retry")
        assert response.status_code == 409 and response.json["code"] == "not_retryable"
        assert "no longer served" in response.json["detail"]


@on_sqlite
def test_a_retried_job_can_be_retried(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    for _ in range(3):
        worker.fail(worker.claim())
        again = retry(api, job).json
        assert again["retried_from"] == job["id"] and again["input"] == job["input"]
        job = again


@on_sqlite
def test_a_retry_rings_the_bell_once(api: Caller, services: Services, submit: Submit, monkeypatch: Any) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    rung: list[str] = []
    monkeypatch.setattr(services.bell, "ring", rung.append)
    retry(api, job), retry(api, job)
    assert rung == ["dataoorts"]


@on_sqlite
def test_a_neighbour_retries_nothing(api: Caller, neighbour: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    assert neighbour.post(f"/v1/jobs/{job['id']}/retry").status_code == 404
    assert len(api.get("/v1/jobs").json["data"]) == 1


@on_sqlite
def test_a_body_is_refused(api: Caller, submit: Submit) -> None:
    job = submit()
    api.post(job["urls"]["cancel"])
    response = api.post(f"{job['urls']['self']}/retry", json={"seed": 1})
    assert response.status_code == 422 and response.json["errors"][0]["pointer"] == "#"
