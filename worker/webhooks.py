"""What a webhook says, how it is signed, and what the answer to it means (Standard Webhooks)."""

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row

from shared.deliveries import Result
from shared.events import event_object
from shared.image_link import WEBHOOK_SECONDS, image_link
from shared.tables import TryOutcome
from worker.posting import Answer, NotDelivered, Trouble
from worker.retry_after import retry_after_seconds

#: A body that would be larger leaves out the job's input. Receivers often take 100 kB or less, and queues less still.
MOST_BYTES = 20_000

#: Of an answer's body this many characters are kept for the list of tries.
ANSWER_KEPT = 500


def body_of(event: Row[Any], job: Row[Any] | None, base_url: str, secret_key: str) -> bytes:
    """What is sent of an event, in UTF-8. `job`: the row of the one it happened to, None if it is not a job's.

    Made anew for each try: what was removed meanwhile is not told, and the picture's link is fresh.
    """
    told = event_object(event, job, base_url).model_dump(mode="json")
    body = {"type": told["type"], "timestamp": told["timestamp"], "data": told["data"]}
    if told["reason"] is not None:
        body["reason"] = told["reason"]
    data = body["data"]
    if job is not None and data["image"] is not None:
        data["image"]["url"] = image_link(base_url, secret_key, job.id, WEBHOOK_SECONDS)[0]
    text = _dump(body)
    if job is not None and len(text) > MOST_BYTES:
        data["input"], data["input_omitted"] = None, True
        text = _dump(body)
    return text


def _dump(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def signed(secrets: Sequence[str], webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that let a receiver verify it, a signature by each secret. `timestamp`: Unix time of this try."""
    text = f"{webhook_id}.{timestamp}.".encode() + body
    signatures = []
    for secret in secrets:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signatures.append("v1," + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode())
    return {"webhook-id": webhook_id, "webhook-timestamp": str(timestamp), "webhook-signature": " ".join(signatures)}


def judge(answer: Answer) -> Result:
    """What an answer means: 2xx took it, 410 wants nothing any more, anything else is tried again."""
    lowered = {name.lower(): value for name, value in answer.headers.items()}
    retry_after = retry_after_seconds(lowered) if answer.status in (429, 503) else None
    return Result(
        TryOutcome.delivered if 200 <= answer.status < 300 else TryOutcome.failed,
        seconds=answer.seconds,
        status=answer.status,
        # No database takes NUL in a text.
        answer=answer.start.decode("utf-8", "replace").replace("\0", "\ufffd")[:ANSWER_KEPT],
        retry_after=retry_after or 0.0,
        gone=answer.status == 410,
    )


def judge_failure(failure: NotDelivered, seconds: float) -> Result:
    """What it means that there was no answer. A URL that can't be one is not tried again."""
    return Result(
        TryOutcome.failed,
        seconds=seconds,
        error={"code": failure.kind, "message": failure.message},
        final=failure.kind == Trouble.bad_url,
    )
