"""Promise: a worker that is killed loses no job, and each call that nobody saw the end of is shown as unknown."""

import pytest

from tests.drills.held import held
from tests.service import Service, eventually

pytestmark = pytest.mark.slow


def test_fifty_jobs_in_flight_survive_the_kill_of_their_worker(running: Service) -> None:
    running.start()
    with held(running.sandbox):
        for _ in range(50):
            running.submit()
        eventually("fifty calls are in flight", lambda: running.sandbox.calls()["in_flight"] == 50)
        running.kill("worker-dataoorts")
    running.start("worker-dataoorts")

    assert running.all_ended(50) == {"succeeded": 50}
    assert set(running.images().values()) == {1} and len(running.images()) == 50
    assert running.outcomes() == {"unknown": 50, "succeeded": 50}
    # The sandbox counts what the vendor would bill for: one call each was cut off, and one each made the picture.
    assert running.sandbox.calls()["calls"] == 100
