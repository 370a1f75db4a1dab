"""What a picture starts from, as a client gives it: the fields of `input`, and what is made of them.

    input.image     base64, or the id of a job of the same project that has a picture
    input.mask      base64; white where the image may change
    input.strength  how far it may change

Both are judged as pictures from a vendor are, before anything is written and while no connection is held. What came
from a job of ours was judged when it came: it is copied, with what is known of it.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_serializer
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from api.errors import Refused, invalid_field
from api.job_object import read_job
from api.schemas import STRICT
from api.services import Services
from shared.catalogue import Model, Number
from shared.ids import is_id
from shared.inputs import Input, Name
from shared.inspector import InspectorAway
from shared.picture import Unfit
from shared.standing import TERMINAL
from shared.tables import Status

#: The largest body of a submission where images are taken: 18 MB of them, in base64. All that a body may hold passes
#: through the memory of a process several times, and hundreds of them may come at once.
MOST_BYTES = 24_000_000

STRENGTH = 0.75  # if none is given

#: After it a client may try again, in seconds.
RETRY_AFTER = "5"

_BASE64 = "[A-Za-z0-9+/]+={0,2}"
_DATA_URL = "data:image/[a-z0-9.+-]+;base64,"
_ANNOUNCED = re.compile(_DATA_URL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def _only_with_image(value: Any, info: ValidationInfo) -> Any:
    # An image that is wrong itself is told of alone: then it is not among the data at all.
    if value is not None and info.data.get("image", ...) is None:
        raise ValueError("is only taken together with an image")
    return value


class PlainInput(BaseModel):
    """The `input` of a model that no enabled backend can alter images with."""

    model_config = STRICT


class AlteringInput(BaseModel):
    """The `input` of a model that may start from an image. Without one, it is the same as a plain one."""

    model_config = ConfigDict(
        **STRICT,
        json_schema_extra={
            "if": {"properties": {"image": {"type": "null"}}},  # or there is none
            "then": {"properties": {"mask": {"type": "null"}, "strength": {"type": "null"}}},
        },
    )

    @model_serializer(mode="wrap")
    def _as_asked(self, dump: Callable[[BaseModel], dict[str, Any]]) -> dict[str, Any]:
        dumped = dump(self)
        if self.image is None:  # type: ignore[attr-defined]  # it stands among the fields that are made
            return {name: value for name, value in dumped.items() if name not in FIELDS}
        if dumped["strength"] is None:
            dumped["strength"] = STRENGTH
        # With an image, a side that is not given is the image's: no default, which would be another request.
        return {name: value for name, value in dumped.items() if name not in SIDES or name in self.model_fields_set}


FIELDS: dict[str, Any] = {
    "image": (
        Annotated[str, Field(json_schema_extra={"pattern": f"^(({_DATA_URL})?{_BASE64}|job_[0-9a-f]{{32}})$"})] | None,
        Field(
            None,
            description="what to alter: a PNG, JPEG or WEBP picture in base64, also as a data: URL; or the id of a job "
            "of your project that has a picture. Without width and height, the picture is as large as it is, rounded "
            "to the sizes that the model makes; with them, it is scaled to cover them, and what is over is cut off",
        ),
    ),
    "mask": (
        Annotated[
            Annotated[str, Field(json_schema_extra={"pattern": f"^({_DATA_URL})?{_BASE64}$"})] | None,
            AfterValidator(_only_with_image),
        ],
        Field(
            None,
            description="white where the image may change, black where it stays as it is: a picture like `image`, of "
            "the same size",
        ),
    ),
    "strength": (
        Annotated[Annotated[float, Field(gt=0, le=1)] | None, AfterValidator(_only_with_image)],
        Field(None, description=f"how far the image may change, more than 0 and at most 1; {STRENGTH} if not given"),
    ),
}
SIDES = ("width", "height")


@dataclass(frozen=True, slots=True)
class Shape:
    """What the `input` of a model has beside the model's own parameters."""

    base: type[BaseModel]
    fields: dict[str, Any]


def able(model: Model, enabled: Collection[str]) -> list[str]:
    """The enabled backends that can alter images with this model."""
    return [name for name in model.alters if name in enabled]


def shape_of(model: Model, models: Mapping[str, Model], enabled: Collection[str]) -> Shape:
    """For a model, where these backends are enabled. In place of an image that is not taken: who could."""
    if able(model, enabled):
        return Shape(AlteringInput, FIELDS)
    if model.alters:
        said = f"for {model.name} it needs the backend {' or '.join(model.alters)}, which is not enabled"
    else:
        others = [f"{each.name} on {' or '.join(on)} can" for each in models.values() if (on := able(each, enabled))]
        said = "; ".join([f"no backend alters images with {model.name}", *others])
    return Shape(PlainInput, {"image": _refused(f"no image is taken here: {said}")})


def _refused(said: str) -> tuple[Any, Any]:
    def refuse(value: object) -> None:
        raise PydanticCustomError("no_image_taken", "{said}", {"said": said})

    hidden = SkipJsonSchema()  # type: ignore[type-arg]  # to mypy it stands for the type that it hides
    return Annotated[Any, hidden, BeforeValidator(refuse)], Field(None, exclude=True)


def only_where_able(model: Model, backends: Collection[str]) -> dict[str, Any]:
    """For the schema of a submission: with an image, only some backends may be asked for. Nothing where all can."""
    on = able(model, backends)
    if not on or set(on) == set(backends):
        return {}
    has_one = {"properties": {"image": {"type": "string"}}, "required": ["image"]}
    return {
        "if": {"properties": {"input": has_one}, "required": ["input"]},
        "then": {"properties": {"backend": {"enum": ["auto", *on]}}},
    }


def has_image(input: BaseModel) -> bool:
    """Whether a checked input starts from an image."""
    return getattr(input, "image", None) is not None


@dataclass(frozen=True, slots=True)
class Start:
    """What a submission starts from, judged; and what its input says beside it."""

    inputs: tuple[Input, ...]
    said: dict[str, Any]


def begin(services: Services, model: Model, input: BaseModel) -> Start:
    """Read and judge what an input that has an image starts from. Raises Refused for what is not taken.

    The texts are taken out of the input, so that whoever waits for the end of his job does not keep them in memory.
    """
    given: Any = input  # its fields are made from the catalogue
    image, mask, strength = given.image, given.mask, given.strength
    given.image = given.mask = None
    is_job = image.startswith("job_")
    start = _of_job(services, image) if is_job else _judged(services, "image", image)
    width, height = size_of(model, input, start.width, start.height)
    said: dict[str, Any] = {"image": start.description(), "strength": STRENGTH if strength is None else strength}
    said |= {"width": width, "height": height}
    if is_job:
        said["image"]["job"] = image
    if mask is None:
        return Start((start,), said)
    covers = _judged(services, "mask", mask)
    if (covers.width, covers.height) != (start.width, start.height):
        size, wanted = (f"{each.width}x{each.height}" for each in (covers, start))
        raise invalid_field("#/input/mask", f"Must be as large as the image, which is {wanted}; it is {size}.")
    return Start((start, covers), said | {"mask": covers.description()})


def size_of(model: Model, input: BaseModel, width: int, height: int) -> tuple[int, int]:
    """The size of a picture that is made from an image of this size. One side alone keeps the image's proportions."""
    given: Any = input
    asked = [getattr(given, side) if side in given.model_fields_set else None for side in SIDES]
    scale = asked[0] / width if asked[0] else asked[1] / height if asked[1] else 1.0
    made = []
    for side, of_image, of_client in zip(SIDES, (width, height), asked, strict=True):
        limits = model.parameters[side]
        assert isinstance(limits, Number)
        step = limits.multiple_of or 1
        made.append(of_client or round(of_image * scale / step) * step)
        if not limits.minimum <= made[-1] <= limits.maximum:
            raise invalid_field(
                "#/input/image",
                f"Is {width}x{height}, which would give a {side} of {made[-1]}, and {limits.minimum} to "
                f"{limits.maximum} are made: give width and height, and it is scaled and cut to them.",
            )
    return made[0], made[1]


def _of_job(services: Services, job_id: str) -> Input:
    """The picture of an earlier job. Unknown, malformed and another project's: the same, as everywhere."""
    where = "#/input/image"
    row = None
    if is_id("job", job_id):
        with services.database.read() as connection:
            row = read_job(connection, job_id)
    if row is None:
        raise invalid_field(where, "There is no such job that this key may see.")
    if row.status not in TERMINAL:
        raise invalid_field(where, f"This job is {row.status}: wait until it has succeeded.")
    if row.status != Status.succeeded:
        raise invalid_field(where, f"This job is {row.status}: it has no image.")
    data = None if row.image_attempt is None else services.images.get(job_id, row.image_attempt)
    if data is None:
        raise invalid_field(where, "The image of this job was removed.")
    # As its pixels are: what a model made is never to be turned.
    return Input("image", row.image_content_type, row.image_width, row.image_height, row.image_sha256, data)


def _judged(services: Services, name: Name, text: str) -> Input:
    where = f"#/input/{name}"
    try:
        data = _decoded(name, text)
        facts = services.inspector.inspect(data)
    except InspectorAway:
        raise Refused(
            "not_judged", "Nothing was accepted. Try again in a few seconds.", headers={"Retry-After": RETRY_AFTER}
        ) from None
    except Unfit as unfit:
        said = str(unfit).rstrip(".")
        raise invalid_field(where, f"{said[0].upper()}{said[1:]}.") from None
    if facts.turned is None:
        raise invalid_field(where, "Its EXIF data can't be read: send it without them.")
    width, height = (facts.height, facts.width) if facts.turned else (facts.width, facts.height)
    return Input(name, facts.content_type, width, height, hashlib.sha256(data).hexdigest(), data)


def _decoded(name: Name, text: str) -> bytes:
    """The bytes that a text stands for. Whatever they are announced as, the decoder says what they are."""
    where = f"#/input/{name}"
    if announced := _ANNOUNCED.match(text):
        text = text[announced.end() :]
    elif text.startswith("data:"):
        raise invalid_field(where, "A data: URL must begin with data:image/TYPE;base64, and nothing between.")
    elif _URL.match(text):
        raise invalid_field(where, "No URL is fetched: send the picture itself, in base64.")
    if not text:
        raise invalid_field(where, "Is empty.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # also for what is not ASCII
        raise invalid_field(where, "Is not base64 (RFC 4648, section 4, without line breaks).") from None
