"""One breaker for all workers, in a real Redis: shared, emptied, away, and with a worker that dies as its prober."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from local.web import free_port
from shared import breaker as shape
from shared.breaker import BreakerBoard, Reason, State
from tests.breakers import pass_time, stored
from tests.servers import RedisServer
from tests.service import eventually
from worker import breaker as rules
from worker.backends.base import Billed, Failure, Kind
from worker.breaker import ENOUGH_FAILURES, Permit
from worker.shared_breaker import SharedBreaker

ROOT = Path(__file__).parent.parent.parent
KEY = shape.key("dataoorts")
FAILED = Failure(Kind.transient, Billed.no, "HTTP 503")
#: What it opens it keeps open for a minute: FAILED would for 5 s, and then a probe is as right as none.
FAILED_FOR_LONG = Failure(Kind.transient, Billed.no, "HTTP 503", 60)
REFUSED = Failure(Kind.auth_failed, Billed.no, "HTTP 401")


def a_client(url: str, patience: float = 60) -> Redis:
    return Redis.from_url(url, socket_timeout=patience, socket_connect_timeout=patience, retry=Retry(NoBackoff(), 0))


@pytest.fixture(autouse=True)
def no_probe_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that nobody ended is renewed for ever, and so told to the Redis that later tests share."""
    keeping: list[SharedBreaker] = []
    keep = SharedBreaker._keep

    def told(breaker: SharedBreaker, probe: str) -> None:
        keeping.append(breaker)
        keep(breaker, probe)

    monkeypatch.setattr(SharedBreaker, "_keep", told)
    yield
    for breaker in keeping:
        with breaker._lock:
            breaker._redis = None
        for over in list(breaker._probing.values()):
            over.set()


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    client = a_client(redis_url)
    yield client
    client.close()


@pytest.fixture
def clock() -> list[float]:
    """Of the processes; Redis has its own."""
    return [100.0]


def a_breaker(client: Redis | None, clock: list[float]) -> SharedBreaker:
    return SharedBreaker("dataoorts", client, clock=lambda: clock[0])


def tell(asked: list[None], pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """As `pipeline`, and it is written down that it was asked for."""

    def told(*args: Any, **named: Any) -> Any:
        asked.append(None)
        return pipeline(*args, **named)

    return told


def fail(breaker: SharedBreaker, times: int, failure: Failure = FAILED) -> None:
    for _ in range(times):
        breaker.ended(breaker.admit(1, 0), failure, "job_1")


def standing(client: Redis) -> tuple[State, Reason | None]:
    found = BreakerBoard(client).read(["dataoorts"])["dataoorts"]
    assert found is not None
    return found.state, found.reason


def test_what_one_worker_finds_out_all_know(client: Redis, clock: list[float]) -> None:
    one, other = a_breaker(client, clock), a_breaker(client, clock)
    assert other.admit(1, 0).calls == 1
    fail(one, 1, REFUSED)
    clock[0] += SharedBreaker.BELIEVED_SECONDS
    assert other.admit(1, 0).calls == 0
    assert standing(client) == (State.open, Reason.auth_failed)


def test_failures_of_all_workers_are_counted_together(client: Redis, clock: list[float]) -> None:
    workers = [a_breaker(client, clock) for _ in range(ENOUGH_FAILURES)]
    for worker in workers[:-1]:
        fail(worker, 1)
        assert standing(client) == (State.closed, None)
    fail(workers[-1], 1, FAILED_FOR_LONG)
    assert standing(client) == (State.open, Reason.failing)


def test_failures_of_hundreds_of_calls_at_once_open_it_once(client: Redis) -> None:
    breakers = [SharedBreaker("dataoorts", client) for _ in range(4)]
    start = threading.Barrier(40)

    def fail_at_once(number: int) -> None:
        start.wait()
        for _ in range(5):
            breakers[number % 4].ended(Permit(1), FAILED, "job_1")

    with ThreadPoolExecutor(40) as threads:
        list(threads.map(fail_at_once, range(40)))
    found = stored(client)
    assert found is not None and (found.turns, found.reason) == (1, Reason.failing)


def test_as_long_as_the_backend_is_well_redis_is_asked_once_a_second(
    client: Redis, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    monkeypatch.setattr(client, "pipeline", tell(asked, client.pipeline))
    breaker = a_breaker(client, clock)
    for _ in range(1000):
        breaker.ended(breaker.admit(32, 0), None, "job_1")
    assert len(asked) == 1
    clock[0] += SharedBreaker.BELIEVED_SECONDS
    breaker.admit(1, 0)
    assert len(asked) == 2
    assert client.get(KEY) is None, "there is nothing to be written down"


@pytest.mark.parametrize("wrong", [-3600.0, 3600.0])
def test_a_worker_whose_clock_is_wrong_goes_by_the_clock_of_redis(
    client: Redis, clock: list[float], monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    right = time.time()
    monkeypatch.setattr("worker.shared_breaker.time.time", lambda: right + wrong)
    breaker = a_breaker(client, clock)
    fail(breaker, 1, REFUSED)
    assert breaker.admit(1, 0).calls == 0
    verdict = breaker.ended(Permit(1), REFUSED, "job_1")
    assert verdict.open_for is not None and 0 < verdict.open_for <= 60
    found = stored(client)
    assert found is not None and found.open_for(client.time()[0]) > 0
    clock[0] += 60
    permit = breaker.admit(1, 0)  # its monotonic clock went on, that of Redis did not
    assert permit.calls == 0


def test_of_many_workers_that_would_probe_one_does(
    client: Redis, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape, "PROBE_SECONDS", 600.0)  # its lease does not run out meanwhile
    monkeypatch.setattr(rules, "PROBE_SECONDS", 600.0)
    breakers = [SharedBreaker("dataoorts", client) for _ in range(8)]
    fail(stranger := a_breaker(client, clock), 1, REFUSED)
    pass_time(client, 60)
    start = threading.Barrier(32)

    def ask(number: int) -> Permit:
        start.wait()
        return breakers[number % 8].admit(32, 0)

    with ThreadPoolExecutor(32) as threads:
        permits = list(threads.map(ask, range(32)))
    [probe] = [permit for permit in permits if permit.calls]
    assert probe.probe is not None
    stranger.withdraw(probe)  # by whom it is given back does not matter to the others: only its worker may
    assert all(breaker.admit(1, 0).calls == 0 for breaker in breakers)
    for breaker in breakers:
        breaker.withdraw(probe)
    assert sum(breaker.admit(1, 0).calls for breaker in breakers) == 1


def test_a_good_probe_lets_everybody_work_and_the_bell_is_rung(client: Redis, clock: list[float]) -> None:
    rung: list[None] = []
    prober = SharedBreaker("dataoorts", client, clock=lambda: clock[0], closed=lambda: rung.append(None))
    other = a_breaker(client, clock)
    fail(prober, 1, REFUSED)
    pass_time(client, 60)
    clock[0] += 2
    permit = prober.admit(1, 0)
    assert permit.probe is not None and not rung
    prober.ended(permit, None, "job_1")
    assert rung == [None]
    clock[0] += 2
    assert other.admit(1, 0).calls == 1


PROBER = """
import sys, time
from redis import Redis
from shared import breaker
breaker.PROBE_SECONDS = float(sys.argv[2])
from worker.shared_breaker import SharedBreaker
permit = SharedBreaker("dataoorts", Redis.from_url(sys.argv[1])).admit(1, 0)
print(permit.probe, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_the_lease_of_a_prober_that_is_killed_runs_out(
    client: Redis, redis_url: str, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape, "PROBE_SECONDS", 600.0)  # so that it runs out when the test says so
    breaker = a_breaker(client, clock)
    fail(breaker, 1, REFUSED)
    pass_time(client, 60)
    prober = subprocess.Popen(
        [sys.executable, "-c", PROBER, redis_url, str(shape.PROBE_SECONDS)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ},
    )
    try:
        assert prober.stdout is not None
        name = prober.stdout.readline().decode().strip()
        found = stored(client)
        assert found is not None and found.probe == name
        clock[0] += 2
        assert breaker.admit(1, 0).calls == 0
        prober.send_signal(signal.SIGKILL)
        prober.wait()
        clock[0] += 2
        assert breaker.admit(1, 0).calls == 0, "nobody knows yet that it is dead"
        pass_time(client, shape.PROBE_SECONDS)
        clock[0] += 2
        assert breaker.admit(1, 0).probe is not None
    finally:
        prober.kill()
        prober.wait()
        if prober.stdout is not None:
            prober.stdout.close()


def test_a_probe_is_renewed_while_its_call_takes_long(
    client: Redis, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.shared_breaker.PROBE_SECONDS", 0.03)  # the beat; the lease stays
    fail(a_breaker(client, clock), 1, REFUSED)
    pass_time(client, 60)
    breaker = SharedBreaker("dataoorts", client)
    permit = breaker.admit(1, 0)
    first = stored(client)
    assert first is not None

    def renewed() -> bool:
        found = stored(client)
        return found is not None and found.probe == permit.probe and found.probe_until > first.probe_until

    eventually("it is renewed", renewed)
    breaker.withdraw(permit)


def test_an_emptied_redis_is_told_again_what_a_worker_knew(client: Redis, clock: list[float]) -> None:
    breaker = a_breaker(client, clock)
    fail(breaker, 1, REFUSED)
    client.flushall()
    clock[0] += 2
    assert breaker.admit(1, 0).calls == 0
    pass_time(client, 60)
    clock[0] += 2
    assert breaker.admit(1, 0).probe is not None
    assert standing(client) == (State.half_open, Reason.auth_failed)


def test_what_a_redis_that_comes_back_has_forgotten_does_not_close_it(client: Redis, clock: list[float]) -> None:
    breaker = a_breaker(client, clock)
    fail(breaker, 3)
    old = client.get(KEY)
    assert old is not None
    fail(breaker, 7, FAILED_FOR_LONG)
    client.set(KEY, old)
    clock[0] += 2
    assert breaker.admit(1, 0).calls == 0
    breaker.ended(Permit(1), Failure(Kind.rate_limited, Billed.no, "", 300), "job_1")
    assert standing(client) == (State.open, Reason.rate_limited)


def test_what_nobody_can_read_is_written_anew(client: Redis, clock: list[float]) -> None:
    client.set(KEY, b"\xff{")
    breaker = a_breaker(client, clock)
    fail(breaker, 1, REFUSED)
    assert standing(client) == (State.open, Reason.auth_failed)


@pytest.mark.parametrize("redis", ["none", "refuses"])
def test_without_redis_a_process_goes_by_its_own_memory(redis: str, clock: list[float]) -> None:
    client = a_client(f"redis://127.0.0.1:{free_port()}/0") if redis == "refuses" else None
    breaker = a_breaker(client, clock)
    fail(breaker, ENOUGH_FAILURES)
    assert breaker.admit(1, 0).calls == 0
    clock[0] += 5
    permit = breaker.admit(1, 0)
    assert permit.probe is not None
    assert breaker.admit(1, 0).calls == 0
    breaker.ended(permit, FAILED, "job_1")
    clock[0] += 5
    permit = breaker.admit(1, 0)
    breaker.ended(permit, None, "job_1")
    assert breaker.admit(1, 0).calls == 1


def test_a_frozen_redis_is_waited_for_by_one_call_in_a_while(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer()
    server.start()
    client, hasty = a_client(server.url), a_client(server.url, 0.5)
    try:
        breaker = a_breaker(client, clock)
        assert breaker.admit(1, 0).calls == 1
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        clock[0] += 2
        breaker._redis = hasty  # only now: before and after this it must be answered, however slowly
        tried: list[None] = []
        monkeypatch.setattr(hasty, "pipeline", tell(tried, hasty.pipeline))
        for _ in range(100):
            breaker.ended(breaker.admit(1, 0), None, "job_1")
        fail(breaker, ENOUGH_FAILURES)
        assert len(tried) == 1
        assert breaker.admit(1, 0).calls == 0
        breaker._redis = client
        server.process.send_signal(signal.SIGCONT)
        clock[0] += SharedBreaker.AWAY_SECONDS
        breaker.admit(1, 0)
        assert standing(client)[1] == Reason.failing, "now all know what it knew"
    finally:
        client.close()
        hasty.close()
        server.close()


def test_it_is_said_once_that_it_opened_and_that_it_closed(
    client: Redis, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    prober, other = a_breaker(client, clock), a_breaker(client, clock)
    fail(prober, 1, REFUSED)
    for _ in range(10):
        prober.ended(Permit(1), REFUSED, "job_1")
    clock[0] += 2
    other.admit(1, 0)
    other.admit(1, 0)
    pass_time(client, 100)
    clock[0] += 2
    prober.ended(prober.admit(1, 0), None, "job_1")
    clock[0] += 2
    other.admit(1, 0)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "is open (auth_failed)" in line]) == 2, "each process, once"
    assert len([line for line in said if "is closed again (it was auth_failed)" in line]) == 2


def test_the_board_reads_all_at_once_and_leaves_a_redis_that_is_away_alone(client: Redis, clock: list[float]) -> None:
    fail(a_breaker(client, clock), 1, REFUSED)
    found = BreakerBoard(client).read(["dataoorts", "diffusers"])
    assert found["dataoorts"] is not None and found["dataoorts"].until is not None
    assert found["diffusers"] is not None and found["diffusers"].state == State.closed
    away = BreakerBoard(a_client(f"redis://127.0.0.1:{free_port()}/0"), lambda: clock[0])
    assert away.read(["dataoorts"]) == {"dataoorts": None}
    away._redis = client
    assert away.read(["dataoorts"]) == {"dataoorts": None}
    clock[0] += BreakerBoard.PAUSE_SECONDS
    assert away.read(["dataoorts"])["dataoorts"] is not None
