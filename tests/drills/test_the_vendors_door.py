"""Promise: a program written for the vendor runs with URL and key changed, and its own repeats buy nothing twice."""

import base64
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
import requests
from PIL import Image as Pillow
from requests.adapters import HTTPAdapter
from urllib3.util import Retry, Timeout

from tests.drills.held import held
from tests.service import API_KEY, Service, eventually

pytestmark = pytest.mark.slow

HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
SPACECRAFT = {"model": "stabilityai/stable-diffusion-xl-base-1.0", "data": {"prompt": "futuristic spacecraft"}}


def post(running: Service, body: Any = SPACECRAFT) -> requests.Response:
    """The vendor's published sample for SDXL, with URL and key changed."""
    return requests.post(f"{running.url}/api/v1", headers=HEADERS, json=body, timeout=120)


def give_up_on(running: Service) -> None:
    """A client that hangs up when its job is there. Nobody may work who could draw it before."""
    client = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    client.request("POST", "/api/v1", json.dumps(SPACECRAFT), HEADERS)
    eventually("its job is there", lambda: running.count().total() == 1)
    client.close()


def test_the_published_samples_run_with_only_url_and_key_changed(running: Service, tmp_path: Path) -> None:
    running.start()
    url, output = f"{running.url}/api/v1", tmp_path / "output.png"

    response = requests.post(url, headers=HEADERS, json=SPACECRAFT)  # noqa: S113  as published
    with output.open("wb") as file:
        file.write(response.content)
    picture = Pillow.open(io.BytesIO(output.read_bytes()))
    assert (picture.format, picture.size, response.headers["Content-Type"]) == ("PNG", (512, 512), "image/png")
    assert running.image(response.headers["X-Job-Id"]) == response.content

    # SDXL's page itself sends `data=json.dumps(...)`.
    assert requests.post(url, headers=HEADERS, data=json.dumps(SPACECRAFT), timeout=60).status_code == 200

    payload = {
        "model": "black-forest-labs/flux-1-schnell",
        "data": {"prompt": "A tiny astronaut hatching from an egg on the moon", "steps": 8, "seed": "12345"},
    }
    response = requests.post(url, headers=HEADERS, json=payload, timeout=30)
    response.raise_for_status()
    assert response.headers.get("Content-Type", "").startswith("application/json")
    image_bytes = base64.b64decode(response.json().get("result", {}).get("image_base64"))
    picture = Pillow.open(io.BytesIO(image_bytes))
    assert (picture.format, picture.size) == ("JPEG", (1024, 1024))
    assert running.image(response.headers["X-Job-Id"]) == image_bytes


def test_a_client_that_repeats_by_itself_pays_once(running: Service) -> None:
    running.start("api", "worker-sweep")
    patience, has_time = Timeout(total=0.7), threading.Event()
    as_it_is: Any = patience  # requests takes one of urllib3's, and its types don't say so

    class Impatient(Retry):
        """Asks again when nothing came in time. Once its job is there it has time, and only then somebody draws."""

        def increment(self, *args: Any, **kwargs: Any) -> Self:
            if running.count().total():
                patience.total = 120
                has_time.set()
            return super().increment(*args, **kwargs)

    def ask() -> requests.Response:
        with requests.Session() as session:
            retry = Impatient(total=20, allowed_methods=None, status_forcelist=(429, 502, 503, 504), backoff_factor=0.5)
            session.mount("http://", HTTPAdapter(max_retries=retry))
            return session.post(f"{running.url}/api/v1", headers=HEADERS, json=SPACECRAFT, timeout=as_it_is)

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask)
        assert has_time.wait(60)
        running.start("worker-dataoorts")
        response = asked.result()
    assert response.status_code == 200 and response.headers["Idempotent-Replayed"] == "true"
    assert running.count() == {"succeeded": 1} and running.sandbox.calls()["calls"] == 1

    # It has its picture: the same request is a wish for another one.
    another = post(running)
    assert another.status_code == 200 and another.content != response.content
    assert running.count() == {"succeeded": 2} and running.sandbox.calls()["calls"] == 2


def test_a_picture_that_was_made_after_its_client_hung_up_waits_for_the_repeat(running_on_sqlite: Service) -> None:
    running = running_on_sqlite
    running.start("api", "worker-sweep")
    give_up_on(running)
    running.start("worker-dataoorts")
    assert running.all_ended(1) == {"succeeded": 1}
    response = post(running)
    assert response.status_code == 200 and running.sandbox.calls()["calls"] == 1


def test_a_repeat_after_the_api_was_killed_joins_the_job(running: Service) -> None:
    running.start()
    with ThreadPoolExecutor() as pool, held(running.sandbox):
        first = pool.submit(post, running)
        eventually("the vendor draws", lambda: running.sandbox.calls()["in_flight"] == 1)
        running.kill("api")
        with pytest.raises(requests.exceptions.ConnectionError):
            first.result()
        running.start("api")
    assert post(running).status_code == 200
    assert running.count() == {"succeeded": 1} and running.sandbox.calls()["calls"] == 1


def test_the_waits_end_when_the_api_is_asked_to_stop(running_on_sqlite: Service) -> None:
    running = running_on_sqlite
    running.start()
    with ThreadPoolExecutor() as pool, held(running.sandbox):
        first = pool.submit(post, running)
        eventually("the vendor draws", lambda: running.sandbox.calls()["in_flight"] == 1)
        assert running.terminate("api") == 0  # and nobody waited for the vendor
        response = first.result()
        assert response.status_code == 503 and response.json()["errors"][0]["code"] == 3008
        assert response.headers["Retry-After"]
        running.start("api")
    again = post(running)
    assert again.status_code == 200 and again.headers["X-Job-Id"] == response.headers["X-Job-Id"]
    assert running.sandbox.calls()["calls"] == 1
