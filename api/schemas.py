"""The shapes of queries and of answers. The submit body, which depends on the catalogue, is in submission.py."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from shared.breaker import Reason, State
from shared.events import Event
from shared.image_link import LONGEST_SECONDS, WEBHOOK_SECONDS
from shared.job_object import Job, Moment
from shared.tables import Billed, Outcome, Status

#: Bodies take nothing that they do not know, and no text for a number.
STRICT = ConfigDict(extra="forbid", strict=True)

#: Texts that a database can store.
WITHOUT_NUL: JsonDict = {"pattern": "^[^\\u0000]*$"}

MetadataKey = Annotated[str, Field(min_length=1, max_length=64, json_schema_extra=WITHOUT_NUL)]
MetadataValue = Annotated[str, Field(max_length=2048, json_schema_extra=WITHOUT_NUL)]

_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


def _read_moment(value: object) -> datetime:
    if not isinstance(value, str) or not _MOMENT.fullmatch(value):
        raise ValueError("must be a time as in RFC 3339, such as 2026-01-31T12:00:00Z (a + is sent as %2B)")
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except OverflowError:  # at the ends of the calendar, in a far time zone
        return datetime.max.replace(tzinfo=UTC) if value > "5" else datetime.min.replace(tzinfo=UTC)
    except ValueError:
        raise ValueError("must be a time that exists") from None


def _read_number(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,9}", value):
        raise ValueError("must be a whole number")
    return int(value)


def _whole(value: object) -> object:
    # JSON has one kind of number: 20.0 is the integer 20, to JSON Schema too.
    return int(value) if isinstance(value, float) and value.is_integer() else value


#: Goes after the limits: pydantic leaves limits that stand after it out of the schema.
MAY_BE_FLOAT = BeforeValidator(_whole)

Limit = Annotated[int, Field(ge=1, le=100), BeforeValidator(_read_number)]

AskedMoment = Annotated[
    datetime, BeforeValidator(_read_moment), WithJsonSchema({"type": "string", "format": "date-time"})
]


class NoQuery(BaseModel):
    """A route without parameters: any is refused. Shapes of queries have names that end in Query (see errors.py)."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    @cache
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As pydantic makes it, made once: flask-openapi3 asks for it at every request."""
        return super().model_json_schema(*args, **kwargs)


class JobsQuery(NoQuery):
    """Which jobs to list."""

    status: Status | None = None
    backend: Annotated[str, Field(max_length=20, json_schema_extra=WITHOUT_NUL)] | None = Field(
        None, description="as it was asked for at submission"
    )
    model: Annotated[str, Field(max_length=100, json_schema_extra=WITHOUT_NUL)] | None = None
    created_after: AskedMoment | None = None
    created_before: AskedMoment | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = Field(
        {}, description="`metadata[KEY]=VALUE`: jobs with exactly this pair; several pairs must all match"
    )
    limit: Annotated[int, Field(ge=1, le=100), BeforeValidator(_read_number)] = 20
    cursor: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = Field(
        None, description="`next_cursor` of the page before; its form may change"
    )

    @model_validator(mode="before")
    @classmethod
    def _gather_metadata(cls, given: Mapping[str, str]) -> dict[str, Any]:
        pairs = {name[9:-1]: value for name, value in given.items() if name.startswith("metadata[") and name[-1] == "]"}
        rest = {name: value for name, value in given.items() if not (name.startswith("metadata[") and name[-1] == "]")}
        return ({"metadata": pairs} if pairs else {}) | rest

    def after(self) -> datetime | None:
        """The first moment that counts as after. Times are shown in milliseconds, so they are compared in these."""
        if self.created_after is None:
            return None
        shown = self.created_after.replace(microsecond=self.created_after.microsecond // 1000 * 1000)
        return min(shown, datetime.max.replace(tzinfo=UTC) - _MILLISECOND) + _MILLISECOND

    def before(self) -> datetime | None:
        """The first moment that does not count as before any more."""
        if self.created_before is None or self.created_before.microsecond % 1000 == 0:
            return self.created_before
        shown = self.created_before.replace(microsecond=self.created_before.microsecond // 1000 * 1000)
        return min(shown, datetime.max.replace(tzinfo=UTC) - _MILLISECOND) + _MILLISECOND


_MILLISECOND = timedelta(milliseconds=1)


def _read_place(value: object) -> int:
    if not isinstance(value, str) or not PLACE.fullmatch(value):
        raise ValueError("must be a whole number of at most 18 digits")
    return int(value)


#: A place among events, as it is sent.
PLACE = re.compile(r"[0-9]{1,18}")


class EventsQuery(NoQuery):
    """Which events to list, or to stream."""

    after: Annotated[int, Field(ge=0, lt=10**18), BeforeValidator(_read_place)] | None = Field(
        None,
        description="only events after this one: of a job its `sequence`, of the feed its `number`. Lists begin with "
        "the first event if it is not given, streams with a snapshot of what is",
    )
    limit: Annotated[int, Field(ge=1, le=100), BeforeValidator(_read_number)] = Field(
        100, description="of a list; a stream takes none"
    )


class ImageQuery(NoQuery):
    """What a signed link carries. It was judged before (api/auth.py), in place of the key."""

    expires: Annotated[str, Field(json_schema_extra={"pattern": "^[0-9]{1,12}$"})] | None = Field(
        None, description="of a signed link: when it expires, in seconds since 1970"
    )
    signature: Annotated[str, Field(json_schema_extra={"pattern": "^[0-9a-f]{64}$"})] | None = Field(
        None, description="of a signed link: it stands in for the key"
    )


class MakeImageLink(BaseModel):
    """How long a link to an image is to be good."""

    model_config = STRICT

    expires_in: Annotated[int, Field(ge=1, le=LONGEST_SECONDS), MAY_BE_FLOAT] = Field(
        WEBHOOK_SECONDS, description="seconds"
    )


class ImageLink(BaseModel):
    """A link that opens an image without a key."""

    url: str
    expires_at: Moment


class JobPath(BaseModel):
    id: str = Field(description="`job_` and 32 hexadecimal digits")


class JobList(BaseModel):
    data: list[Job]
    has_more: bool
    next_cursor: str | None


class EventList(BaseModel):
    data: list[Event]
    has_more: bool
    next_cursor: str | None = Field(
        description="what to give as `after` for what comes next, also when there is no more yet; null if there is "
        "nothing after what was given: give that again"
    )


class ProvenanceQuery(NoQuery):
    """Which picture is meant."""

    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] = Field(
        description="of its bytes, 64 hexadecimal digits"
    )


class MadeImage(BaseModel):
    content_type: str
    width: int
    height: int
    bytes: int


class MadeBy(BaseModel):
    """A job that made the picture."""

    job_id: str
    created_at: Moment
    completed_at: Moment | None
    model: str
    revision: str | None = Field(
        description="of the model, as the picture itself says; null for a vendor's, and once its bytes were removed"
    )
    backend: str | None = Field(
        description="null if the job's data were removed and pictures had come for it from several backends"
    )
    input: dict[str, Any] = Field(description="the job's, with the seed that was used; {} once its data were removed")
    image: MadeImage | None = Field(description="null once the job's data were removed")
    data_removed: bool
    url: str = Field(description="of the job")


class Provenance(BaseModel):
    """What this project knows of a picture."""

    sha256: str
    made: bool = Field(description="whether a job of this project made it")
    data: list[MadeBy] = Field(description="newest first")
    has_more: bool = Field(description="whether older ones are not shown")


class Breaker(BaseModel):
    """Whether jobs are given to a backend now. While it is open they wait, and lose none of their attempts."""

    state: State = Field(description="half_open: one job at a time is tried")
    reason: Reason | None = Field(description="why it opened; null while it is closed")
    until: Moment | None = Field(description="when the next job is tried, if it is open")


class BackendBreaker(Breaker):
    backend: str


class Queue(BaseModel):
    """What waits for a backend, and who works at it."""

    backend: str
    queued: int
    running: int
    slots: int = Field(description="how many jobs its workers can have in hand at once; 0: no worker is there")
    workers: int = Field(description="how many workers are there and make progress")
    in_hand: int = Field(description="how many of their slots hold a job, as they said in the last seconds")
    stuck: int = Field(
        description="how many workers are there and make no progress: they are about to be started again"
    )
    oldest_queued_seconds: float | None
    breaker: Breaker | None = Field(description="null while Redis is away: nothing is known of it")


class QueueList(BaseModel):
    data: list[Queue]


class AttemptError(BaseModel):
    code: str
    message: str


class Attempt(BaseModel):
    """One try at a job by one worker."""

    number: int
    backend: str
    started_at: Moment
    completed_at: Moment | None
    outcome: Outcome
    billed: Billed
    billed_usd: str | None = Field(description="null while it runs; an unknown bill counts in full")
    error: AttemptError | None


class AttemptList(BaseModel):
    data: list[Attempt]


class ModelParameter(BaseModel):
    """The limits of one field of `input`; those that do not apply are null."""

    name: str
    type: Literal["string", "integer", "number"]
    required: bool
    default: int | float | None = None
    minimum: int | float | None = None
    maximum: int | float | None = None
    multiple_of: int | None = None
    min_length: int | None = None
    max_length: int | None = None


class ModelSize(BaseModel):
    width: int
    height: int


class Model(BaseModel):
    id: str
    object: Literal["model"]
    title: str
    default: bool = Field(description="whether it is used when a submission names no model")
    backends: list[str] = Field(description="those of this service that serve it")
    image_to_image: list[str] = Field(
        description="those of them that take `image`, `mask` and `strength` in `input`; the others refuse them"
    )
    sandbox: bool = Field(description="whether its pictures come from the sandbox")
    price_usd: str = Field(description="of one image, a decimal number")
    fixed_size: ModelSize | None = Field(description="what it makes if it takes no width and height")
    parameters: list[ModelParameter]


class ModelList(BaseModel):
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


Check = Literal["ok", "degraded", "failed"]


class Checks(BaseModel):
    database: Check
    migrations: Check
    redis: Check
    workers: Check = Field(description="one that makes progress is there for each backend")
    senders: Check = Field(description="one of those that send webhooks is there")
    sweep: Check = Field(description="what a crash or a lost message leaves behind is being looked for")
    breakers: Check = Field(
        description="each backend's is closed; `breakers` beside the checks tells of those that aren't"
    )


class Readiness(BaseModel):
    status: Literal["ready", "not_ready"]
    checks: Checks
    breakers: list[BackendBreaker] = Field(
        description="those that are not closed, and why; none while Redis is away, as nothing is known of them then"
    )


class FieldError(BaseModel):
    """Where a request is wrong: `pointer` into the body, or `parameter` of query or header."""

    pointer: str | None = None
    parameter: str | None = None
    detail: str


class Problem(BaseModel):
    """Every error, as application/problem+json (RFC 9457). `code` is stable."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool = Field(description="whether the same request may succeed later")
    request_id: str
    errors: list[FieldError] = []


#: The shapes of queries, by the operation that takes them.
QUERIES: Mapping[str, type[NoQuery]] = {
    "listJobs": JobsQuery,
    "getImage": ImageQuery,
    "listJobEvents": EventsQuery,
    "listEvents": EventsQuery,
    "getProvenance": ProvenanceQuery,
}

#: The shapes of whole answers.
ANSWERS: tuple[type[BaseModel], ...] = (
    Job,
    JobList,
    EventList,
    ImageLink,
    Provenance,
    QueueList,
    AttemptList,
    ModelList,
    Health,
    Readiness,
    Problem,
)
