"""The vendor's format: what it takes, what it answers, how it refuses."""

import base64
import http.client
import io
import json
from typing import Any

import pytest
import requests
from PIL import Image

from sandbox.server import Sandbox
from tests.sandbox.calling import FLUX, KEY, SDXL, SMALL, call


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def refused(answer: requests.Response, status: int, code: int) -> str:
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json()
    assert (body["success"], body["result"], body["messages"]) == (False, {}, [])
    (error,) = body["errors"]
    assert error["code"] == code
    return str(error["message"])


def test_the_vendors_published_sample_gives_a_picture(sandbox: Sandbox) -> None:
    url = sandbox.url
    headers = {"Authorization": "Bearer YOUR_API_KEY", "Content-Type": "application/json"}
    data = {"model": SDXL, "data": {"prompt": "futuristic spacecraft"}}
    response = requests.post(url, headers=headers, data=json.dumps(data), timeout=60)
    response.raise_for_status()
    assert response.headers["Content-Type"] == "image/png"
    image = opened(response.content)
    assert (image.format, image.size) == ("PNG", (512, 512))
    assert len(image.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 1000  # a picture, not a plain sheet


def test_flux_answers_json_with_a_jpeg_of_its_own_size(sandbox: Sandbox) -> None:
    body = {"model": FLUX, "data": {"prompt": "a lake", "steps": 4, "seed": 3, "width": 256}}
    answer = requests.post(sandbox.url, json=body, headers=KEY, timeout=60)
    assert answer.headers["Content-Type"] == "application/json"
    image = opened(base64.b64decode(answer.json()["result"]["image_base64"]))
    assert (image.format, image.size) == ("JPEG", (1024, 1024))


@pytest.mark.parametrize("model", ["bytedance/stable-diffusion-xl-lightning", "lykon/dreamshaper-8-lcm"])
def test_the_other_models_answer_raw_png(sandbox: Sandbox, model: str) -> None:
    assert opened(call(sandbox, model).content).format == "PNG"


def test_without_a_seed_two_pictures_differ(sandbox: Sandbox) -> None:
    body = {"model": SDXL, "data": {key: value for key, value in SMALL.items() if key != "seed"}}
    first, second = (requests.post(sandbox.url, json=body, headers=KEY, timeout=60).content for _ in range(2))
    assert first != second


def test_dreamshaper_takes_no_seed_so_pictures_differ(sandbox: Sandbox) -> None:
    first, second = (call(sandbox, "lykon/dreamshaper-8-lcm", seed=5).content for _ in range(2))
    assert first != second


def test_a_seed_may_be_a_numeric_string(sandbox: Sandbox) -> None:
    assert call(sandbox, seed="7").content == call(sandbox, seed=7).content


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, {"Authorization": "Basic abc"}])
def test_a_missing_or_empty_key_is_refused(sandbox: Sandbox, headers: dict[str, str]) -> None:
    answer = requests.post(sandbox.url, json={"model": SDXL, "data": SMALL}, headers=headers, timeout=60)
    assert refused(answer, 401, 10000) == "Authentication error"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"num_steps": 21}, "'/num_steps' must be <= 20"),
        ({"num_steps": 0}, "'/num_steps' must be >= 1"),
        ({"width": 255}, "'/width' must be >= 256"),
        ({"height": 2049}, "'/height' must be <= 2048"),
        ({"height": "512"}, "Type mismatch of '/height', 'integer' not in 'string'"),
        ({"width": 512.5}, "Type mismatch of '/width', 'integer' not in 'number'"),
        ({"width": True}, "Type mismatch of '/width', 'integer' not in 'boolean'"),
        ({"prompt": "x"}, "Length of '/prompt' must be >= 2"),
        ({"prompt": "x" * 2049}, "Length of '/prompt' must be <= 2048"),
        ({"prompt": 5}, "Type mismatch of '/prompt'"),
        ({"negative_prompt": None}, "Type mismatch of '/negative_prompt', 'string' not in 'null'"),
        ({"guidance": "high"}, "Type mismatch of '/guidance', 'number' not in 'string'"),
        ({"seed": "abc"}, "Type mismatch of '/seed'"),
        ({"seed": 2**64}, "'/seed' must be <="),
    ],
)
def test_a_bad_parameter_is_refused_and_named(sandbox: Sandbox, data: dict[str, Any], complaint: str) -> None:
    message = refused(call(sandbox, **data), 400, 5006)
    assert message.startswith("AiError: Bad input: Error: ")
    assert complaint in message


def test_flux_takes_at_most_eight_steps(sandbox: Sandbox) -> None:
    assert "'/steps' must be <= 8" in refused(call(sandbox, FLUX, steps=9), 400, 5006)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"model": "x"}', b"{}"])
def test_a_body_that_is_no_call_is_refused(sandbox: Sandbox, body: bytes) -> None:
    refused(requests.post(sandbox.url, data=body, headers=KEY, timeout=60), 400, 5006)


def test_a_missing_prompt_is_refused(sandbox: Sandbox) -> None:
    answer = requests.post(sandbox.url, json={"model": SDXL, "data": {}}, headers=KEY, timeout=60)
    assert "'prompt'" in refused(answer, 400, 5006)


def test_an_unknown_model_is_refused(sandbox: Sandbox) -> None:
    assert "nobody/nothing" in refused(call(sandbox, "nobody/nothing"), 400, 5007)


def test_a_lone_surrogate_in_the_prompt_is_drawn_and_counted(sandbox: Sandbox) -> None:
    """JSON can carry half a character, which UTF-8 cannot."""
    assert opened(call(sandbox, prompt="a \ud800 lake").content).size == (256, 256)
    assert call(sandbox, prompt="a \ud800 lake [sandbox:status=500,message=\ud800]").status_code == 500
    books = requests.get(sandbox.url.removesuffix("/api/v1") + "/sandbox/calls", timeout=60).json()
    assert books["by_prompt"]["a \ud800 lake"] == 1


def test_parameters_at_the_very_limits_are_taken(sandbox: Sandbox) -> None:
    answer = call(sandbox, prompt="x" * 2048, negative_prompt="y" * 2048, width=2048, height=256, num_steps=1)
    assert opened(answer.content).size == (2048, 256)


def test_get_is_not_allowed_on_the_call_route(sandbox: Sandbox) -> None:
    answer = requests.get(sandbox.url, timeout=60)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.json()["success"] is False


def test_unknown_routes_are_not_found(sandbox: Sandbox) -> None:
    answer = requests.get(sandbox.url + "/other", timeout=60)
    assert (answer.status_code, answer.json()["success"]) == (404, False)


def test_one_connection_carries_many_calls(sandbox: Sandbox) -> None:
    connection = http.client.HTTPConnection(sandbox.url.split("/")[2], timeout=60)
    connection.connect()
    socket = connection.sock
    for _ in range(5):
        connection.request("POST", "/api/v1", json.dumps({"model": SDXL, "data": SMALL}), KEY)
        assert opened(connection.getresponse().read()).size == (256, 256)
        assert connection.sock is socket
    connection.close()
