"""Promise: whoever is asked to end twice, or killed while it ends, loses nothing and pays nothing twice in silence."""

import signal

import pytest

from tests.service import Service, eventually

pytestmark = pytest.mark.slow

JOBS = 20


def with_calls_in_flight(running: Service, delay: float) -> None:
    running.start()
    running.sandbox.trouble(delay=delay)
    for _ in range(JOBS):
        running.submit()
    eventually("all are at the vendor", lambda: running.sandbox.calls()["in_flight"] == JOBS)


def test_a_second_sigterm_makes_no_worker_drop_its_calls(running: Service) -> None:
    with_calls_in_flight(running, delay=10)
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
    with_calls_in_flight(running, delay=30)
    running.processes["worker-dataoorts"].terminate()
    eventually("it is about to end", lambda: "shutdown" in running.log("worker-dataoorts"))
    running.kill("worker-dataoorts")
    running.sandbox.clear()
    running.start("worker-dataoorts")
    assert running.all_ended(JOBS) == {"succeeded": JOBS}
    outcomes = running.outcomes()
    assert outcomes["succeeded"] == JOBS and outcomes.total() == running.sandbox.calls()["calls"]


@pytest.mark.parametrize("name", ["api", "worker-sweep", "worker-webhooks"])
def test_a_second_sigterm_or_a_kill_of_the_others_loses_nothing(running: Service, name: str) -> None:
    with_calls_in_flight(running, delay=5)
    for second in (signal.SIGTERM, signal.SIGKILL):
        process = running.processes[name]
        process.terminate()
        process.send_signal(second)
        running.kill(name)  # whatever is left of it
        running.start(name)
    assert running.all_ended(JOBS) == {"succeeded": JOBS}
    assert running.outcomes() == {"succeeded": JOBS} and running.sandbox.calls()["calls"] == JOBS
