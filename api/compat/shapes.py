"""The vendor's call and its answers, as shapes: the calls made from the catalogue, with the vendor's own names."""

import re
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, RootModel, Tag, WithJsonSchema, create_model

from api.schemas import MAY_BE_FLOAT, STRICT
from api.submission import field_of
from shared.catalogue import MODELS, Model, Number


class Call(BaseModel):
    """One call: `data` holds what the model takes."""

    model_config = STRICT

    model: str
    data: BaseModel

    def as_submission(self) -> dict[str, Any]:
        """The body of POST /v1/jobs that asks for the same picture."""
        ours = {theirs: name for name, theirs in MODELS[self.model].vendor_names.items()}
        given = self.data.model_dump()
        return {"model": self.model, "input": {ours.get(name, name): value for name, value in given.items()}}


class Result(BaseModel):
    image_base64: str


class VendorPicture(BaseModel):
    """A picture in JSON, as the vendor sends those of some models."""

    success: Literal[True] = True
    errors: list[str] = Field([], max_length=0)
    result: Result
    messages: list[str] = Field([], max_length=0)


class VendorError(BaseModel):
    code: int
    message: str


class VendorProblem(BaseModel):
    """An error, as the vendor sends it."""

    success: Literal[False] = False
    errors: list[VendorError]
    result: dict[str, str] = Field({}, max_length=0)
    messages: list[str] = Field([], max_length=0)


#: The shapes of whole answers.
ANSWERS: tuple[type[BaseModel], ...] = (VendorPicture, VendorProblem)


@cache
def call_body(backends: tuple[str, ...]) -> type[RootModel[Any]]:
    """The shape of a call, for the models that one of these backends serves."""
    served = [model for model in MODELS.values() if not set(model.backends).isdisjoint(backends)]
    shapes = [Annotated[_shape(model), Tag(model.name)] for model in served]

    class VendorCall(RootModel[Any]):
        """A call of the vendor's API. `model` chooses which `data` is taken."""

        root: Annotated[Union[tuple(shapes)], Discriminator(_model_of)]  # type: ignore[valid-type]  # noqa: UP007

    return VendorCall


def _model_of(body: Any) -> str | None:
    name = body.get("model") if isinstance(body, dict) else body.model
    return name if isinstance(name, str) else None


def _shape(model: Model) -> type[Call]:
    name = re.sub(r"\W+", "_", model.name)
    fields: dict[str, Any] = {}
    for ours, limits in model.parameters.items():
        is_seed = ours == "seed" and isinstance(limits, Number)
        fields[model.vendor_names.get(ours, ours)] = _seed(limits) if is_seed else field_of(limits)
    data = create_model(f"VendorData_{name}", __config__=STRICT, **fields)
    return create_model(
        f"VendorCall_{name}",
        __base__=Call,
        model=(Literal[model.name], ...),  # type: ignore[arg-type]  # mypy knows no literals made at run time
        data=(data, ...),
    )


def _seed(limits: Any) -> tuple[Any, Any]:
    """The vendor takes a number and a numeric string: its own examples have `12345` and `'12345'`."""
    bounds = {"minimum": limits.minimum, "maximum": limits.maximum}
    described = {"anyOf": [{"type": "integer", **bounds}, {"type": "string", "pattern": "^-?[0-9]{1,20}$"}]}
    number = Annotated[int, Field(ge=limits.minimum, le=limits.maximum), MAY_BE_FLOAT, BeforeValidator(_number)]
    return Annotated[number, WithJsonSchema(described)] | None, None


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value) else value
