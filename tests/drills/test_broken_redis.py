"""Promise: all of Redis may be lost at any moment, and no job is. `test_drills.py` holds what else may become of it."""

import signal

import pytest

from tests.drills.held import held
from tests.service import Service, eventually

pytestmark = pytest.mark.slow


def slots(running: Service) -> int:
    """How many tickets the worker of the Procfile works at, at once."""
    return int(running._lines["worker-dataoorts"].split("-c ")[1].split()[0])


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_a_worker_with_every_slot_taken_lives_through_a_restart_of_redis(
    running_on_sqlite: Service, how: signal.Signals
) -> None:
    """With unacked or prefetched tickets Celery 5.7 dies of it: AttributeError in Channel._connparams, exit code 1."""
    running = running_on_sqlite
    running.start()
    jobs = slots(running) + 5
    with held(running.sandbox):
        for _ in range(jobs):
            running.submit()
        eventually("every slot is taken", lambda: running.sandbox.calls()["in_flight"] == jobs - 5)
        running.redis.stop(how)
        running.redis.start()
    assert running.all_ended(jobs) == {"succeeded": jobs}
    assert running.processes["worker-dataoorts"].poll() is None, running.log("worker-dataoorts")
    assert running.sandbox.calls()["calls"] == jobs
    running.submit("the worker goes on")
    assert running.all_ended(jobs + 1) == {"succeeded": jobs + 1}


def test_a_submission_is_accepted_at_once_while_redis_is_stopped_and_runs_when_it_is_back(
    running_on_sqlite: Service,
) -> None:
    running = running_on_sqlite
    running.start()
    running.redis.stop()
    running.submit()
    running.redis.start()
    assert running.all_ended(1) == {"succeeded": 1}


def test_a_submission_is_accepted_at_once_while_redis_is_frozen_and_runs_when_it_thaws(
    running_on_sqlite: Service,
) -> None:
    running = running_on_sqlite
    running.start()
    running.submit("a bell that has rung before")
    running.all_ended(1)
    assert running.redis.process is not None
    running.redis.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(20):
            running.submit()
    finally:
        running.redis.process.send_signal(signal.SIGCONT)
    assert running.all_ended(21) == {"succeeded": 21}
