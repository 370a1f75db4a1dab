"""Promise: whoever is asked to end twice, or killed while it ends, loses nothing and pays nothing twice in silence."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.drills.held import held
from tests.service import Service, eventually

pytestmark = pytest.mark.slow

JOBS = 20


@contextmanager
def calls_in_flight(running: Service) -> Iterator[None]:
    """While the block runs they are; then they are answered."""
    running.start()
    with held(running.sandbox):
        for _ in range(JOBS):
            running.submit()
        eventually("all are at the vendor", lambda: running.sandbox.calls()["in_flight"] == JOBS)
        yield


def test_a_second_sigterm_makes_no_worker_drop_its_calls(running: Service) -> None:
    with calls_in_flight(running):
        worker = running.processes.pop("worker-dataoorts")
        worker.terminate()
        eventually("it is about to end", lambda: "shutdown" in running.log("worker-dataoorts"))
        worker.terminate()
    assert worker.wait(180) == 0
    running.start("worker-dataoorts")
    assert running.all_ended(JOBS) == {"succeeded": JOBS}
    assert running.outcomes() == {"succeeded": JOBS} and running.sandbox.calls()["calls"] == JOBS


def test_a_worker_that_is_killed_while_it_ends_loses_no_job_and_each_of_its_calls_is_in_the_books(
    running: Service,
) -> None:
    with calls_in_flight(running):
        running.processes["worker-dataoorts"].terminate()
        eventually("it is about to end", lambda: "shutdown" in running.log("worker-dataoorts"))
        running.kill("worker-dataoorts")
    running.start("worker-dataoorts")
    assert running.all_ended(JOBS) == {"succeeded": JOBS}
    outcomes = running.outcomes()
    assert outcomes["succeeded"] == JOBS and outcomes.total() == running.sandbox.calls()["calls"]


@pytest.mark.parametrize("name", ["api", "worker-sweep", "worker-webhooks"])
def test_a_second_sigterm_or_a_kill_of_the_others_loses_nothing(running: Service, name: str) -> None:
    with calls_in_flight(running):
        for second in (signal.SIGTERM, signal.SIGKILL):
            process = running.processes[name]
            process.terminate()
            os.kill(process.pid, second)  # Popen's own would see it if it has ended, and kill() find nobody
            running.kill(name)  # whatever is left of it
            running.start(name)
    assert running.all_ended(JOBS) == {"succeeded": JOBS}
    assert running.outcomes() == {"succeeded": JOBS} and running.sandbox.calls()["calls"] == JOBS
