"""How the service does, for Prometheus. Without a key, and the same from every API process: the database knows it all.

What is counted was tallied by the sweep's process (shared/tallies.py) about a second ago; what is few is looked up. So
a scrape costs the same at a million jobs as at one.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import ProgrammingError

from api.errors import Refused
from api.openapi import answers
from api.schemas import NoQuery
from api.services import Services
from shared import tallies
from shared.breaker import Reason, Standing
from shared.database import now
from shared.present import SWEEP, was_seen
from shared.standing import CLAIMABLE, TERMINAL, is_status
from shared.tables import DeliveryStatus, Outcome, Status, TryOutcome, events, jobs, workers
from shared.tallies import SUM, Series

#: Of the jobs that wait, the longest waiting are looked at for those of each backend.
OLDEST = 500

_MICRO = 1_000_000


def routes(services: Services, version: str) -> APIBlueprint:
    blueprint = APIBlueprint("metrics", __name__, abp_tags=[Tag(name="health")])

    @blueprint.get(
        "/metrics",
        operation_id="metrics",
        summary="How does it do? For Prometheus",
        description="Counters begin with the database, and go on whatever is started afresh.",
        responses=answers({200: "text/plain"}, refusals=(422,)),
    )
    def metrics(query: NoQuery) -> Response:
        settings = services.settings
        try:
            with services.database.read() as connection:
                view = _look(connection, settings.backends, settings.lease_seconds)
        except ProgrammingError:  # PostgreSQL's way to say that there is no such table
            raise Refused("unavailable", "The database is not migrated yet.", headers={"Retry-After": "5"}) from None
        build = {"version": version, "python": platform.python_version()}
        database = "sqlite" if services.database.is_sqlite else "postgresql"
        breakers = _breakers(services.breakers.read(settings.backends))
        text = _as_text([*_families(view), breakers, _info("darkroom_build", {**build, "database": database})])
        return Response(text, content_type=CONTENT_TYPE_PLAIN_0_0_4)

    return blueprint


@dataclass(frozen=True)
class _View:
    """What the database said, of these backends. Ages are in seconds."""

    backends: Iterable[str]
    tallied: Mapping[Series, int]
    running: Mapping[str, int]
    oldest_queued: Mapping[str, float]
    workers: Mapping[str, tuple[int, int, int]]  # those that are there and not stuck, their slots, and those that are
    sweep_age: float | None
    untallied_age: float


def _look(connection: Connection, backends: tuple[str, ...], lease_seconds: float) -> _View:
    by_backend = select(jobs.c.backend, func.count()).where(is_status(Status.running), jobs.c.lease_until.is_not(None))
    well = workers.c.trouble.is_(None)
    counts = (func.count().filter(well), func.sum(workers.c.slots).filter(well), func.count().filter(~well))
    there = select(workers.c.backend, *counts).where(was_seen(lease_seconds)).group_by(workers.c.backend)
    swept = select(now().label("now"), func.max(workers.c.seen_at).label("at")).where(workers.c.backend == SWEEP)
    unnumbered = select(now().label("now"), func.min(events.c.created_at).label("at")).where(events.c.number.is_(None))
    tallied = tallies.read(connection)
    return _View(
        backends=backends,
        tallied=tallied,
        running=dict(connection.execute(by_backend.group_by(jobs.c.backend)).all()),
        oldest_queued=_oldest_queued(connection, backends),
        workers={row[0]: (row[1], int(row[2] or 0), row[3]) for row in connection.execute(there)},
        sweep_age=_sweep_age(connection.execute(swept).one(), tallied.get(tallies.SWEPT)),
        untallied_age=_age(connection.execute(unnumbered).one()) or 0.0,
    )


def _age(row: Any) -> float | None:
    """Seconds; None if there is nothing that has one."""
    return None if row.at is None else max((row.now - row.at).total_seconds(), 0.0)


def _sweep_age(row: Any, left: int | None) -> float | None:
    """The same of the sweep, whose row goes when it ends in good order: that was at `left`, in milliseconds."""
    ages = [_age(row), None if left is None else max(row.now.timestamp() - left / 1000, 0.0)]
    return min((age for age in ages if age is not None), default=None)


def _oldest_queued(connection: Connection, backends: Iterable[str]) -> dict[str, float]:
    """How long the first job of each backend waits, as far as it can be told without looking at all that wait.

    Of those that wait longest of all; and of each backend the one that is next, for a backend whose jobs are all young.
    """
    waiting = select(jobs.c.backend, jobs.c.created_at)
    # By queue_until, which has an index and stands a fixed time after the submission.
    longest = waiting.where(is_status(Status.queued)).order_by(jobs.c.queue_until).limit(OLDEST)
    parts = [longest.subquery()]
    for backend in backends:
        following = waiting.where(jobs.c.backend == backend, CLAIMABLE).order_by(jobs.c.rank, jobs.c.id).limit(1)
        parts.append(following.subquery())
    rows: list[Any] = []
    for part in parts:
        first = select(part.c.backend, func.min(part.c.created_at).label("at"), now().label("now"))
        rows += connection.execute(first.group_by(part.c.backend))
    ages: dict[str, float] = {}
    for row in rows:
        ages[row.backend] = max(ages.get(row.backend, 0.0), _age(row) or 0.0)
    return ages


def _families(view: _View) -> Iterator[Metric]:
    # In the order in which they are read. Each family says everything of its kind; a new kind is one more line here.
    for families in (_jobs, _queue, _attempts, _workers, _deliveries):
        yield from families(view)


def _breakers(standings: Mapping[str, Standing | None]) -> Metric:
    """Nothing is said of one while Redis, which knows, is away."""
    family = GaugeMetricFamily(
        "darkroom_breaker_open",
        "1 while no job of the backend is claimed, or a single one to find out, for this reason.",
        labels=("backend", "reason"),
    )
    for backend, standing in standings.items():
        for reason in Reason if standing is not None else ():
            family.add_metric((backend, reason), float(standing is not None and standing.reason == reason))
    return family


def _jobs(view: _View) -> Iterator[Metric]:
    ends = sorted(TERMINAL)
    yield _counter(view, "darkroom_jobs_submitted", "Jobs accepted.", "jobs_submitted", (), [()])
    of_each_end = [(end,) for end in ends]
    yield _counter(view, "darkroom_jobs_ended", "Jobs that ended, by how.", "jobs_ended", ("status",), of_each_end)
    started = "From the submission of a job to its first attempt."
    backends = [(backend,) for backend in view.backends]
    yield _histogram(view, "darkroom_job_time_to_start_seconds", started, "time_to_start", "backend", backends)
    ended = "From the submission of a job to its end."
    yield _histogram(view, "darkroom_job_time_to_end_seconds", ended, "time_to_end", "status", of_each_end)


def _queue(view: _View) -> Iterator[Metric]:
    queued = {series[1]: max(amount, 0) for series, amount in view.tallied.items() if series[0] == "queued"}
    yield _gauge(view, "darkroom_jobs_queued", "Jobs that wait for an attempt.", queued)
    yield _gauge(view, "darkroom_jobs_running", "Jobs in a worker's hands.", view.running)
    oldest = "For how long the job has waited that waits longest; 0 if none does."
    yield _gauge(view, "darkroom_oldest_queued_age_seconds", oldest, view.oldest_queued)


def _attempts(view: _View) -> Iterator[Metric]:
    ends = [outcome for outcome in Outcome if outcome != Outcome.running]
    each = [(backend, end) for backend in view.backends for end in ends]
    both = ("backend", "outcome")
    backends = [(backend,) for backend in view.backends]
    yield _counter(view, "darkroom_attempts", "Attempts that ended, by how.", "attempts", both, each)
    text = "Attempts that had ended as unknown and whose end became known later."
    known = [(backend, end) for backend, end in each if end != Outcome.unknown]
    yield _counter(view, "darkroom_attempts_cleared", text, "attempts_cleared", both, known)
    unknown = {series[1]: amount for series, amount in view.tallied.items() if series[0] == "billed_unknown"}
    text = "Attempts of which nobody knows whether they were billed. They are in the spend."
    yield _gauge(view, "darkroom_attempts_billed_unknown", text, unknown)
    text = "What attempts cost, with those in full of which it is not known."
    yield _counter(view, "darkroom_spend_usd", text, "spend", ("backend",), backends, _MICRO)
    text = "Of the spend, what turned out not to have been billed."
    yield _counter(view, "darkroom_spend_taken_back_usd", text, "spend_taken_back", ("backend",), backends, _MICRO)


def _workers(view: _View) -> Iterator[Metric]:
    there, slots, stuck = ({backend: row[index] for backend, row in view.workers.items()} for index in range(3))
    yield _gauge(view, "darkroom_workers", "Worker processes whose heartbeat is fresh and that make progress.", there)
    yield _gauge(view, "darkroom_worker_slots", "How much they can do at once.", slots)
    text = "Worker processes whose heartbeat is fresh and that make no progress."
    yield _gauge(view, "darkroom_workers_stuck", text, stuck)
    sweep = GaugeMetricFamily("darkroom_sweep_age_seconds", "How long ago the sweep was last seen, if it ever was.")
    if view.sweep_age is not None:
        sweep.add_metric([], view.sweep_age)
    yield sweep
    text = "How long the oldest move waits to be counted here: the sweep's process counts."
    yield GaugeMetricFamily("darkroom_tally_lag_seconds", text, view.untallied_age)


def _deliveries(view: _View) -> Iterator[Metric]:
    standing = GaugeMetricFamily("darkroom_deliveries", "Webhook deliveries, by where they stand.", labels=("status",))
    for status in DeliveryStatus:
        standing.add_metric([status], view.tallied.get(("deliveries", status), 0))
    yield standing
    ends = [(outcome,) for outcome in TryOutcome if outcome != TryOutcome.running]
    label = ("outcome",)
    yield _counter(view, "darkroom_delivery_tries", "Tries of deliveries that ended, by how.", "tries", label, ends)
    text = "Tries that had ended as unknown and whose end became known later."
    known = [(outcome,) for (outcome,) in ends if outcome != TryOutcome.unknown]
    yield _counter(view, "darkroom_delivery_tries_cleared", text, "tries_cleared", label, known)


def _tallied(view: _View, name: str, expected: Iterable[Series]) -> dict[Series, int]:
    """The tallies of this name by their labels: 0 where nothing happened yet, so that the first time is a growth."""
    found = {series[1:]: amount for series, amount in view.tallied.items() if series[0] == name}
    return dict.fromkeys(expected, 0) | found


def _counter(
    view: _View, name: str, text: str, series: str, labels: tuple[str, ...], expected: Iterable[Series], unit: int = 1
) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, amount in _tallied(view, series, expected).items():
        family.add_metric(values, amount / unit)
    return family


def _gauge(view: _View, name: str, text: str, by_backend: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=("backend",))
    for backend, value in (dict.fromkeys(view.backends, 0.0) | dict(by_backend)).items():
        family.add_metric([backend], value)
    return family


def _histogram(view: _View, name: str, text: str, series: str, label: str, expected: Iterable[Series]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=(label,))
    tallied = _tallied(view, series, ())
    for value in sorted({*(values[0] for values in expected), *(values[0] for values in tallied)}):
        so_far, counts = 0, []
        for bound in tallies.buckets():
            so_far += tallied.get((value, bound), 0)
            counts.append((bound, so_far))
        family.add_metric([value], counts, sum_value=tallied.get((value, SUM), 0) / 1000)
    return family


def _info(name: str, values: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(f"{name}_info", "What runs here.", labels=tuple(values))
    family.add_metric(tuple(values.values()), 1)
    return family


class _Once(Collector):
    """Families as they were found, for one scrape."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _as_text(families: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families))
    return generate_latest(registry)
