"""The whole service on the GPU of another machine: its server is the sandbox's box, on a socket of its own."""

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.altered import expect_images_are_altered
from tests.drills.conftest import LEASE_SECONDS
from tests.service import eventually, service

pytestmark = pytest.mark.slow


def test_a_prompt_becomes_a_picture_drawn_elsewhere_and_a_cancel_stops_it_there(
    tmp_path: Path, database_url: str
) -> None:
    environ = {"DARKROOM_BACKENDS": "automatic1111", "DARKROOM_SANDBOX": "", "DATAOORTS_API_KEY": ""}
    with service(tmp_path, database_url, DARKROOM_LEASE_SECONDS=LEASE_SECONDS, **environ) as running:
        line = running._lines["worker-automatic1111"]
        running._lines["worker-automatic1111"] = line.replace("worker.app", "tests.drills.patient_worker")
        running.start()
        box = running.sandbox.box
        first = running.submit("a lighthouse at dusk")
        assert running.all_ended(1) == {"succeeded": 1}
        job = running.job(first)
        assert (job["attempts"], job["cost_usd"], job["sandbox"]) == (1, "0", True)
        assert job["warnings"] == []
        assert Image.open(io.BytesIO(running.image(first))).size == (256, 256)

        box.pace = 60  # so it does not end by itself
        second = running.submit("a red fox", input={"seed": 8})
        progress = eventually("it tells how far it is", lambda: running.job(second)["progress"])
        assert progress["steps"] == 20 and 0 <= progress["fraction"] < 1
        running.http.post(f"{running.url}/v1/jobs/{second}/cancel", timeout=30)
        assert running.job(second)["status"] == "canceled"
        eventually("the box is free", lambda: box.activity.job == "")
        assert box.interrupts == 1

        box.pace = 0.0
        running.sandbox.trouble(out_of_memory=True, calls=1)
        third = running.submit("a lake", input={"seed": 9})
        eventually("it is drawn after all", lambda: running.job(third)["status"] == "succeeded")
        assert running.job(third)["attempts"] == 2
        assert running.outcomes() == {"succeeded": 2, "canceled": 1, "failed": 1}
        assert box.books.read()["pictures"] == 2 and running.sandbox.calls()["calls"] == 0, "no vendor was called"


def test_images_are_altered_there_and_every_pixel_outside_of_the_mask_is_kept(
    tmp_path: Path, database_url: str
) -> None:
    environ = {"DARKROOM_BACKENDS": "automatic1111", "DARKROOM_LEASE_SECONDS": LEASE_SECONDS}
    with service(tmp_path, database_url, **environ) as running:
        running.start()
        expect_images_are_altered(running)


def test_a_box_that_is_switched_off_costs_no_job_an_attempt(tmp_path: Path, sqlite_url: str) -> None:
    environ = {"DARKROOM_BACKENDS": "automatic1111", "DARKROOM_MAX_ATTEMPTS": "1"}
    with service(tmp_path, sqlite_url, **environ) as running:
        running.sandbox.trouble(status=503)
        running.start()
        job_id = running.submit("a red fox")
        eventually("it was tried twice", lambda: running.outcomes()["failed"] >= 2)
        running.sandbox.clear()
        assert running.all_ended(1) == {"succeeded": 1}
        assert running.job(job_id)["cost_usd"] == "0"
