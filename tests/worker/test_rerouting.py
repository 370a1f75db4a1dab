"""Jobs of `auto` that are moved on to another backend, on both databases: which, where to, when, and which never."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from sqlalchemy import delete, select, text, update

from shared import jobs
from shared.breaker import PROBE_SECONDS, Breaker, BreakerBoard, Reason, key, written
from shared.catalogue import DEFAULT_MODEL
from shared.database import Database
from shared.image_store import DatabaseImageStore
from shared.jobs import Claim
from shared.routing import RoutingReason
from shared.tables import Outcome, attempts, events, workers
from shared.tables import jobs as table
from tests.lines import written as lines_written
from tests.lives import TERMS, job_row, many, plan, submit
from tests.worker.scripted import PICTURE, Answer, ScriptedBackend
from worker import presence, rerouting
from worker.backends.base import Billed, Failure, Kind
from worker.generation import Generation
from worker.leases import Leases
from worker.rerouting import REST_SECONDS, Rerouting

HOSTED, OWN = "dataoorts", "diffusers"
PRICES = {DEFAULT_MODEL: 8000}
LEASE = 20.0


class House:
    """Two backends, a worker for each, and the repair."""

    def __init__(self, database: Database, redis_url: str) -> None:
        self.database = database
        self.redis = redis.Redis.from_url(redis_url)
        self.time = 100.0
        self.rerouting = self.another_repair()
        self.works(HOSTED, OWN)

    def another_repair(self) -> Rerouting:
        return Rerouting(
            self.database,
            (HOSTED, OWN),
            BreakerBoard(self.redis),
            prices={},
            is_sandbox=lambda backend: backend == HOSTED,
            lease_seconds=LEASE,
            clock=lambda: self.time,
        )

    def works(self, *backends: str) -> None:
        with self.database.write() as tx:
            for backend in backends:
                presence.show(tx, f"w-{backend}", backend, 4, 1.0)

    def has_nobody(self, backend: str) -> None:
        with self.database.write() as tx:
            tx.execute(delete(workers).where(workers.c.backend == backend))

    def breaker(self, backend: str, breaker: Breaker | None = None) -> None:
        """Open, if nothing else is said."""
        now, _ = self.redis.time()
        self.redis.set(key(backend), written(breaker or Breaker(1, Reason.failing, until=now + 300.0)))

    def submit(self, **changes: Any) -> str:
        given = {"model": DEFAULT_MODEL, "backend": HOSTED, "sandbox": True, "input": {"prompt": "a fox"}}
        return str(submit(self.database, **(given | changes)).id)

    def moves(self) -> int:
        """How many jobs a round moves on."""
        moved, _ = self.rerouting.round(lambda: None)
        return moved

    def routing(self, job_id: str) -> list[tuple[str, str]]:
        return [(choice["backend"], choice["reason"]) for choice in job_row(self.database, job_id).routing]

    def waits_for(self) -> Counter[str]:
        with self.database.read() as connection:
            return Counter(connection.scalars(select(table.c.backend)))

    def fails(self, job_id: str) -> None:
        """The next attempt at it, by whoever it waits for; then it backs off for a minute."""
        claim = self.claim(job_row(self.database, job_id).backend)
        assert claim is not None and claim.job_id == job_id
        with self.database.write() as tx:
            jobs.requeue(tx, claim, reason="bad_output", after_seconds=60, counts=True)
            jobs.close_attempt(tx, job_id, claim.attempt, Outcome.failed, Billed.no)

    def claim(self, backend: str) -> Claim | None:
        with self.database.write() as tx:
            claims = jobs.claim(tx, backend, replace(TERMS, prices=PRICES))
        return claims[0] if claims else None

    def claims(self, backend: str) -> str | None:
        """The id of the job that its worker claims now."""
        claim = self.claim(backend)
        return None if claim is None else claim.job_id

    def generation(self, backend: str, *answers: Answer) -> Generation:
        scripted = ScriptedBackend(*answers)
        scripted.name = backend
        return Generation(
            database=self.database,
            images=DatabaseImageStore(self.database),
            backend=scripted,
            leases=Leases(self.database, LEASE),
            worker=f"w-{backend}",
            prices=PRICES,
            max_attempts=3,
            max_crashes=3,
            lease_seconds=LEASE,
            stopping=threading.Event(),
            others=[name for name in (HOSTED, OWN) if name != backend],
        )

    def attempts(self, job_id: str) -> list[tuple[int, str, str, str]]:
        query = select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number)
        with self.database.read() as connection:
            return [(row.number, row.backend, row.outcome, row.billed) for row in connection.execute(query)]


@pytest.fixture
def house(database: Database, redis_url: str) -> Iterator[House]:
    house = House(database, redis_url)
    yield house
    house.redis.close()


def test_what_waits_for_a_backend_whose_breaker_opens_is_moved_on_and_says_why(house: House) -> None:
    moved, named = house.submit(), house.submit(backend_asked=HOSTED)
    before = job_row(house.database, moved)
    assert house.moves() == 0
    house.breaker(HOSTED)
    assert house.moves() == 1
    after = job_row(house.database, moved)
    assert (after.status, after.backend, after.ready, after.sandbox) == ("queued", OWN, True, False)
    assert house.routing(moved) == [(HOSTED, "first"), (OWN, "breaker_open")]
    assert (after.rank, after.fence, after.sequence) == (before.rank, before.fence, before.sequence + 1)
    assert job_row(house.database, named).backend == HOSTED
    with house.database.read() as connection:
        [told] = connection.execute(select(events).where(events.c.subject_id == moved, events.c.sequence == 2)).all()
    assert (told.type, told.data["reason"]) == ("job.queued", "rerouted")
    assert house.moves() == 0


def test_where_from_and_to_and_why_a_job_is_moved_stands_in_a_line_with_its_request(house: House) -> None:
    job_id = house.submit(request_id="req_a")
    house.breaker("dataoorts")
    with lines_written() as lines:
        assert house.moves() == 1
    one, summary = lines.as_json(logger="worker.rerouting")
    way = {"from": "dataoorts", "to": "diffusers", "why": "breaker_open"}
    assert one | {"job_id": job_id, "request_id": "req_a", **way} == one and one["message"] == "moved on"
    assert summary | {"count": 1, **way} == summary


def test_a_backend_without_a_worker_is_left_after_a_lease_and_not_when_its_worker_is_started_anew(house: House) -> None:
    job = house.submit(backend=OWN, sandbox=False)
    for _ in range(3):
        house.has_nobody(OWN)
        assert house.moves() == 0
        house.time += LEASE - 1
        assert house.moves() == 0
        house.works(OWN)
        assert house.moves() == 0
    house.has_nobody(OWN)
    assert house.moves() == 0
    house.time += LEASE
    assert house.moves() == 1
    assert house.routing(job) == [(OWN, "first"), (HOSTED, "no_worker")]
    assert job_row(house.database, job).sandbox


def test_a_job_that_failed_here_is_tried_elsewhere_at_once_and_both_attempts_are_shown(house: House) -> None:
    job = house.submit()
    house.fails(job)
    assert house.moves() == 1
    row = job_row(house.database, job)
    assert (row.backend, row.ready, row.ready_at, row.failures) == (OWN, True, None, 1)
    assert house.routing(job)[-1] == (OWN, "failed_elsewhere")
    assert house.claim(OWN) is not None
    assert house.attempts(job) == [(1, HOSTED, "failed", "no"), (2, OWN, "running", "unknown")]


def test_who_failed_it_gets_it_back_only_if_the_other_one_is_not_well(house: House) -> None:
    job = house.submit()
    house.fails(job)
    house.moves()
    house.fails(job)
    assert house.moves() == 0, "both have failed it: it backs off where it is"
    house.breaker(OWN)
    assert house.moves() == 1
    assert house.routing(job)[1:] == [(OWN, "failed_elsewhere"), (HOSTED, "breaker_open")]


def test_nothing_is_moved_to_who_is_not_well_either(house: House) -> None:
    house.submit()
    job = house.submit(backend=OWN)
    house.breaker(HOSTED)
    house.breaker(OWN)
    assert house.moves() == 0
    house.redis.delete(key(OWN))
    house.has_nobody(OWN)
    assert house.moves() == 0, "it has no worker this very moment"
    house.works(OWN)
    assert house.moves() == 1
    assert job_row(house.database, job).routing[0]["backend"] == OWN


def test_one_job_alone_goes_to_find_out_whether_a_half_open_one_is_well_again(house: House) -> None:
    for _ in range(3):
        house.submit()
    house.breaker(HOSTED)
    house.breaker(OWN, Breaker(1, Reason.failing))
    assert [house.moves() for _ in range(3)] == [1, 0, 0]
    house.breaker(OWN, Breaker(2))
    assert house.moves() == 2
    assert house.waits_for() == {OWN: 3}


def test_who_waits_for_a_half_open_backend_stays_or_nobody_would_find_out(house: House) -> None:
    house.submit()
    now, _ = house.redis.time()
    house.breaker(HOSTED, Breaker(1, Reason.failing, probe="x", probe_until=now + PROBE_SECONDS))
    assert house.moves() == 0


def test_what_no_other_backend_can_do_stays(house: House) -> None:
    house.submit(model="lykon/dreamshaper-8-lcm")
    house.breaker(HOSTED)
    assert house.moves() == 0
    house.redis.delete(key(HOSTED))
    house.breaker(OWN)
    house.submit(backend=OWN, input={"prompt": "a fox", "image": "job_1"})
    assert house.moves() == 0


def test_redis_that_is_away_moves_nobody(house: House) -> None:
    house.submit()
    house.breaker(HOSTED)
    house.rerouting._breakers = BreakerBoard(redis.Redis(port=1, socket_connect_timeout=1))
    assert house.moves() == 0


def test_a_job_is_not_tossed_about_for_ever(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerouting, "MOST_ROUTED", 4)
    job = house.submit()
    for sick, well in ((HOSTED, OWN), (OWN, HOSTED)) * 2:
        house.redis.delete(key(well))
        house.breaker(sick)
        house.moves()
    assert house.routing(job) == [(HOSTED, "first")] + [(name, "breaker_open") for name in (OWN, HOSTED, OWN)]


def test_a_job_of_an_older_version_is_moved_too(house: House) -> None:
    job = house.submit()
    with house.database.write() as tx:
        tx.execute(update(table).values(routing=None))
    house.breaker(HOSTED)
    assert house.moves() == 1
    assert house.routing(job) == [(HOSTED, "first"), (OWN, "breaker_open")]


# -- Where others are at work at the same time -------------------------------------------------------------------------


def move(house: House, job_id: str) -> bool:
    with house.database.write() as tx:
        why = RoutingReason.breaker_open
        return jobs.reroute(tx, job_id, source=HOSTED, target=OWN, reason=why, sandbox=False)


def test_who_was_claimed_first_is_not_moved_and_who_was_moved_first_is_not_claimed(house: House) -> None:
    claimed, moved = house.submit(), house.submit()
    assert house.claims(HOSTED) == claimed
    assert not move(house, claimed)
    row = job_row(house.database, claimed)
    assert (row.status, row.backend, row.sequence) == ("running", HOSTED, 2)
    assert move(house, moved)
    assert house.claims(HOSTED) is None
    assert house.claims(OWN) == moved


def test_it_is_moved_once_from_where_it_was_seen(house: House) -> None:
    job = house.submit()
    assert move(house, job) and not move(house, job)
    assert house.routing(job) == [(HOSTED, "first"), (OWN, "breaker_open")]


def test_workers_that_claim_and_two_sweeps_that_move_share_the_queue_without_a_loss(house: House) -> None:
    submitted = {house.submit() for _ in range(60)}
    house.breaker(HOSTED)
    found: dict[str, list[str]] = {HOSTED: [], OWN: []}
    over = threading.Event()

    def claim_all(backend: str) -> None:
        while (claim := house.claim(backend)) is not None or not over.is_set():
            if claim is not None:
                found[backend].append(claim.job_id)

    def move_all() -> None:
        repair = house.another_repair()
        while repair.round(lambda: None) != (0, False):
            pass

    claiming = [threading.Thread(target=claim_all, args=[backend]) for backend in found]
    moving = [threading.Thread(target=move_all) for _ in range(2)]
    for thread in (*moving, *claiming):
        thread.start()
    for thread in moving:
        thread.join(60)
    over.set()
    for thread in claiming:
        thread.join(60)
    with house.database.read() as connection:
        rows = connection.execute(select(table)).all()
        tried = Counter(connection.scalars(select(attempts.c.job_id)))
    assert tried == Counter(submitted)
    assert all(row.status == "running" and row.routing[-1]["backend"] == row.backend for row in rows)
    assert {row.id: row.backend for row in rows} == {job: name for name, mine in found.items() for job in mine}


# -- Through a long queue ----------------------------------------------------------------------------------------------


def test_those_who_named_the_backend_are_passed_by_a_page_a_round(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerouting, "PAGE", 10)
    many(house.database, 25, model=DEFAULT_MODEL, backend_asked=HOSTED, rank=1)
    job = house.submit()
    house.breaker(HOSTED)
    rounds = [house.rerouting.round(lambda: None) for _ in range(3)]
    assert rounds == [(0, True), (0, True), (1, False)]
    assert job_row(house.database, job).backend == OWN
    late = house.submit()
    assert house.rerouting.round(lambda: None) == (0, False), "it was a long way: it rests"
    house.time += REST_SECONDS
    assert [house.moves() for _ in range(3)] == [0, 0, 1]
    assert job_row(house.database, late).backend == OWN


def test_a_round_stops_at_its_limit_and_says_that_more_is_left(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerouting, "LIMIT", 2)
    for _ in range(5):
        house.submit()
    house.breaker(HOSTED)
    assert [house.rerouting.round(lambda: None) for _ in range(3)] == [(2, True), (2, True), (1, False)]


def test_its_pages_are_found_by_their_indexes(house: House) -> None:
    many(house.database, 600, model=DEFAULT_MODEL, backend=OWN)
    job = job_row(house.database, house.submit())
    ready, backing_off = house.rerouting._ready[HOSTED], house.rerouting._backing_off
    with house.database.write() as tx:
        tx.execute(text("ANALYZE"))
    for after in (None, (job.rank, job.id)):
        assert "ix_jobs_claim" in plan(house.database, ready.query(after))
    for after in (None, (job.created_at, job.id)):
        assert "ix_jobs_not_ready" in plan(house.database, backing_off.query(after))


# -- Through the worker ------------------------------------------------------------------------------------------------

SICK = Failure(Kind.bad_output, Billed.no, "half a picture")


@pytest.mark.parametrize(
    ("kind", "code"), [(Kind.unsafe, "content_filtered"), (Kind.rejected, "rejected")], ids=["unsafe", "rejected"]
)
def test_a_verdict_is_the_end_and_nobody_else_is_asked(house: House, kind: Kind, code: str) -> None:
    job = house.submit()
    house.generation(HOSTED, Failure(kind, Billed.no, "no")).work()
    house.breaker(HOSTED)
    assert house.moves() == 0
    row = job_row(house.database, job)
    assert (row.status, row.error["code"], house.routing(job)) == ("failed", code, [(HOSTED, "first")])
    assert house.attempts(job) == [(1, HOSTED, "failed", "no")]


def test_a_failure_leaves_the_sweep_time_to_move_the_job_where_another_backend_can_do_it(house: House) -> None:
    job, named = house.submit(), house.submit(backend_asked=HOSTED)
    house.generation(HOSTED, SICK, PICTURE).run_attempt(house.claim(HOSTED))  # type: ignore[arg-type]
    row = job_row(house.database, job)
    assert not row.ready and (row.ready_at - row.started_at).total_seconds() >= 2
    assert house.moves() == 1
    house.generation(OWN, PICTURE).work()
    assert job_row(house.database, job).status == "succeeded"
    assert house.attempts(job) == [(1, HOSTED, "failed", "no"), (2, OWN, "succeeded", "yes")]
    assert job_row(house.database, named).backend == HOSTED


def test_max_attempts_counts_over_all_backends(house: House) -> None:
    job = house.submit()
    for backend in (HOSTED, OWN, OWN):
        with house.database.write() as tx:
            tx.execute(update(table).values(ready=True, ready_at=None, backend=backend))
        house.generation(backend, SICK).work()
    row = job_row(house.database, job)
    assert (row.status, row.error["code"], row.failures) == ("failed", "bad_output", 3)
    assert [backend for _, backend, _, _ in house.attempts(job)] == [HOSTED, OWN, OWN]
