"""What a webhook says, how it is signed, and what answers mean."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Row, select, update
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from shared import jobs
from shared.database import Database
from shared.events import jobs_of
from shared.image_link import is_ours
from shared.tables import TryOutcome, events
from shared.tables import jobs as job_rows
from shared.webhook_secrets import new_secret
from tests.lives import an_image, claim_one, submit
from worker import webhooks
from worker.posting import Answer, NotDelivered, Trouble

BASE, KEY = "https://images.example/", "k" * 32


def happened(database: Database, job_id: str) -> list[tuple[Row[Any], Row[Any]]]:
    """The events of a job, each with the job's row as it stands now."""
    with database.read() as connection:
        rows = connection.execute(select(events).where(events.c.subject_id == job_id).order_by(events.c.sequence)).all()
        return [(row, connection.execute(jobs_of([row])).one()) for row in rows]


def told(event: Row[Any], job: Row[Any] | None) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(webhooks.body_of(event, job, BASE, KEY))
    return body


def a_life(database: Database, **changes: Any) -> str:
    """A job that came back once, and succeeded."""
    job = submit(database, **changes)
    first = claim_one(database)
    with database.write() as tx:
        jobs.requeue(tx, first, reason="transient", after_seconds=0, counts=True)
    second = claim_one(database)
    with database.write() as tx:
        jobs.succeed(tx, second, an_image(second, warnings=[{"code": "size_differs", "message": "smaller"}]))
    return str(job.id)


def test_each_event_tells_of_the_job_as_it_stood_then(database: Database) -> None:
    bodies = [told(*pair) for pair in happened(database, a_life(database))]
    assert [body["type"] for body in bodies] == [
        "job.queued",
        "job.started",
        "job.queued",
        "job.started",
        "job.succeeded",
    ]
    data = [body["data"] for body in bodies]
    assert [one["sequence"] for one in data] == [1, 2, 3, 4, 5]
    assert [one["status"] for one in data] == ["queued", "running", "queued", "running", "succeeded"]
    assert [one["attempts"] for one in data] == [0, 1, 1, 2, 2]
    assert [one["started_at"] is None for one in data] == [True, False, False, False, False]
    assert [one["completed_at"] is None for one in data] == [True] * 4 + [False]
    assert [one["image"] is None for one in data] == [True] * 4 + [False]
    assert [one["warnings"] == [] for one in data] == [True] * 4 + [False]
    assert [body.get("reason") for body in bodies] == [None, None, "transient", None, None]
    assert set(bodies[0]) == {"type", "timestamp", "data"}


def test_the_link_to_the_picture_is_ours_for_a_week(database: Database) -> None:
    job_id = a_life(database)
    url = told(*happened(database, job_id)[-1])["data"]["image"]["url"]
    start, query = url.split("?")
    assert start == f"https://images.example/v1/jobs/{job_id}/image"
    given = dict(pair.split("=") for pair in query.split("&"))
    assert is_ours(KEY, job_id, int(given["expires"]), given["signature"])
    left = int(given["expires"]) - datetime.now(UTC).timestamp()
    assert 7 * 86400 - 600 < left <= 7 * 86400


def test_what_was_removed_is_not_told_any_more(database: Database) -> None:
    job_id = a_life(database, input={"prompt": "a secret fox"}, metadata={"who": "knows"})
    assert b"secret fox" in webhooks.body_of(*happened(database, job_id)[0], BASE, KEY)
    with database.write() as tx:
        jobs.remove_data(tx, job_id)
    for event, job in happened(database, job_id):
        body = webhooks.body_of(event, job, BASE, KEY)
        assert b"secret fox" not in body and b"knows" not in body
        assert json.loads(body)["data"]["data_removed"] is True
        assert json.loads(body)["data"]["image"] is None


def test_a_body_that_would_be_large_leaves_out_the_input_and_says_so(database: Database) -> None:
    job_id = a_life(database, input={"prompt": "\U0001f98a" * 2048, "negative_prompt": "\U0001f98a" * 2048})
    [(event, job), *_] = happened(database, job_id)
    whole = told(event, job)["data"]
    assert whole["input"]["prompt"] == "\U0001f98a" * 2048 and "input_omitted" not in whole
    with database.write() as tx:
        tx.execute(update(job_rows).values(input={"prompt": '"' * 11_000}))
    [(event, job), *_] = happened(database, job_id)
    body = webhooks.body_of(event, job, BASE, KEY)
    assert len(body) < webhooks.MOST_BYTES
    assert json.loads(body)["data"]["input"] is None and json.loads(body)["data"]["input_omitted"] is True


def test_an_independent_library_verifies_with_either_secret_while_one_is_replaced() -> None:
    old, new, body = new_secret(), new_secret(), '{"type":"job.succeeded","prompt":"füchse"}'.encode()
    stamp = int(datetime.now(UTC).timestamp())
    headers = webhooks.signed([new, old], "evt_1", stamp, body)
    for secret in (old, new):
        assert Webhook(secret).verify(body, headers) == json.loads(body)
    for wrong in (
        {**headers, "webhook-id": "evt_2"},
        {**headers, "webhook-timestamp": str(stamp - 1)},
        webhooks.signed([new_secret()], "evt_1", stamp, body),
        webhooks.signed([new], "evt_1", stamp - 3600, body),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(new).verify(body, wrong)
    with pytest.raises(WebhookVerificationError):
        Webhook(new).verify(body + b" ", headers)


@pytest.mark.parametrize(
    ("status", "headers", "outcome", "retry_after", "gone"),
    [
        (200, {}, TryOutcome.delivered, 0, False),
        (204, {"Retry-After": "60"}, TryOutcome.delivered, 0, False),
        (299, {}, TryOutcome.delivered, 0, False),
        (301, {"Location": "http://169.254.169.254/"}, TryOutcome.failed, 0, False),
        (400, {"Retry-After": "60"}, TryOutcome.failed, 0, False),
        (410, {}, TryOutcome.failed, 0, True),
        (429, {"Retry-After": "60"}, TryOutcome.failed, 60, False),
        (503, {"retry-after": "nonsense"}, TryOutcome.failed, 0, False),
        (503, {"Retry-After": "1000000000"}, TryOutcome.failed, 1e9, False),
        (
            503,
            {"Retry-After": "Mon, 23 Nov 2026 10:00:30 GMT", "Date": "Mon, 23 Nov 2026 10:00:00 GMT"},
            TryOutcome.failed,
            30,
            False,
        ),
        (600, {}, TryOutcome.failed, 0, False),
    ],
)
def test_what_an_answer_means(
    status: int, headers: dict[str, str], outcome: TryOutcome, retry_after: float, gone: bool
) -> None:
    result = webhooks.judge(Answer(status, headers, b"", 0.5))
    assert (result.outcome, result.retry_after, result.gone, result.final) == (outcome, retry_after, gone, False)
    assert (result.status, result.seconds) == (status, 0.5)


def test_of_an_answer_a_short_start_is_kept_that_any_database_takes() -> None:
    result = webhooks.judge(Answer(500, {}, b"\0\xff" + b"x" * 1000, 0.5))
    assert result.answer is not None
    assert result.answer.startswith("\ufffd\ufffdx") and len(result.answer) == webhooks.ANSWER_KEPT


def test_a_url_that_can_not_be_one_is_not_tried_again_and_any_other_trouble_is() -> None:
    finals = {kind for kind in Trouble if webhooks.judge_failure(NotDelivered(kind, "why"), 1.0).final}
    assert finals == {Trouble.bad_url}
