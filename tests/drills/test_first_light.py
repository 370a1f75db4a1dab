"""From a prompt over REST to a picture in the database, through every process, on both databases."""

import io

import pytest
from PIL import Image as Pillow

from tests.drills.held import held
from tests.service import Service, eventually

pytestmark = pytest.mark.slow


def test_a_prompt_becomes_a_picture(running: Service) -> None:
    running.start()
    job_id = running.submit("futuristic spacecraft", input={"width": 320, "height": 256})
    assert running.all_ended(1) == {"succeeded": 1}
    job = running.job(job_id)
    assert (job["status"], job["attempts"], job["sandbox"], job["cost_usd"]) == ("succeeded", 1, True, "0.008")
    data = running.image(job_id)
    picture = Pillow.open(io.BytesIO(data))
    assert (picture.format, picture.size) == ("PNG", (320, 256))
    assert job["image"]["bytes"] == len(data)
    assert running.sandbox.calls()["calls"] == 1


def test_a_job_whose_every_ticket_was_lost_is_found_by_the_sweep(running_on_sqlite: Service) -> None:
    running = running_on_sqlite
    running.start("api", "worker-sweep")
    running.submit()
    running.redis.client().flushall()
    running.start("worker-dataoorts")
    assert running.all_ended(1) == {"succeeded": 1}


def test_a_vendor_in_trouble_is_tried_again_until_it_is_well(running_on_sqlite: Service) -> None:
    running = running_on_sqlite
    running.start()
    running.sandbox.trouble(status=503, calls=1)
    job_id = running.submit()
    assert running.all_ended(1) == {"succeeded": 1}
    job = running.job(job_id)
    assert job["attempts"] == 2 and job["cost_usd"] == "0.008"


def test_a_worker_that_is_asked_to_stop_finishes_what_it_has_and_leaves_the_rest(running_on_sqlite: Service) -> None:
    running = running_on_sqlite
    running.start()
    with held(running.sandbox):
        for _ in range(5):
            running.submit()
        eventually("five calls are in flight", lambda: running.sandbox.calls()["in_flight"] == 5)
        worker = running.processes.pop("worker-dataoorts")
        worker.terminate()
        eventually("it is about to end", lambda: "shutdown" in running.log("worker-dataoorts"))
    assert worker.wait(180) == 0
    assert running.count() == {"succeeded": 5}
    assert running.sandbox.calls()["calls"] == 5
