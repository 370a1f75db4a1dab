"""Promise: a worker that does nothing is told from one that works within 60 s, and what ended is started again.

How long it took is printed (`-s`), and stands in docs/decisions.md: a busy machine may take longer.

Each way of standing still is a real one, in a real process; `tests/local/` holds what `./dev up` does then.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import settings
from tests.drills import deadlock
from tests.drills.conftest import LEASE_SECONDS
from tests.drills.held import held
from tests.fault_proxy import BLACK_HOLE, FaultProxy
from tests.service import ROOT, Service, eventually, service

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

WORKER = "worker-dataoorts"


@pytest.fixture
def running(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    """Its workers wait for the signals of tests/drills/deadlock. What is asked here does not touch the database."""
    path = os.pathsep.join((str(Path(deadlock.__path__[0])), str(ROOT)))
    with service(tmp_path, sqlite_url, PYTHONPATH=path, DARKROOM_LEASE_SECONDS=LEASE_SECONDS) as running:
        yield running


def health(running: Service, *arguments: object) -> tuple[int, str]:
    """Its exit code, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "worker.health", *map(str, arguments)],
        cwd=ROOT,
        env=settings.child_environ(running._settings),
        capture_output=True,
        text=True,
    )
    assert not done.stderr or arguments[:1] == ("--silent",), done.stderr
    return done.returncode, done.stdout


def row_of(running: Service) -> str:
    return f"{socket.gethostname()}:{running.processes[WORKER].pid}"


def is_well(running: Service) -> bool:
    return health(running, row_of(running))[0] == 0


def seen_after(running: Service, began: float) -> float:
    """Seconds from then until its health is 1; and nobody else counts on it then."""
    eventually("it is seen", lambda: health(running, row_of(running))[0] == 1)
    seconds = time.monotonic() - began
    assert running.http.get(f"{running.url}/readyz", timeout=60).json()["checks"]["workers"] == "degraded"
    sys.stdout.write(f"\nseen after {seconds:.0f} s: {health(running, row_of(running))[1]}")
    return seconds


def start(running: Service) -> None:
    running.start()
    eventually("the worker is well", lambda: is_well(running))


def stand_still(running: Service, kind: int) -> None:
    """The worker does so when this returns."""
    os.kill(running.processes[WORKER].pid, kind)
    eventually("it stands still", lambda: "stands still now" in running.log(WORKER))


def draws(running: Service, jobs: int = 1) -> None:
    """All that was submitted so far, and one more."""
    running.submit()
    assert running.all_ended(jobs + 1) == {"succeeded": jobs + 1}


def test_a_stopped_worker_is_seen_and_is_well_again_when_it_goes_on(running: Service) -> None:
    start(running)
    process = running.processes[WORKER]
    os.killpg(process.pid, signal.SIGSTOP)
    seen_after(running, time.monotonic())
    both = process.pid, running.processes["worker-sweep"].pid
    # Only while somebody else's row is new, and the sweep may be late.
    said = eventually("a supervisor is told", lambda: (told := health(running, "--silent", *both))[0] and told[1])
    assert said.startswith(f"{process.pid} dataoorts") and len(said.splitlines()) == 1
    running.submit()
    os.killpg(process.pid, signal.SIGCONT)
    eventually("it is well again", lambda: is_well(running))
    assert running.all_ended(1) == {"succeeded": 1}
    assert process.poll() is None  # a pause is not taken for a deadlock


def test_slots_that_wait_for_each_other_for_ever_are_seen_and_the_worker_ends(running: Service) -> None:
    start(running)
    stand_still(running, deadlock.CLAIMS)
    began = time.monotonic()
    running.submit()
    seen_after(running, began)
    assert running.processes[WORKER].wait(180) == 70
    said = running.log(WORKER)
    assert "slots are over their time (0 hold a job), and nothing has moved" in said and "claims.py" in said
    running.start(WORKER)
    draws(running)


def test_a_consumer_that_stands_still_is_seen_and_the_worker_ends_after_its_calls(running: Service) -> None:
    start(running)
    with held(running.sandbox):
        running.submit()
        eventually("its call is in flight", lambda: running.sandbox.calls()["in_flight"] == 1)
        stand_still(running, deadlock.CONSUMER)
        began = time.monotonic()
        seen_after(running, began)
        eventually("it is to end", lambda: "Celery's consumer has heard nothing" in running.log(WORKER))
        assert running.processes[WORKER].poll() is None
    assert running.processes[WORKER].wait(180) == 70
    assert running.all_ended(1) == {"succeeded": 1}
    assert running.outcomes() == {"succeeded": 1} and running.sandbox.calls()["calls"] == 1  # nothing is paid twice


def test_a_worker_that_writes_nothing_any_more_is_seen_and_ends(running: Service) -> None:
    start(running)
    stand_still(running, deadlock.WRITER)
    seen_after(running, time.monotonic())
    assert running.processes[WORKER].wait(180) == 70
    assert "the heartbeat has stood still" in running.log(WORKER)


def test_a_worker_whose_slots_are_all_taken_for_long_is_well(running: Service) -> None:
    """It asks Redis for no ticket meanwhile, and so hears nothing; tickets lie in the queue."""
    running._lines[WORKER] = running._lines[WORKER].replace("-c 200", "-c 2")
    start(running)
    running.sandbox.trouble(delay=75, calls=2)
    for _ in range(4):
        running.submit()
    eventually("both slots are taken", lambda: running.sandbox.calls()["in_flight"] == 2)
    verdicts = set()
    while running.sandbox.calls()["in_flight"] == 2:
        verdicts.add(health(running, row_of(running)))
    assert {code for code, _ in verdicts} == {0}
    assert any("2 of 2 slots in use" in said for _, said in verdicts)
    assert running.all_ended(4) == {"succeeded": 4}
    assert running.processes[WORKER].poll() is None


def test_a_half_open_connection_to_redis_is_replaced_before_anybody_counts_the_worker_out(running: Service) -> None:
    start(running)
    draws(running, 0)
    eventually("its slot is free", lambda: "0 of 200 slots in use, 1 done" in health(running, row_of(running))[1])
    stand_still(running, deadlock.HALF_OPEN)
    began = time.monotonic()
    draws(running)
    seconds = time.monotonic() - began
    assert is_well(running) and running.processes[WORKER].poll() is None
    sys.stdout.write(f"\ngoes on after {seconds:.0f} s\n")


def test_a_worker_that_redis_tells_nothing_is_seen_and_lives_on(running: Service) -> None:
    """A restart would mend nothing, and Celery connects again by itself."""
    with FaultProxy(running.redis.port) as proxy:
        behind = f"redis://127.0.0.1:{proxy.port}/0"
        running._settings["DARKROOM_REDIS_URL"], direct = behind, running._settings["DARKROOM_REDIS_URL"]
        running.start(WORKER)
        running._settings["DARKROOM_REDIS_URL"] = direct
        running.start("api", "worker-sweep")
        eventually("the worker is well", lambda: is_well(running))
        proxy.disturb(to_server=BLACK_HOLE, to_client=BLACK_HOLE)
        began = time.monotonic()
        running.submit()
        seen_after(running, began)
        assert "has heard nothing of Redis" in health(running, row_of(running))[1]
        assert health(running, "--silent", running.processes[WORKER].pid) == (0, "")
        proxy.heal()
        assert running.all_ended(1) == {"succeeded": 1}
        eventually("it is well again", lambda: is_well(running))
        assert running.processes[WORKER].poll() is None
