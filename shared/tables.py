"""The tables, no verbs. migrations/ makes them; a test holds the two together.

The verbs that change a job stand in jobs.py. Money is whole millionths of a US dollar: SQLite has no decimal type.
"""

import re
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
    text,
)

from shared.database import UtcTime

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)


class Status(StrEnum):
    """Where a job stands. The last four are terminal: a job enters exactly one of them, once."""

    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    canceled = "canceled"
    expired = "expired"


class Outcome(StrEnum):
    """What became of an attempt. `unknown`: whoever made it died, or its answer was never seen."""

    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    unknown = "unknown"
    canceled = "canceled"


class Billed(StrEnum):
    """Whether the vendor took money for an attempt. `unknown` counts in full."""

    yes = "yes"
    no = "no"
    unknown = "unknown"


class DeliveryStatus(StrEnum):
    """Where a delivery stands. The last two are ends, which a redelivery leaves again."""

    pending = "pending"
    sending = "sending"
    delivered = "delivered"
    failed = "failed"


class TryOutcome(StrEnum):
    """What became of one try of a delivery. `unknown`: its sender died, or its answer was never seen."""

    running = "running"
    delivered = "delivered"
    failed = "failed"
    unknown = "unknown"


class Disabled(StrEnum):
    """Why an endpoint is told nothing any more: it answered 410, failed for days, or its project said so."""

    gone = "gone"
    failing = "failing"
    by_hand = "by_hand"


def _partial(condition: str) -> dict[str, Any]:
    """A partial index. SQLite uses it only if the query spells the condition alike, and there a boolean is `= 1`."""
    on_sqlite = re.sub(r"\bready\b", "ready = 1", condition).replace("NOT ready = 1", "ready = 0")
    return {"postgresql_where": text(condition), "sqlite_where": text(on_sqlite)}


_JSON = JSON(none_as_null=True)

projects = Table(
    "projects",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("created_at", UtcTime, nullable=False),
    Column("feed", BigInteger, nullable=False, server_default="0"),  # the number of the latest event in its feed
)

# jobs and events name their project without a foreign key: on PostgreSQL every insert would lock the project's one row.

keys = Table(
    "keys",
    metadata,
    Column("prefix", String(16), primary_key=True),  # the start of the key, not secret: finds the row
    Column("project_id", String(40), ForeignKey("projects.id"), nullable=False),
    Column("hash", String(64), nullable=False),  # HMAC-SHA256 of the whole key under SECRET_KEY, hex
    Column("bootstrap", Boolean, nullable=False),  # from the setting API_KEY; replaced when that changes
    Column("created_at", UtcTime, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("status", String(10), nullable=False),
    Column("sequence", Integer, nullable=False),  # grows by one at every event
    Column("model", String(100), nullable=False),
    Column("backend_asked", String(20), nullable=False),  # as submitted: `auto` or a name
    Column("backend", String(20), nullable=False),  # the resolved one: whose queue it waits in
    Column(
        "routing", _JSON
    ),  # its choices: {backend, reason, at}, of the first at created_at; null: an older version's
    Column("sandbox", Boolean, nullable=False),
    Column("input", _JSON, nullable=False),
    Column("metadata", _JSON, nullable=False),
    Column("warnings", _JSON, nullable=False),
    # The queue. `ready` is false while it backs off; the sweep sets it when `ready_at` comes. `rank` is written at
    # submit and never computed at the claim.
    Column("ready", Boolean, nullable=False),
    Column("ready_at", UtcTime),
    Column("rank", BigInteger, nullable=False),
    Column("deadline_at", UtcTime),  # the client's bound on the wait for the first attempt
    Column("queue_until", UtcTime, nullable=False),  # ours on the whole time in the queue
    # The worker that has it.
    Column("fence", Integer, nullable=False),
    Column("worker", String(100)),
    Column("lease_until", UtcTime),
    Column("attempt_deadline_at", UtcTime),  # no lease reaches beyond it
    # What happened so far.
    Column("attempts", Integer, nullable=False),
    Column("failures", Integer, nullable=False),  # attempts that ended with an answer that was no picture
    Column("refusals", Integer, nullable=False),  # in a row: known not to have been accepted
    Column("crashes", Integer, nullable=False),  # attempts whose worker died
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("completed_at", UtcTime),
    Column("error", _JSON),  # {code, message, retryable, billed}
    # The picture that it points at.
    Column("image_attempt", Integer),
    Column("image_content_type", String(20)),
    Column("image_width", Integer),
    Column("image_height", Integer),
    Column("image_bytes", Integer),
    Column("image_sha256", String(64)),  # stays when the data are removed
    Column("retried_from", String(40)),
    Column("data_removed", Boolean, nullable=False, server_default=false()),
    Column("webhook", _JSON),  # {url, events}: who is told of this job, beside the project's endpoints
    Column("request_id", String(128)),  # of the request that it came with; for logs
    Index("ix_jobs_claim", "backend", "rank", "id", **_partial("status = 'queued' AND ready")),
    Index("ix_jobs_not_ready", "ready_at", **_partial("status = 'queued' AND NOT ready")),
    Index("ix_jobs_queue_until", "queue_until", **_partial("status = 'queued'")),
    Index("ix_jobs_deadline_at", "deadline_at", **_partial("status = 'queued' AND deadline_at IS NOT NULL")),
    Index("ix_jobs_lease_until", "lease_until", **_partial("status = 'running'")),
    Index("ix_jobs_retried_from", "retried_from", **_partial("retried_from IS NOT NULL")),
    Index("ix_jobs_project_id_id", "project_id", "id"),
    Index("ix_jobs_project_id_status_id", "project_id", "status", "id"),
    Index("ix_jobs_image_sha256", "project_id", "image_sha256", **_partial("image_sha256 IS NOT NULL")),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(40), ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),  # from 1
    Column("backend", String(20), nullable=False),
    Column("worker", String(100), nullable=False),
    Column("price", Integer, nullable=False),  # millionths of a dollar, at stake from the claim on
    Column("started_at", UtcTime, nullable=False),
    Column("deadline_at", UtcTime, nullable=False),  # after it nobody works at it any more
    Column("completed_at", UtcTime),
    Column("outcome", String(10), nullable=False),
    Column("billed", String(7), nullable=False),
    Column("error", _JSON),  # {code, message}
    # The outcome as it was tallied last (worker/tallying.py), and so in deliveries and delivery_tries.
    Column("tallied", String(10), nullable=False, server_default="running"),
    Index("ix_attempts_running", "deadline_at", **_partial("outcome = 'running'")),
    Index("ix_attempts_not_tallied", "completed_at", **_partial("tallied != outcome")),
)

events = Table(
    "events",
    metadata,
    Column("subject_id", String(40), primary_key=True),  # what it happened to: a job or an endpoint
    Column("sequence", Integer, primary_key=True),  # of its subject, from 1
    Column("id", String(40), nullable=False, unique=True),
    Column("project_id", String(40), nullable=False),
    Column("type", String(40), nullable=False),
    Column("data", _JSON, nullable=False),  # what the job's row will not tell any more once it has moved on
    Column("created_at", UtcTime, nullable=False),
    # Its place in the project's feed, from 1 and without gaps. Given after the commit (worker/feed.py), one project at
    # a time: so whoever has read up to a number has missed nothing before it.
    Column("number", BigInteger),
    Index("ix_events_not_numbered", "created_at", **_partial("number IS NULL")),
    Index("ix_events_feed", "project_id", "number", unique=True, **_partial("number IS NOT NULL")),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("url", String(2048), nullable=False),
    Column("description", String(200), nullable=False),
    Column("events", _JSON, nullable=False),  # the types that it is told of
    Column("sequence", Integer, nullable=False),  # grows by one at every event of its own
    Column("disabled_at", UtcTime),
    Column("disabled_reason", String(20)),  # see Disabled
    Column("created_at", UtcTime, nullable=False),
    Index("ix_endpoints_project_id_id", "project_id", "id"),
)

#: What deliveries are signed with: of an endpoint, or of a project for the URLs that its jobs name.
webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    Column("owner_id", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),  # from 1; the latest signs first
    Column("sealed", String(200), nullable=False),  # encrypted under SECRET_KEY (shared/webhook_secrets.py)
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),  # of one that was replaced: until then both sign
)

#: Who receives deliveries: an endpoint, or the server of the URLs that a project's jobs name. Its row is the lock under
#: which its deliveries are claimed, put off and counted.
receivers = Table(
    "receivers",
    metadata,
    Column("id", String(330), primary_key=True),  # an endpoint's id, or a project's and the server's address
    Column("host", String(255), nullable=False),
    Column("window", Integer, nullable=False),  # how many deliveries may be on their way to it at once
    Column("failures", Integer, nullable=False),  # tries that failed, in a row
    Column("failing_since", UtcTime),
    Column("rest_until", UtcTime),  # after failures it is left alone until then
    Column("next_due_at", UtcTime),  # of its pending deliveries; null: there is none
    Index("ix_receivers_next_due_at", "next_due_at", **_partial("next_due_at IS NOT NULL")),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("event_id", String(40), nullable=False),
    Column("subject_id", String(40), nullable=False),  # the event's
    Column("type", String(40), nullable=False),  # the event's
    Column("endpoint_id", String(40)),  # null: to the URL that the job named
    Column("receiver", String(330), nullable=False),
    Column("host", String(255), nullable=False),
    Column("url", String(2048), nullable=False),
    Column("status", String(10), nullable=False),
    Column("tries", Integer, nullable=False),  # so far, and how many rows it has in delivery_tries
    Column("step", Integer, nullable=False),  # tries since the schedule began: a redelivery begins it anew
    Column("is_retry", Boolean, nullable=False),  # step > 0: it stands behind first tries
    Column("scheduled_at", UtcTime, nullable=False),  # when the schedule began
    Column("due_at", UtcTime, nullable=False),  # of the next try
    Column("fence", Integer, nullable=False),
    Column("worker", String(100)),
    Column("lease_until", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    Column("completed_at", UtcTime),
    Column("tallied", String(10), nullable=False, server_default="none"),
    Index("ix_deliveries_not_tallied", "id", **_partial("tallied != status")),
    Index("ix_deliveries_due", "receiver", "is_retry", "due_at", "id", **_partial("status = 'pending'")),
    Index("ix_deliveries_sending", "host", "receiver", **_partial("status = 'sending'")),
    Index("ix_deliveries_project_id_id", "project_id", "id"),
    Index("ix_deliveries_project_id_status_id", "project_id", "status", "id"),
    Index("ix_deliveries_subject_id_id", "subject_id", "id"),
    Index("ix_deliveries_endpoint_id_id", "endpoint_id", "id", **_partial("endpoint_id IS NOT NULL")),
)

delivery_tries = Table(
    "delivery_tries",
    metadata,
    Column("delivery_id", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),  # from 1
    Column("started_at", UtcTime, nullable=False),
    Column("outcome", String(10), nullable=False),
    Column("seconds", Float),  # how long it took
    Column("status", Integer),  # of the answer, if there was one
    Column("error", _JSON),  # {code, message}, if there was none
    Column("answer", Text),  # the start of its body
    Column("tallied", String(10), nullable=False, server_default="running"),
    Index("ix_delivery_tries_not_tallied", "started_at", **_partial("tallied != outcome")),
)

#: What was counted so far, by what: `attempts/dataoorts/failed` (shared/tallies.py). Money in millionths of a dollar.
tallies = Table(
    "tallies",
    metadata,
    Column("series", String(100), primary_key=True),
    Column("amount", BigInteger, nullable=False),
)

#: How long a repeated request gets the job of the first one.
KEYS_KEPT_SECONDS = 24 * 3600

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("project_id", String(40), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),  # SHA-256 of method, path and parsed body, hex
    Column("job_id", String(40), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index("ix_idempotency_keys_created_at", "created_at"),
)

#: A row for each process that works, and for each kind of work that it does, written with every heartbeat.
workers = Table(
    "workers",
    metadata,
    Column("name", String(100), primary_key=True),  # its host's name and its process id
    Column("backend", String(20), primary_key=True),  # or `deliver`, or `sweep`
    Column("slots", Integer, nullable=False),
    Column("seconds", Float),  # what its latest attempts took on average; null before the first
    Column("seen_at", UtcTime, nullable=False),  # the latest heartbeat; of the sweep, its latest round
    Column("machine", String(64)),  # see shared/machine.py; null: written by an older version, as all below
    Column("in_hand", Integer, nullable=False, server_default="0"),  # slots that hold a job or a delivery
    Column("done", BigInteger, nullable=False, server_default="0"),  # what it has ended since its start
    Column("progressed_at", UtcTime),  # when anything in its slots moved last, or they were seen with nothing to do
    Column("heard_at", UtcTime),  # when Celery's consumer last heard of Redis; null: it has none
    Column("trouble", String(300)),  # why it counts as stuck, in its own words; null: it does not
)

images = Table(
    "images",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("content_type", String(20), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("warnings", _JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("data", LargeBinary, nullable=False),  # last: what stands before it is read without it
)

#: What a picture starts from: the image that a job alters and, where not all of it may change, the mask. As received.
inputs = Table(
    "inputs",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("name", String(10), primary_key=True),  # `image` or `mask`, as in the job's input
    Column("content_type", String(20), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("data", LargeBinary, nullable=False),  # last: what stands before it is read without it
)
