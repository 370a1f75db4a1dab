"""Promise: one worker process holds hundreds of calls in flight."""

import pytest

from tests.drills.held import held
from tests.service import Service, eventually

pytestmark = pytest.mark.slow


def test_five_hundred_jobs_go_through_one_worker_two_hundred_at_a_time(running: Service) -> None:
    running.start("api", "worker-sweep")
    for _ in range(500):
        running.submit()
    with held(running.sandbox):
        running.start("worker-dataoorts")
        eventually("two hundred calls are in flight", lambda: running.sandbox.calls()["in_flight"] == 200)
    assert running.all_ended(500) == {"succeeded": 500}
    calls = running.sandbox.calls()
    assert (calls["calls"], calls["most_in_flight"]) == (500, 200)
