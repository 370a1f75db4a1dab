"""The body of POST /v1/jobs, made from the catalogue: one shape a model, chosen by the field `model`; and its job.

The same shapes check the request and describe it in OpenAPI, so that neither can promise what the other refuses.
"""

import re
import secrets
from functools import cache
from typing import Annotated, Any, Literal, Union

from flask import g
from pydantic import AfterValidator, BaseModel, Discriminator, Field, RootModel, Tag, create_model
from sqlalchemy import Connection, Row

from api import altering
from api.errors import invalid_field
from api.schemas import MAY_BE_FLOAT, STRICT, WITHOUT_NUL, MetadataKey, MetadataValue
from api.services import Services
from api.webhook_shapes import DEFAULT_EVENTS, Webhook, WebhookUrl
from shared import jobs as life
from shared import routing
from shared.catalogue import DEFAULT_MODEL, MODELS, Model, Number, Text
from shared.routing import AUTO

#: Of all keys and values of one job's metadata, in UTF-8.
MOST_METADATA_BYTES = 2048


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    if sum(len(text.encode()) for pair in metadata.items() for text in pair) > MOST_METADATA_BYTES:
        raise ValueError(f"must have at most {MOST_METADATA_BYTES} bytes in all keys and values")
    return metadata


_BACKEND = (
    "who makes it. `auto`: chosen by who is well, has room, and costs less, in this order; and chosen again while it "
    "waits, if that one fails or is gone. The job's `routing` says who and why. A seed makes the same image again on "
    "the same backend only: name one where that matters"
)


def _form_of(webhook: object) -> str | None:
    if isinstance(webhook, str):
        return "[url]"
    return "[webhook]" if isinstance(webhook, dict | Webhook) else None


#: Chosen by a function, so that a mistake is told for the form that was meant.
AskedWebhook = Annotated[
    Annotated[WebhookUrl, Tag("[url]")] | Annotated[Webhook, Tag("[webhook]")],
    Discriminator(
        _form_of,
        custom_error_type="webhook_form",
        custom_error_message="must be a URL, or an object with `url` and `events`",
    ),
]


class Submission(BaseModel):
    """What is the same for every model."""

    model_config = STRICT

    model: str
    input: BaseModel
    backend: str
    deadline_seconds: Annotated[int, Field(ge=1, le=604_800), MAY_BE_FLOAT] | None = Field(
        None, description="how long it may wait before its first attempt; after that it expires"
    )
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16), AfterValidator(_bounded)] = Field(
        default_factory=dict, description=f"yours; at most {MOST_METADATA_BYTES} bytes in all keys and values"
    )
    webhook: AskedWebhook | None = Field(
        None, description="a URL that is told of this job, beside the project's endpoints; `events` chooses of what"
    )


@cache
def submission_body(backends: tuple[str, ...]) -> type[RootModel[Any]]:
    """The shape of the submit body, for the models that one of these backends serves."""
    shapes = [
        Annotated[_shape(model, served_by, altering.shape_of(model, MODELS, backends)), Tag(model.name)]
        for model in MODELS.values()
        if (served_by := [backend for backend in backends if backend in model.backends])
    ]

    class SubmitJob(RootModel[Any]):
        """A job to be done. `model` chooses which `input` is taken."""

        root: Annotated[Union[tuple(shapes)], Discriminator(_model_of)]  # type: ignore[valid-type]  # noqa: UP007

    return SubmitJob


def _model_of(body: Any) -> str | None:
    name = body.get("model", DEFAULT_MODEL) if isinstance(body, dict) else body.model
    return name if isinstance(name, str) else None


def _shape(model: Model, backends: list[str], start: altering.Shape) -> type[Submission]:
    name = re.sub(r"\W+", "_", model.name)
    fields: dict[str, Any] = {field: field_of(limits) for field, limits in model.parameters.items()}
    inputs = create_model(f"Input_{name}", __base__=start.base, **(fields | start.fields))
    default = model.name if model.name == DEFAULT_MODEL else ...
    return create_model(
        f"SubmitJob_{name}",
        __base__=Submission,
        __cls_kwargs__={"json_schema_extra": altering.only_where_able(model, backends)},
        model=(Literal[model.name], default),  # type: ignore[arg-type]  # mypy knows no literals made at run time
        input=(inputs, ...),
        backend=(
            Literal[AUTO, *backends],  # type: ignore[arg-type]
            Field(AUTO, description=_BACKEND),
        ),
    )


def field_of(limits: Text | Number) -> tuple[Any, Any]:
    """A field with these limits, for `create_model`."""
    if isinstance(limits, Text):
        if limits.required:
            return _filled(limits), ...
        bounds = Field(min_length=limits.min_length, max_length=limits.max_length, json_schema_extra=WITHOUT_NUL)
        return Annotated[Annotated[str, bounds] | None, AfterValidator(lambda text: text or None)], None
    bounds = Field(ge=limits.minimum, le=limits.maximum, multiple_of=limits.multiple_of)
    number = Annotated[int, bounds, MAY_BE_FLOAT] if limits.whole else Annotated[float, bounds]
    return (number | None if limits.default is None else number), limits.default


def _filled(limits: Text) -> Any:
    """A text that says something: blanks at its ends don't count, or an empty prompt would be paid for.

    One pattern for the check and for the document, so what counts as blank is spelt for both ways to read it: as Python
    does (which takes \\x1c to \\x1f and \\x85 for blanks), and as ECMA-262 does (\\ufeff).
    """
    some = r"[^\x00\s\x1c-\x1f\x85\ufeff]"
    pattern = rf"^[^\x00]*{some}[^\x00]{{{limits.min_length - 2},}}{some}[^\x00]*$"
    says_something = re.compile(pattern)

    def check(text: str) -> str:
        if not says_something.search(text):
            raise ValueError(f"must have at least {limits.min_length} characters between the blanks at its ends")
        return text

    bounds = Field(
        min_length=limits.min_length,
        max_length=limits.max_length,
        description="blanks at its ends are not counted for the least length",
        json_schema_extra={"pattern": pattern},
    )
    return Annotated[str, bounds, AfterValidator(check)]


def start_of(services: Services, body: RootModel[Any]) -> altering.Start | None:
    """What the job of a checked body starts from, judged; None: from nothing. Call it while no connection is held."""
    submission: Submission = body.root
    if not altering.has_image(submission.input):
        return None
    model = MODELS[submission.model]
    able = routing.able(services.settings.backends, model.name, {"image": "one"})
    if submission.backend not in (AUTO, *able):
        said = f"The backend {submission.backend} can't alter images; {' and '.join(able)} can."
        raise invalid_field("#/backend", said)
    return altering.begin(services, model, submission.input)


def submit(tx: Connection, services: Services, body: RootModel[Any], start: altering.Start | None = None) -> Row[Any]:
    """Make the job that a checked body asks for, and that starts from what `start_of` said of it."""
    submission: Submission = body.root
    settings, input = services.settings, submission.input.model_dump() | ({} if start is None else start.said)
    choice = services.router.place(submission.model, submission.backend, input)
    assert choice is not None  # else the body would have been refused
    if "seed" in input and input["seed"] is None:
        # Drawn now, not by the backend: so every job can be made again.
        input["seed"] = secrets.randbelow(2**32)
    return life.submit(
        tx,
        project_id=g.project_id,
        model=submission.model,
        backend_asked=submission.backend,
        backend=choice.backend,
        reason=choice.reason,
        input=input,
        metadata=submission.metadata,
        sandbox=settings.is_sandbox(choice.backend),
        deadline_seconds=submission.deadline_seconds,
        max_wait_seconds=settings.max_wait_seconds,
        webhook=_whole_webhook(submission.webhook),
        request_id=g.request_id,
        starts_from=() if start is None else start.inputs,
    )


def _whole_webhook(asked: str | Webhook | None) -> dict[str, Any] | None:
    if isinstance(asked, str):
        return {"url": asked, "events": list(DEFAULT_EVENTS)}
    return None if asked is None else asked.model_dump()
