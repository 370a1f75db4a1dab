"""The shapes of webhooks: endpoints, deliveries and secrets, in bodies, in queries and in answers."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from api.schemas import STRICT, WITHOUT_NUL, AskedMoment, Limit, MakeImageLink, NoQuery
from shared.events import TERMINAL_EVENTS, EventType
from shared.job_object import Moment
from shared.tables import DeliveryStatus, Disabled, TryOutcome
from shared.webhook_url import LONGEST, check_url

#: What a job's own webhook may be told of, and what an endpoint may: all but its own test, which it is told anyway.
JobEvent = Literal["job.queued", "job.started", "job.succeeded", "job.failed", "job.canceled", "job.expired"]
AnyEvent = Literal[JobEvent, "endpoint.disabled"]

DEFAULT_EVENTS: tuple[JobEvent, ...] = tuple(event.value for event in TERMINAL_EVENTS)  # type: ignore[misc]


def _good(url: str) -> str:
    check_url(url)
    return url


def _without_doubles(events: list[str]) -> list[str]:
    if len(set(events)) < len(events):
        raise ValueError("must name each event once")
    return events


#: What `check_url` takes, as far as a pattern can tell.
_URL_PATTERN = "^[Hh][Tt][Tt][Pp][Ss]?://[!-~]+$"
_Chosen = (Field(min_length=1, json_schema_extra={"uniqueItems": True}), AfterValidator(_without_doubles))

WebhookUrl = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST, json_schema_extra={"format": "uri", "pattern": _URL_PATTERN}),
    AfterValidator(_good),
]
JobEvents = Annotated[list[JobEvent], *_Chosen]
AnyEvents = Annotated[list[AnyEvent], *_Chosen]
Description = Annotated[str, Field(max_length=200, json_schema_extra=WITHOUT_NUL)]


class Webhook(BaseModel):
    """Who is told of one job, and of what."""

    model_config = STRICT

    url: WebhookUrl
    events: JobEvents = Field(list(DEFAULT_EVENTS), description="the ends of a job if it is not given")


class RegisterEndpoint(BaseModel):
    """A URL that is to be told of all that happens in the project."""

    model_config = STRICT

    url: WebhookUrl
    events: AnyEvents = Field(list(DEFAULT_EVENTS), description="the ends of jobs if it is not given")
    description: Description = ""


class ChangeEndpoint(BaseModel):
    """What is to be another. What is not given stays as it is: the defaults here are never used."""

    model_config = STRICT

    url: WebhookUrl = Field(default_factory=str)
    events: AnyEvents = Field(default_factory=list)
    description: Description = Field(default_factory=str)
    disabled: bool = Field(default_factory=bool, description="`false` enables it again and forgets its failures")


class RedeliverSince(BaseModel):
    """From when on deliveries are to be sent again."""

    model_config = STRICT

    since: AskedMoment


class PageQuery(NoQuery):
    """Which page of a list."""

    limit: Limit = 20
    cursor: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = Field(
        None, description="`next_cursor` of the page before; its form may change"
    )


class DeliveriesQuery(PageQuery):
    """Which deliveries to list."""

    status: DeliveryStatus | None = None
    endpoint: Annotated[str, Field(pattern="^end_[0-9a-f]{32}$")] | None = Field(
        None, description="its id; that of a removed one is good too"
    )
    event_type: EventType | None = None


class EndpointPath(BaseModel):
    id: str = Field(description="`end_` and 32 hexadecimal digits")


class DeliveryPath(BaseModel):
    id: str = Field(description="`dlv_` and 32 hexadecimal digits")


class Endpoint(BaseModel):
    """A URL that the project registered to be told of its events."""

    id: str
    object: Literal["endpoint"]
    url: str
    description: str
    events: list[EventType]
    disabled: bool
    disabled_reason: Disabled | None = Field(
        description="`gone`: it answered 410; `failing`: it did nothing but fail for days; `by_hand`: by a request"
    )
    disabled_at: Moment | None
    created_at: Moment


class NewEndpoint(Endpoint):
    """An endpoint at its making, with its secret."""

    secret: str = Field(description="what its deliveries are signed with (Standard Webhooks); shown only here")


class EndpointList(BaseModel):
    data: list[Endpoint]
    has_more: bool
    next_cursor: str | None


class WebhookSecret(BaseModel):
    """What deliveries to the URLs of the project's jobs are signed with."""

    secret: str


class NewSecret(BaseModel):
    """A secret at its making."""

    secret: str
    previous_expires_at: Moment | None = Field(
        description="until then the one before signs too; null if there was none before"
    )


class Redelivered(BaseModel):
    redelivered: int
    has_more: bool = Field(description="whether to ask again, for what was too much for one call")


class TryError(BaseModel):
    code: str
    message: str


class Try(BaseModel):
    """One try of a delivery."""

    number: int
    started_at: Moment
    outcome: TryOutcome = Field(description="`unknown`: its sender died, and the answer was not seen")
    seconds: float | None = Field(description="how long it took")
    status: int | None = Field(description="of the answer, if there was one")
    error: TryError | None = Field(description="why there was no answer")
    answer: str | None = Field(description="the start of its body")


class Delivery(BaseModel):
    """One event on its way to one URL."""

    id: str
    object: Literal["delivery"]
    event_id: str = Field(description="the `webhook-id` of all its tries")
    type: EventType
    job_id: str | None = Field(description="null if the event is an endpoint's")
    endpoint_id: str | None = Field(description="null if it goes to the URL that the job named")
    url: str
    status: DeliveryStatus
    next_try_at: Moment | None = Field(description="null while it is sent, and after its end")
    created_at: Moment
    completed_at: Moment | None
    tries: list[Try]


class DeliveryList(BaseModel):
    data: list[Delivery]
    has_more: bool
    next_cursor: str | None


def since_of(body: RedeliverSince) -> datetime:
    """Times are shown in milliseconds, so what happened within the one that was named counts too."""
    return body.since.replace(microsecond=body.since.microsecond // 1000 * 1000)


#: The shapes of bodies but the submissions', which the catalogue makes; of queries, by operation; of whole answers.
BODIES: tuple[type[BaseModel], ...] = (RegisterEndpoint, ChangeEndpoint, RedeliverSince, MakeImageLink)
QUERIES: Mapping[str, type[NoQuery]] = {
    "listEndpoints": PageQuery,
    "listJobDeliveries": PageQuery,
    "listDeliveries": DeliveriesQuery,
}
ANSWERS: tuple[type[BaseModel], ...] = (
    Endpoint,
    NewEndpoint,
    EndpointList,
    WebhookSecret,
    NewSecret,
    Redelivered,
    Delivery,
    DeliveryList,
)
