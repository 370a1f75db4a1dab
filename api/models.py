"""The models that can be asked for, with their limits and prices."""

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from api import altering
from api.openapi import KEY, answers
from api.schemas import Model, ModelList, ModelParameter, ModelSize, NoQuery
from api.services import Services
from shared import catalogue
from shared.settings import Settings


def routes(services: Services) -> APIBlueprint:
    blueprint = APIBlueprint("models", __name__, url_prefix="/v1", abp_tags=[Tag(name="models")], abp_security=KEY)
    settings = services.settings
    body = ModelList(data=[_show(model, settings) for model in catalogue.MODELS.values()]).model_dump_json()

    @blueprint.get(
        "/models",
        operation_id="listModels",
        summary="List the models",
        responses=answers({200: ModelList}, refusals=(401, 406, 422)),
    )
    def list_models(query: NoQuery) -> Response:
        return Response(body, content_type="application/json")

    return blueprint


def _show(model: catalogue.Model, settings: Settings) -> Model:
    size = model.fixed_size
    backends = [backend for backend in settings.backends if backend in model.backends]
    return Model(
        id=model.name,
        object="model",
        title=model.title,
        default=model.name == catalogue.DEFAULT_MODEL,
        backends=backends,
        image_to_image=altering.able(model, settings.backends),
        sandbox=any(settings.is_sandbox(backend) for backend in backends),
        price_usd=f"{catalogue.price_usd(model.name, settings.prices).normalize():f}",
        fixed_size=None if size is None else ModelSize(width=size[0], height=size[1]),
        parameters=[_parameter(name, limits) for name, limits in model.parameters.items()],
    )


def _parameter(name: str, limits: catalogue.Text | catalogue.Number) -> ModelParameter:
    if isinstance(limits, catalogue.Text):
        return ModelParameter(
            name=name,
            type="string",
            required=limits.required,
            min_length=limits.min_length,
            max_length=limits.max_length,
        )
    return ModelParameter(
        name=name,
        type="integer" if limits.whole else "number",
        required=False,
        default=limits.default,
        minimum=limits.minimum,
        maximum=limits.maximum,
        multiple_of=limits.multiple_of,
    )
