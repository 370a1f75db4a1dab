"""GET /v1/jobs/{id}/attempts."""

from shared.tables import Billed, Outcome
from tests.api.people import Caller, Submit, Worker, on_sqlite


@on_sqlite
def test_a_job_that_was_not_tried_has_no_attempts(api: Caller, submit: Submit) -> None:
    response = api.get(f"/v1/jobs/{submit()['id']}/attempts")
    assert response.status_code == 200 and response.json == {"data": []}


def test_each_attempt_tells_how_it_ended_and_what_it_cost(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    submit()
    lost = worker.claim(8000)
    worker.requeue(lost)
    worker.close_attempt(lost, Outcome.unknown, Billed.unknown)
    refused = worker.claim(8000)
    worker.requeue(refused)
    error = {"code": "transient", "message": "503"}
    worker.close_attempt(refused, Outcome.failed, Billed.no, error)
    worker.claim(8000)
    data = api.get(f"/v1/jobs/{job['id']}/attempts").json["data"]
    assert all(attempt.pop("started_at") for attempt in data)
    assert [attempt.pop("completed_at") is None for attempt in data] == [False, False, True]
    same = {"backend": "dataoorts"}
    assert data == [
        same | {"number": 1, "outcome": "unknown", "billed": "unknown", "billed_usd": "0.008", "error": None},
        same | {"number": 2, "outcome": "failed", "billed": "no", "billed_usd": "0", "error": error},
        same | {"number": 3, "outcome": "running", "billed": "unknown", "billed_usd": None, "error": None},
    ]
