"""GET /v1/models."""

from dataclasses import replace
from decimal import Decimal

import pytest

from api.app import build
from api.services import Services
from shared.catalogue import DEFAULT_MODEL, MODELS
from tests.api.people import KEY, Caller, client_with


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here."""
    return sqlite_url


def test_the_catalogue_is_listed_with_limits_and_prices(api: Caller) -> None:
    data = api.get("/v1/models").json["data"]
    assert [model["id"] for model in data] == list(MODELS)
    sdxl = data[0]
    assert sdxl["default"] and sdxl["id"] == DEFAULT_MODEL and not any(model["default"] for model in data[1:])
    assert sdxl["price_usd"] == "0.008" and sdxl["backends"] == ["dataoorts"] and sdxl["sandbox"] is False
    width = next(parameter for parameter in sdxl["parameters"] if parameter["name"] == "width")
    assert width == {
        "name": "width",
        "type": "integer",
        "required": False,
        "default": 512,
        "minimum": 256,
        "maximum": 2048,
        "multiple_of": 8,
        "min_length": None,
        "max_length": None,
    }
    assert data[-1]["fixed_size"] == {"width": 1024, "height": 1024}


def test_the_operators_prices_and_the_sandbox_are_told(services: Services) -> None:
    settings = services.settings.model_copy(update={"prices": {DEFAULT_MODEL: Decimal("10.50")}, "sandbox": True})
    api = client_with(build(replace(services, settings=settings)), KEY)
    data = api.get("/v1/models").json["data"]
    assert data[0]["price_usd"] == "10.5" and data[1]["price_usd"] == "0.0011" and data[0]["sandbox"] is True
    assert api.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).json["sandbox"] is True
