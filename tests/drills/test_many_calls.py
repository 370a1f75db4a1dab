"""Promise: one worker process holds hundreds of calls in flight."""

import pytest

from tests.service import Service

pytestmark = pytest.mark.slow


def test_five_hundred_jobs_go_through_one_worker_two_hundred_at_a_time(running: Service) -> None:
    running.start("api", "worker-sweep")
    for _ in range(500):
        running.submit()
    running.sandbox.trouble(delay=10, calls=200)  # long enough that all of them are there before the first is done
    running.start("worker-dataoorts")
    assert running.all_ended(500) == {"succeeded": 500}
    calls = running.sandbox.calls()
    assert (calls["calls"], calls["most_in_flight"]) == (500, 200)
