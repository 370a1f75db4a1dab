"""The stand-in for a machine with a GPU: what it says on the wire, and that it draws one picture at a time."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from sandbox.server import Sandbox

SMALL = {"prompt": "a lake", "width": 256, "height": 256, "seed": 1, "steps": 4}


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """One for each test: what a box is at is one thing for everybody who asks."""
    with Sandbox() as sandbox:
        yield sandbox


def post(sandbox: Sandbox, path: str = "txt2img", **body: Any) -> requests.Response:
    return requests.post(f"{sandbox.box_url}/sdapi/v1/{path}", json=SMALL | body, timeout=60, allow_redirects=False)


def progress(sandbox: Sandbox, **query: str) -> Any:
    return requests.get(f"{sandbox.box_url}/sdapi/v1/progress", params=query, timeout=60).json()


def picture(answer: requests.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["images"][0], validate=True)


def png(image: Image.Image) -> str:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def test_the_same_call_gives_the_same_bytes_and_tells_what_it_used(sandbox: Sandbox) -> None:
    first, second = post(sandbox), post(sandbox)
    assert picture(first) == picture(second) != picture(post(sandbox, seed=2))
    assert Image.open(io.BytesIO(picture(first))).size == (256, 256)
    info = json.loads(first.json()["info"])
    assert (info["seed"], info["sd_model_name"], info["sd_model_hash"]) == (1, "sd_xl_base_1.0", "31e35c80fc")
    books = requests.get(f"{sandbox.box_url}/sandbox/box/calls", timeout=60).json()
    assert (books["calls"], books["pictures"], books["most_in_flight"]) == (3, 3, 1)
    assert sandbox.calls()["calls"] == 0, "the vendor's books are its own"


def test_a_picture_that_starts_from_another_keeps_the_more_of_it_the_less_strength_there_is(sandbox: Sandbox) -> None:
    start = Image.new("RGB", (256, 256), (200, 30, 30))

    def distance(strength: float) -> float:
        answer = post(sandbox, "img2img", init_images=[png(start)], denoising_strength=strength)
        made = np.asarray(Image.open(io.BytesIO(picture(answer))).convert("RGB"), float)
        return float(np.abs(made[:200] - np.asarray(start, float)[:200]).mean())

    assert distance(0.1) < distance(0.5) < distance(1.0)


def test_what_a_mask_forbids_to_change_changes_a_little_as_with_a_real_one(sandbox: Sandbox) -> None:
    start, mask = Image.new("RGB", (256, 256), (200, 30, 30)), Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 224, 224))
    answer = post(sandbox, "img2img", init_images=[png(start)], mask=png(mask), denoising_strength=0.9)
    made = np.asarray(Image.open(io.BytesIO(picture(answer))).convert("RGB"), int)
    outside = np.abs(made[:64] - np.asarray(start, int)[:64])
    assert 0 < outside.max() <= 3
    assert np.abs(made[64:224, 64:224] - (200, 30, 30)).max() > 30


def test_it_draws_one_at_a_time_and_tells_which(sandbox: Sandbox) -> None:
    sandbox.box.pace = 0.5  # and so many steps that it is not done before it has been looked at
    assert progress(sandbox)["state"]["job_count"] == 0
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(post, sandbox, seed=seed, steps=150) for seed in (1, 2)]
        sandbox.box.books.wait_until(lambda books: books["in_flight"] == 2, 60)
        while (seen := progress(sandbox))["state"]["sampling_step"] == 0:
            pass
        blind = progress(sandbox, skip_current_image="true")
        sandbox.box.pace = 0.0
        assert picture(calls[0].result()) != picture(calls[1].result())
    assert (seen["state"]["job"], seen["state"]["sampling_steps"]) == ("scripts_txt2img", 150)
    assert 0 < seen["progress"] < 1 and base64.b64decode(seen["current_image"])[1:4] == b"PNG"
    assert blind["state"]["job"] and blind["current_image"] is None
    assert progress(sandbox)["state"]["job"] == ""


def test_what_is_interrupted_comes_back_half_drawn_and_the_next_is_whole(sandbox: Sandbox) -> None:
    whole = picture(post(sandbox, steps=150))
    sandbox.box.pace = 0.5  # more than a minute for all of them
    with ThreadPoolExecutor() as pool:
        call = pool.submit(post, sandbox, steps=150)
        while not ((state := progress(sandbox)["state"])["job"] and state["sampling_step"]):
            pass
        assert requests.post(f"{sandbox.box_url}/sdapi/v1/interrupt", timeout=60).json() == {}
        half = picture(call.result())
    assert half != whole and Image.open(io.BytesIO(half)).size == (256, 256)
    state = progress(sandbox)["state"]
    assert state["interrupted"] is True and state["job"] == ""
    sandbox.box.pace = 0
    assert picture(post(sandbox, steps=150)) == whole
    assert progress(sandbox)["state"]["interrupted"] is False


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"steps": "many"}, 422, "steps"),
        ({"width": 7}, 422, "width"),
        ({"sampler_name": "Nobody's"}, 404, "Sampler not found"),
        ({"prompt": "[sandbox:nothing]"}, 422, "unknown trouble"),
        ({"prompt": "[sandbox:out_of_memory]"}, 500, "OutOfMemoryError"),
        ({"prompt": "[sandbox:status=503,retry_after=7]"}, 503, "Service Unavailable"),
    ],
)
def test_what_it_refuses_has_its_status_and_words(
    sandbox: Sandbox, body: dict[str, Any], status: int, says: str
) -> None:
    answer = post(sandbox, **body)
    assert answer.status_code == status and says in answer.text


def test_an_image_that_is_none_or_missing_is_refused(sandbox: Sandbox) -> None:
    assert post(sandbox, "img2img").status_code == 404
    assert "Invalid encoded image" in post(sandbox, "img2img", init_images=["????"]).text


def test_with_a_password_nothing_goes_without_it(sandbox: Sandbox) -> None:
    sandbox.box.auth = "me:secret"
    assert post(sandbox).status_code == 401
    url = f"{sandbox.box_url}/sdapi/v1/sd-models"
    assert requests.get(url, auth=("me", "secret"), timeout=60).json()[0]["model_name"] == "sd_xl_base_1.0"


def test_another_checkpoint_is_drawn_with_if_it_has_it_and_else_silently_not(sandbox: Sandbox) -> None:
    def model(wanted: str) -> str:
        answer = post(sandbox, override_settings={"sd_model_checkpoint": wanted})
        return str(json.loads(answer.json()["info"])["sd_model_name"])

    assert model("sd_xl_turbo_1.0.safetensors [e869ac7d69]") == "sd_xl_turbo_1.0"
    assert model("nobody's") == "sd_xl_base_1.0"


def test_it_stops_while_it_draws(sandbox: Sandbox) -> None:
    sandbox.box.pace = 60
    with ThreadPoolExecutor() as pool:
        call = pool.submit(post, sandbox)
        sandbox.box.books.wait_until(lambda books: books["in_flight"] == 1, 60)
        stopping = threading.Thread(target=sandbox.stop)
        stopping.start()
        with pytest.raises(requests.ConnectionError):  # and not that it gave up waiting
            call.result(120)
        stopping.join()
