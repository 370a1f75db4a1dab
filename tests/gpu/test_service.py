"""The whole service without a vendor: from a prompt over REST to a picture in the database, drawn on this machine."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow
from sqlalchemy import delete, select

from shared.tables import attempts, events, images, inputs
from shared.tables import jobs as table
from tests.altered import expect_images_are_altered
from tests.service import Service, eventually, service

#: Takes a quarter of a minute on a slow machine: it can be watched or killed in the middle by a test that stands still
#: for a while itself.
LONG = {"width": 896, "height": 896, "num_steps": 20}
#: Takes half a minute alone, and shares its steps with one more of its size: for what is canceled in the middle.
LONGEST = {"width": 1024, "height": 1024, "num_steps": 20}


@contextmanager
def _drawing(folder: Path, database_url: str, model: Path) -> Iterator[Service]:
    settings = {
        "DARKROOM_BACKENDS": "diffusers",
        "DARKROOM_GPU_MODEL": str(model),
        "DARKROOM_GPU_DEVICE": "cpu",
        # A worker that stands still for half of it between claim and call gives the job back: one attempt more.
        "DARKROOM_LEASE_SECONDS": "20",
        "DARKROOM_SANDBOX": "",
        "DATAOORTS_API_KEY": "",
    }
    with service(folder, database_url, **settings) as running:
        running.start()
        eventually("the model is loaded", lambda: _checks(running)["workers"] == "ok")
        yield running
        assert running.sandbox.calls()["calls"] == 0, "nobody was called"


@pytest.fixture(scope="module")
def service_on_sqlite(
    migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path
) -> Iterator[Service]:
    """One for all tests of this file: reading torch takes longer than most of them."""
    folder = tmp_path_factory.mktemp("drawing")
    database = shutil.copy(migrated_sqlite, folder / "darkroom.db")
    with _drawing(folder, f"sqlite:///{database}", tiny_sdxl) as running:
        yield running


@pytest.fixture
def running(service_on_sqlite: Service) -> Service:
    """With no job of an earlier test."""
    with service_on_sqlite.database.write() as tx:
        for emptied in (attempts, images, inputs, events, table):
            tx.execute(delete(emptied))
    return service_on_sqlite


def _checks(running: Service) -> dict[str, str]:
    return dict(running.http.get(f"{running.url}/readyz", timeout=60).json()["checks"])


def _attempts(running: Service) -> list[tuple[str, str, str]]:
    with running.database.read() as connection:
        query = select(attempts.c.backend, attempts.c.outcome, attempts.c.billed).order_by(attempts.c.started_at)
        return [(row.backend, row.outcome, row.billed) for row in connection.execute(query)]


def _was_begun(running: Service, job_id: str) -> bool:
    """It is being drawn, or was, to its end."""
    job = running.job(job_id)
    return job["progress"] is not None or job["status"] == "succeeded"


def test_a_prompt_becomes_a_picture_without_a_vendor(running: Service) -> None:
    job_id = running.submit("futuristic spacecraft", input={"width": 320, "height": 256, "num_steps": 6})
    assert running.all_ended(1) == {"succeeded": 1}
    job = running.job(job_id)
    assert (job["attempts"], job["cost_usd"], job["sandbox"], job["progress"]) == (1, "0", False, None)
    picture = Pillow.open(io.BytesIO(running.image(job_id)))
    assert (picture.format, picture.size) == ("PNG", (320, 256))
    assert _attempts(running) == [("diffusers", "succeeded", "yes")]


def test_it_does_so_on_postgresql_too(tmp_path: Path, postgresql_url: str, tiny_sdxl: Path) -> None:
    with _drawing(tmp_path, postgresql_url, tiny_sdxl) as running:
        sizes = [256, 320, 256]
        for size in sizes:
            running.submit(input={"width": size, "height": size, "num_steps": 4})
        assert running.all_ended(3) == {"succeeded": 3}


def test_the_same_seed_is_the_same_picture(running: Service) -> None:
    first = running.submit(input={"num_steps": 5})
    running.all_ended(1)
    second = running.submit(input={"num_steps": 5})
    running.all_ended(2)
    one, other = (Pillow.open(io.BytesIO(running.image(job_id))) for job_id in (first, second))
    assert one.tobytes() == other.tobytes()


def test_images_are_altered_and_outside_of_the_mask_every_pixel_is_kept(running: Service) -> None:
    expect_images_are_altered(running)


def test_a_picture_says_in_its_metadata_which_job_made_it_and_with_what(running: Service) -> None:
    job_id = running.submit("a fox", input={"num_steps": 2, "seed": 7, "width": 256, "height": 256})
    running.all_ended(1)
    texts = Pillow.open(io.BytesIO(running.image(job_id))).info
    said = json.loads(texts["darkroom"])
    assert (said["job_id"], said["backend"], said["model"]) == (job_id, "diffusers", running.job(job_id)["model"])
    assert said["input"] == running.job(job_id)["input"] and len(said["revision"]) == 16
    assert texts["parameters"].splitlines()[0] == "a fox" and "Seed: 7, Size: 256x256" in texts["parameters"]


def test_a_stream_shows_a_picture_in_the_making(running: Service) -> None:
    job_id = running.submit(input=LONG)
    told: list[dict[str, Any]] = []
    stream = {"Accept": "text/event-stream"}
    url = f"{running.url}/v1/jobs/{job_id}/events"
    with running.http.get(url, headers=stream, stream=True, timeout=60) as answer:
        data = (line.removeprefix(b"data: ") for line in answer.iter_lines() if line.startswith(b"data: "))
        told.extend(json.loads(line) for line in data)
    types = [message["type"] for message in told]
    assert types[0] == "snapshot" and types[-1] == "job.succeeded"
    hints = [message["data"] for message in told if message["type"] == "job.progress"]
    steps = [hint["progress"]["step"] for hint in hints]
    assert steps and steps == sorted(steps) and {hint["progress"]["steps"] for hint in hints} == {20}
    previews = [hint["preview"] for hint in hints if hint["preview"]]
    assert previews and {preview["content_type"] for preview in previews} == {"image/jpeg"}


def test_a_canceled_job_stops_in_the_middle_and_its_neighbour_goes_on(running: Service) -> None:
    unwanted, wanted = running.submit(input=LONGEST), running.submit(input=LONGEST | {"num_steps": 4})
    eventually("both are being drawn", lambda: _was_begun(running, unwanted) and _was_begun(running, wanted))
    answer = running.http.post(f"{running.url}/v1/jobs/{unwanted}/cancel", timeout=30)
    assert answer.json()["status"] == "canceled"
    assert running.all_ended(2) == {"succeeded": 1, "canceled": 1}
    eventually("its attempt is closed", lambda: "running" not in running.outcomes())
    assert Counter(_attempts(running)) == Counter(
        [("diffusers", "canceled", "no"), ("diffusers", "succeeded", "yes")]
    ), "stopped, and not drawn to its end"


def test_a_worker_that_is_killed_in_the_middle_costs_no_job_its_end(running: Service) -> None:
    sizes = [256, 320, 256, 256, 320, 256]
    jobs = [running.submit(input={"width": size, "height": size, "seed": seed}) for seed, size in enumerate(sizes)]
    jobs += [running.submit(input=LONG)]
    eventually("the last and longest is in hand too", lambda: running.job(jobs[-1])["status"] == "running")
    running.kill("worker-gpu")
    running.start("worker-gpu")
    assert running.all_ended(len(jobs)) == {"succeeded": len(jobs)}
    assert running.images() == Counter(jobs), "one picture each"
    outcomes = Counter(outcome for _, outcome, _ in _attempts(running))
    assert outcomes["succeeded"] == len(jobs) and outcomes["unknown"] >= 1 and set(outcomes) == {"succeeded", "unknown"}
