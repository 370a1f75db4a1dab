"""What Prometheus is told, after real moves, on both databases."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert, text, update

from api.app import build, open_services
from api.services import Services
from shared import deliveries, jobs, redelivery
from shared.breaker import Breaker, Reason, key, written
from shared.database import now
from shared.deliveries import Result
from shared.settings import Settings
from shared.tables import Billed, Outcome, TryOutcome, workers
from shared.tables import deliveries as delivery_rows
from shared.tables import jobs as table
from tests.api.people import Caller, Submit, Worker, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from worker import presence, tallying
from worker.feed import Feed
from worker.presence import Progress

Scrape = Callable[[], dict[str, float]]


def samples(caller: Caller) -> dict[str, float]:
    """Every sample, by its name and labels as `name{label=value,…}`."""
    answer = caller.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found, key
            found[key] = sample.value
    return found


def sweep(services: Services) -> None:
    """What the sweep's process does for the metrics."""
    feed = Feed(services.database)
    while feed.round():
        pass
    while tallying.fold(services.database):
        pass


@pytest.fixture
def scrape(stranger: Caller, services: Services) -> Scrape:
    """Tally, as the sweep's process does, and ask as Prometheus does: without a key."""

    def scrape() -> dict[str, float]:
        sweep(services)
        return samples(stranger)

    return scrape


def test_before_anything_happened_counters_say_zero(scrape: Scrape) -> None:
    found = scrape()
    expected = {
        "darkroom_jobs_submitted_total",
        "darkroom_jobs_ended_total{status=failed}",
        "darkroom_job_time_to_start_seconds_count{backend=dataoorts}",
        "darkroom_job_time_to_end_seconds_bucket{le=+Inf,status=succeeded}",
        "darkroom_jobs_queued{backend=dataoorts}",
        "darkroom_jobs_running{backend=dataoorts}",
        "darkroom_oldest_queued_age_seconds{backend=dataoorts}",
        "darkroom_attempts_total{backend=dataoorts,outcome=unknown}",
        "darkroom_attempts_billed_unknown{backend=dataoorts}",
        "darkroom_spend_usd_total{backend=dataoorts}",
        "darkroom_workers{backend=dataoorts}",
        "darkroom_worker_slots{backend=dataoorts}",
        "darkroom_workers_stuck{backend=dataoorts}",
        "darkroom_deliveries{status=pending}",
        "darkroom_deliveries{status=failed}",
        "darkroom_delivery_tries_total{outcome=delivered}",
        "darkroom_tally_lag_seconds",
    }
    assert expected <= found.keys()
    info = [name for name in found if name.startswith("darkroom_build_info{")]
    assert len(info) == 1 and "version=0.1.0" in info[0] and found.pop(info[0]) == 1
    assert set(found.values()) == {0}


@on_sqlite
def test_a_breaker_that_is_not_closed_is_told_with_its_reason(
    scrape: Scrape, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scrape()["darkroom_breaker_open{backend=dataoorts,reason=failing}"] == 0
    breaker = Breaker(turns=1, reason=Reason.failing, until=services.redis.time()[0] + 60)
    services.redis.set(key("dataoorts"), written(breaker))
    found = scrape()
    assert found["darkroom_breaker_open{backend=dataoorts,reason=failing}"] == 1
    assert found["darkroom_breaker_open{backend=dataoorts,reason=auth_failed}"] == 0
    monkeypatch.setattr(services.breakers, "_away_until", math.inf)
    assert not [name for name in scrape() if name.startswith("darkroom_breaker")], "nobody knows"


def test_jobs_are_counted_as_they_are_submitted_and_end(scrape: Scrape, submit: Submit, worker: Worker) -> None:
    for _ in range(4):
        submit()
    assert scrape()["darkroom_jobs_submitted_total"] == 4
    worker.succeed(worker.claim())
    worker.fail(worker.claim())
    worker.requeue(worker.claim())
    found = scrape()
    assert found["darkroom_jobs_submitted_total"] == 4  # coming back is no submission
    assert (
        found["darkroom_jobs_ended_total{status=succeeded}"] == found["darkroom_jobs_ended_total{status=failed}"] == 1
    )
    assert found["darkroom_jobs_queued{backend=dataoorts}"] == 2


def test_every_way_out_of_the_queue_and_back_is_counted(
    scrape: Scrape, submit: Submit, worker: Worker, api: Caller, services: Services
) -> None:
    def queued_and_running() -> tuple[float, float]:
        found = scrape()
        return found["darkroom_jobs_queued{backend=dataoorts}"], found["darkroom_jobs_running{backend=dataoorts}"]

    first, second, third = (submit()["id"] for _ in range(3))
    assert queued_and_running() == (3, 0)
    claim = worker.claim()
    assert queued_and_running() == (2, 1)
    with services.database.write() as tx:
        assert jobs.release(tx, claim, reason="worker_stopping")
    assert queued_and_running() == (3, 0)
    assert worker.claim().job_id == first
    api.post(f"/v1/jobs/{first}/cancel")  # from running
    assert queued_and_running() == (2, 0)
    api.post(f"/v1/jobs/{second}/cancel")  # from the queue
    assert queued_and_running() == (1, 0)
    with services.database.write() as tx:
        tx.execute(update(table).values(queue_until=now(-1)))
        assert jobs.expire(tx, third)
    assert queued_and_running() == (0, 0)
    found = scrape()
    assert found["darkroom_jobs_ended_total{status=canceled}"] == 2
    assert found["darkroom_jobs_ended_total{status=expired}"] == 1


def test_moves_that_are_tallied_together_are_counted_as_those_that_are_tallied_one_by_one(
    scrape: Scrape, submit: Submit, worker: Worker, api: Caller
) -> None:
    for _ in range(3):
        submit()
    back, done, _ = (worker.claim() for _ in range(3))
    worker.requeue(back)
    worker.succeed(done)
    api.post(f"/v1/jobs/{back.job_id}/cancel")
    submit()
    found = scrape()
    assert found["darkroom_jobs_queued{backend=dataoorts}"] == 1
    assert found["darkroom_jobs_running{backend=dataoorts}"] == 1


def test_times_to_start_and_to_end_are_histograms_of_seconds(
    scrape: Scrape, submit: Submit, worker: Worker, services: Services
) -> None:
    submit()
    with services.database.write() as tx:
        tx.execute(update(table).values(created_at=now(-45)))
    worker.requeue(worker.claim())
    submit()
    worker.succeed(worker.claim())
    worker.succeed(worker.claim())
    found = scrape()
    start, end = "darkroom_job_time_to_start_seconds", "darkroom_job_time_to_end_seconds"
    # The first attempt alone: two jobs, of which one was claimed twice.
    assert found[f"{start}_count{{backend=dataoorts}}"] == 2
    assert found[f"{start}_bucket{{backend=dataoorts,le=30}}"] == 1
    assert found[f"{start}_bucket{{backend=dataoorts,le=60}}"] == 2
    assert 45 <= found[f"{start}_sum{{backend=dataoorts}}"] < 60
    assert found[f"{end}_count{{status=succeeded}}"] == 2 and found[f"{end}_count{{status=failed}}"] == 0
    assert found[f"{end}_bucket{{le=30,status=succeeded}}"] == 1
    assert 45 <= found[f"{end}_sum{{status=succeeded}}"] < 60


def test_attempts_and_what_they_cost_are_counted_when_they_are_closed(
    scrape: Scrape, submit: Submit, worker: Worker
) -> None:
    for _ in range(4):
        submit()
    paid, refused, lost = worker.claim(price=8000), worker.claim(price=8000), worker.claim(price=5000)
    worker.claim(price=100_000)  # still runs
    assert scrape()["darkroom_spend_usd_total{backend=dataoorts}"] == 0
    worker.close_attempt(paid, Outcome.succeeded, Billed.yes)
    worker.close_attempt(refused, Outcome.failed, Billed.no)
    worker.close_attempt(lost, Outcome.unknown, Billed.unknown)
    found = scrape()
    outcomes = {
        end: found[f"darkroom_attempts_total{{backend=dataoorts,outcome={end}}}"] for end in Outcome if end != "running"
    }
    assert outcomes == {"succeeded": 1, "failed": 1, "unknown": 1, "canceled": 0}
    assert found["darkroom_spend_usd_total{backend=dataoorts}"] == pytest.approx(0.013)
    assert found["darkroom_attempts_billed_unknown{backend=dataoorts}"] == 1


@pytest.mark.parametrize("seen_between", [True, False])
def test_an_attempt_that_is_cleared_up_is_counted_once_and_its_spend_taken_back_apart(
    scrape: Scrape, submit: Submit, worker: Worker, *, seen_between: bool
) -> None:
    submit()
    claim = worker.claim(price=8000)
    worker.close_attempt(claim, Outcome.unknown, Billed.unknown)
    if seen_between:
        scrape()
    worker.close_attempt(claim, Outcome.failed, Billed.no)
    found = scrape()
    counted, cleared = (f"darkroom_attempts{kind}_total" for kind in ("", "_cleared"))
    first = Outcome.unknown if seen_between else Outcome.failed
    assert found[f"{counted}{{backend=dataoorts,outcome={first}}}"] == 1
    assert sum(value for name, value in found.items() if name.startswith(counted)) == 1
    assert found[f"{cleared}{{backend=dataoorts,outcome=failed}}"] == int(seen_between)
    spend = [found[f"darkroom_spend_{kind}usd_total{{backend=dataoorts}}"] for kind in ("", "taken_back_")]
    assert spend == ([0.008, 0.008] if seen_between else [0, 0])
    assert found["darkroom_attempts_billed_unknown{backend=dataoorts}"] == 0


def test_the_longest_wait_is_told_even_if_other_backends_wait_longer(
    scrape: Scrape, submit: Submit, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        submit()
    with services.database.write() as tx:
        tx.execute(update(table).values(created_at=now(-100), queue_until=now(10), backend="other"))
    submit()
    with services.database.write() as tx:
        tx.execute(update(table).where(table.c.backend == "dataoorts").values(created_at=now(-30)))
    monkeypatch.setattr("api.metrics.OLDEST", 2)
    found = scrape()
    assert 100 <= found["darkroom_oldest_queued_age_seconds{backend=other}"] < 200
    assert 30 <= found["darkroom_oldest_queued_age_seconds{backend=dataoorts}"] < 100
    with services.database.write() as tx:
        tx.execute(update(table).where(table.c.backend == "other").values(backend="dataoorts", ready=False))
    assert 100 <= scrape()["darkroom_oldest_queued_age_seconds{backend=dataoorts}"] < 200  # backing off is waiting too


def test_workers_count_as_long_as_their_heartbeat_is_fresh_and_the_sweep_has_an_age(
    scrape: Scrape, services: Services
) -> None:
    assert "darkroom_sweep_age_seconds" not in scrape()
    rows: list[dict[str, Any]] = [
        {"name": "a", "backend": "dataoorts", "slots": 200},
        {"name": "b", "backend": "dataoorts", "slots": 100},
        {"name": "dead", "backend": "dataoorts", "slots": 50},
        {"name": "s", "backend": "sweep", "slots": 1},
    ]
    with services.database.write() as tx:
        tx.execute(insert(workers).values(seen_at=now(-1)), rows)
        tx.execute(update(workers).where(workers.c.name == "dead").values(seen_at=now(-60)))
        tx.execute(update(workers).where(workers.c.name == "s").values(seen_at=now(-7)))
    found = scrape()
    assert found["darkroom_workers{backend=dataoorts}"] == 2
    assert found["darkroom_worker_slots{backend=dataoorts}"] == 300
    assert 7 <= found["darkroom_sweep_age_seconds"] < 60


def test_a_worker_that_is_stuck_is_told_apart(scrape: Scrape, services: Services) -> None:
    with services.database.write() as tx:
        presence.show(tx, "a", "dataoorts", 200, None)
        presence.show(tx, "b", "dataoorts", 100, None, Progress(trouble="nothing has moved for 50 s"))
    found = scrape()
    names = ("darkroom_workers", "darkroom_worker_slots", "darkroom_workers_stuck")
    assert [found[f"{name}{{backend=dataoorts}}"] for name in names] == [1, 200, 1]


def test_a_sweep_that_ended_in_good_order_grows_old(scrape: Scrape, services: Services) -> None:
    with services.database.write() as tx:
        presence.show(tx, "s", "sweep", 0, None)
        tx.execute(update(workers).values(seen_at=now(-40)))
        presence.leave(tx, "s")
    assert 40 <= scrape()["darkroom_sweep_age_seconds"] < 60
    with services.database.write() as tx:
        presence.show(tx, "t", "sweep", 0, None)
    assert scrape()["darkroom_sweep_age_seconds"] < 20, "there is another"
    with services.database.write() as tx:
        presence.leave(tx, "t")
    assert scrape()["darkroom_sweep_age_seconds"] < 20, "the latest counts"


#: As promtool has them: units are the base ones, in full, and a name does not say its type.
NO_UNITS = ("ms", "milliseconds", "us", "minutes", "hours", "days", "second", "sec", "kb", "mb", "percent", "cents")
NO_NAMES = ("counter", "gauge", "histogram", "summary", "count", "sum", "bucket")


def faults(name: str, kind: str, says: str, labels: Iterable[str]) -> list[str]:
    """What promtool would say of a metric, by its name without `_total`; and what an age or a duration must have."""
    parts = name.split("_")
    found = {
        "no HELP": not says.strip() or says.strip() != says,
        "no TYPE": kind not in ("counter", "gauge", "histogram"),
        "not snake case": not re.fullmatch(r"darkroom(_[a-z0-9]+)+", name),
        "names its type": any(part in NO_NAMES for part in parts),
        "not a base unit": any(part in NO_UNITS for part in parts),
        "time without a unit": bool({"age", "lag", "time", "duration"} & set(parts)) and parts[-1] != "seconds",
        "a unit that is not last": any(unit in parts[:-1] for unit in ("seconds", "bytes", "usd")),
        "_total on what is no counter": parts[-1] == "total",
        "a label of Prometheus' own": bool({"le", "quantile", "job", "instance"} & set(labels)),
    }
    return [fault for fault, is_so in found.items() if is_so]


@on_sqlite
def test_every_metric_is_named_and_described_as_prometheus_wants_it(
    scrape: Scrape, stranger: Caller, submit: Submit, worker: Worker, services: Services
) -> None:
    submit()
    worker.succeed(worker.claim())
    with services.database.write() as tx:
        presence.show(tx, "s", "sweep", 0, None)
    scrape()
    told = stranger.get("/metrics").text
    families = list(text_string_to_metric_families(told))
    assert len(families) > 20
    for family in families:
        ends = {sample.name.removeprefix(family.name) for sample in family.samples}
        labels = {label for sample in family.samples for label in sample.labels if sample.name == family.name}
        assert faults(family.name, family.type, family.documentation, labels) == [], family.name
        if family.type == "counter":
            assert ends == {"_total"}, family.name
        assert told.count(f"# HELP {family.name}{'_total' if family.type == 'counter' else ''} ") == 1
        assert told.count(f"# TYPE {family.name}{'_total' if family.type == 'counter' else ''} {family.type}\n") == 1


def test_what_prometheus_would_not_want_is_found() -> None:
    wrong = {
        ("darkroom_wait_ms", "gauge", "x"): ["not a base unit"],
        ("darkroom_sweep_age", "gauge", "x"): ["time without a unit"],
        ("darkroom_seconds_waited", "gauge", "x"): ["a unit that is not last"],
        ("darkroom_jobs_count", "gauge", "x"): ["names its type"],
        ("darkroom_jobs_total", "gauge", "x"): ["_total on what is no counter"],
        ("darkroom_Jobs", "gauge", "x"): ["not snake case"],
        ("darkroom_jobs", "unknown", ""): ["no HELP", "no TYPE"],
    }
    assert {given: faults(*given, labels=()) for given in wrong} == wrong


def test_deliveries_are_told_by_where_they_stand_and_their_tries_by_outcome(
    scrape: Scrape, submit: Submit, worker: Worker, services: Services
) -> None:
    for _ in range(3):
        submit(webhook="https://hooks.example/x")
        worker.succeed(worker.claim())

    def standing() -> dict[str, float]:
        found = scrape()
        return {name: value for name, value in found.items() if value and name.startswith("darkroom_deliver")}

    assert standing() == {"darkroom_deliveries{status=pending}": 3}
    with services.database.write() as tx:
        first, second = deliveries.claim(tx, "w", limit=2, probes=2)
    waiting = {"darkroom_deliveries{status=pending}": 1, "darkroom_deliveries{status=sending}": 2}
    assert standing() == waiting
    with services.database.write() as tx:
        deliveries.settle(tx, first, Result(TryOutcome.delivered, 0.1, 200))
        deliveries.settle(tx, second, Result(TryOutcome.failed, 0.1, 400, final=True))
    assert standing() == {
        "darkroom_deliveries{status=pending}": 1,
        "darkroom_deliveries{status=delivered}": 1,
        "darkroom_deliveries{status=failed}": 1,
        "darkroom_delivery_tries_total{outcome=delivered}": 1,
        "darkroom_delivery_tries_total{outcome=failed}": 1,
    }
    with services.database.write() as tx:
        [row] = tx.execute(delivery_rows.select().where(delivery_rows.c.id == second.delivery_id))
        assert redelivery.redeliver(tx, row)
    again = standing()
    assert again["darkroom_deliveries{status=pending}"] == 2 and "darkroom_deliveries{status=failed}" not in again


@pytest.fixture
def second_app(settings: Settings) -> Iterator[OpenAPI]:
    services = open_services(settings)
    yield build(services)
    services.close()


def test_two_api_processes_say_the_same_and_so_does_one_that_was_started_afresh(
    scrape: Scrape, second_app: OpenAPI, submit: Submit, worker: Worker, api: Caller
) -> None:
    other = client_with(second_app, None)
    submit()
    theirs = client_with(second_app, api.environ_base["HTTP_AUTHORIZATION"].removeprefix("Bearer "))
    assert theirs.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).status_code == 202
    worker.succeed(worker.claim())
    first = scrape()
    second = samples(other)
    moving = {name for name in first if "age_seconds" in name or "lag_seconds" in name}
    for name in moving:
        first.pop(name), second.pop(name)
    assert first == second
    assert first["darkroom_jobs_submitted_total"] == 2


def test_what_is_not_counted_yet_is_told_by_its_age(stranger: Caller, submit: Submit, services: Services) -> None:
    submit()
    with services.database.write() as tx:
        tx.execute(text("UPDATE events SET created_at = :past"), {"past": tx.scalar(now(-9).select())})
    assert 9 <= samples(stranger)["darkroom_tally_lag_seconds"] < 20
    sweep(services)
    assert samples(stranger)["darkroom_tally_lag_seconds"] == 0


@on_sqlite
def test_it_refuses_what_it_does_not_know(stranger: Caller) -> None:
    assert stranger.get("/metrics?names=x").status_code == 422
    assert stranger.post("/metrics").status_code == 405


def test_where_the_database_is_away_it_says_so(stranger: Caller, services: Services) -> None:
    with services.database.write() as tx:
        tx.execute(text("DROP TABLE tallies"))
    answer = stranger.get("/metrics")
    assert (answer.status_code, answer.json["code"]) == (503, "unavailable")
