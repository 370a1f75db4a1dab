"""A job's life, on both databases: every move, what it leaves behind, and what it refuses."""

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Row, select, update

from shared import jobs, moves, standing
from shared.database import Database, now
from shared.errors import JobErrorCode
from shared.jobs import Claim, JobError
from shared.routing import RoutingReason
from shared.tables import Billed, Outcome, Status, attempts, events
from shared.tables import jobs as table
from tests.lives import PRICES, TERMS, an_image, claim_one, ended, job_row, many, plan, submit


def event_types(database: Database, job_id: str) -> list[str]:
    with database.read() as connection:
        query = select(events.c.type).where(events.c.subject_id == job_id).order_by(events.c.sequence)
        return list(connection.scalars(query))


def last_event(database: Database, job_id: str) -> Row[Any]:
    with database.read() as connection:
        query = select(events).where(events.c.subject_id == job_id).order_by(events.c.sequence.desc()).limit(1)
        return connection.execute(query).one()


def attempt_row(database: Database, job_id: str, number: int = 1) -> Row[Any]:
    with database.read() as connection:
        query = select(attempts).where(attempts.c.job_id == job_id, attempts.c.number == number)
        return connection.execute(query).one()


def clock(database: Database) -> datetime:
    with database.read() as connection:
        moment: datetime = connection.execute(select(now())).scalar_one()
    return moment


def let_lease_lapse(database: Database, claim: Claim) -> None:
    with database.write() as tx:
        tx.execute(update(table).where(table.c.id == claim.job_id).values(lease_until=now(-1)))


AN_ERROR = JobError(JobErrorCode.rejected, "no", False, Billed.no)


def test_a_submitted_job_is_queued_with_its_first_event(database: Database) -> None:
    job = submit(database)
    assert (job.status, job.sequence, job.attempts, job.fence, job.ready) == ("queued", 1, 0, 0, True)
    assert event_types(database, job.id) == ["job.queued"]


def test_a_claim_starts_an_attempt_that_counts_as_unknown_until_it_is_closed(database: Database) -> None:
    job = submit(database)
    began = clock(database)
    claim = claim_one(database)
    ended = clock(database)
    assert claim.job_id == job.id and claim.attempt == 1 and claim.fence == 1
    row = job_row(database, job.id)
    assert row.status == Status.running and row.started_at is not None
    lease, rounded = timedelta(seconds=TERMS.lease_seconds), timedelta(milliseconds=2)
    assert began + lease - rounded <= row.lease_until <= ended + lease + rounded
    attempt = attempt_row(database, job.id)
    assert (attempt.outcome, attempt.billed, attempt.price) == ("running", "unknown", PRICES["m"])
    assert event_types(database, job.id) == ["job.queued", "job.started"]


def test_a_second_claim_of_the_same_job_gets_nothing(database: Database) -> None:
    submit(database)
    claim_one(database)
    with database.write() as tx:
        assert jobs.claim(tx, "dataoorts", TERMS) == []


def test_jobs_are_claimed_in_the_order_of_their_submission(database: Database) -> None:
    submitted = [submit(database).id for _ in range(5)]
    assert [claim_one(database).job_id for _ in submitted] == submitted


def test_a_claim_takes_as_many_as_it_asks_for_and_only_its_backends_jobs(database: Database) -> None:
    submitted = [submit(database).id for _ in range(3)]
    submit(database, backend="diffusers")
    with database.write() as tx:
        claims = jobs.claim(tx, "dataoorts", TERMS, limit=10)
    assert [claim.job_id for claim in claims] == submitted


def test_each_job_of_a_claim_has_its_event_and_its_attempt_and_is_told_of(database: Database) -> None:
    told: list[str] = []
    database.after_commit = told.extend
    models = ["m", "m", "other"]
    submitted = [submit(database, model=model, request_id=f"req_{place}").id for place, model in enumerate(models)]
    told.clear()
    with database.write() as tx:
        claims = jobs.claim(tx, "dataoorts", replace(TERMS, prices={"m": 8000, "other": 9000}), limit=3)
    assert [claim.request_id for claim in claims] == ["req_0", "req_1", "req_2"]
    assert told == submitted
    for job_id, price in zip(submitted, (8000, 8000, 9000), strict=True):
        assert event_types(database, job_id) == ["job.queued", "job.started"]
        attempt = attempt_row(database, job_id)
        assert (attempt.number, attempt.outcome, attempt.worker, attempt.price) == (1, "running", TERMS.worker, price)


def test_a_claim_passes_by_what_does_not_go_with_what_is_in_hand(database: Database) -> None:
    sizes = [1024, 512, 1024, 512, 512]
    small = [job for job, size in [(submit(database, input={"width": size}).id, size) for size in sizes] if size == 512]
    asked: list[int] = []

    def two_of_512(input: Mapping[str, Any]) -> bool:
        asked.append(input["width"])
        return bool(input["width"] == 512)

    with database.write() as tx:
        claims = jobs.claim(tx, "dataoorts", TERMS, limit=2, compatible=two_of_512)
    assert [claim.job_id for claim in claims] == small[:2]
    assert asked == sizes[:4], "in the queue's order, and no further than needed"
    with database.write() as tx:
        assert [claim.input["width"] for claim in jobs.claim(tx, "dataoorts", TERMS, limit=9)] == [1024, 1024, 512]


def test_a_claim_looks_no_further_down_the_queue_than_it_says(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOOK_AHEAD", 3)
    for size in (1024, 1024, 1024, 512):
        submit(database, input={"width": size})
    with database.write() as tx:
        assert jobs.claim(tx, "dataoorts", TERMS, compatible=lambda input: input["width"] == 512) == []


def test_a_claim_passes_by_jobs_of_a_model_that_its_worker_does_not_know(database: Database) -> None:
    """The catalogue lost a model while its jobs waited, or the API is newer than this worker."""
    unknown = submit(database, model="newer")
    known = submit(database)
    assert claim_one(database).job_id == known.id
    with database.write() as tx:
        assert jobs.claim(tx, "dataoorts", TERMS) == []
    assert job_row(database, unknown.id).status == Status.queued
    with database.write() as tx:
        [claim] = jobs.claim(tx, "dataoorts", replace(TERMS, prices={"m": 8000, "newer": 9000}))
    assert claim.job_id == unknown.id and attempt_row(database, unknown.id).price == 9000


def test_a_job_of_a_model_that_no_worker_knows_expires(database: Database) -> None:
    job = submit(database, model="removed")
    with database.write() as tx:
        assert jobs.claim(tx, "dataoorts", TERMS) == []
        assert jobs.expire(tx, job.id) is None, "not yet"
        tx.execute(update(table).where(table.c.id == job.id).values(queue_until=now(-1)))
        assert jobs.expire(tx, job.id) == Status.expired


def test_of_two_suspects_that_go_together_one_is_claimed(database: Database) -> None:
    submitted = [submit(database).id for _ in range(3)]
    with database.write() as tx:
        tx.execute(update(table).where(table.c.id.in_(submitted[:2])).values(crashes=2))
        claims = jobs.claim(tx, "dataoorts", TERMS, limit=3, compatible=lambda input: True)
    assert [claim.job_id for claim in claims] == [submitted[0], submitted[2]]


def test_many_claimers_at_once_never_get_the_same_job(database: Database) -> None:
    submitted = {submit(database).id for _ in range(40)}
    claimed: list[str] = []

    def claim_until_empty() -> None:
        while True:
            with database.write() as tx:
                got = jobs.claim(tx, "dataoorts", TERMS)
            if not got:
                return
            claimed.append(got[0].job_id)

    threads = [threading.Thread(target=claim_until_empty) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(submitted)


def test_a_succeeded_job_points_at_its_picture_and_ends_once(database: Database) -> None:
    job = submit(database)
    claim = claim_one(database)
    image = an_image(claim, warnings=[{"code": "size_differs", "message": "x"}])
    with database.write() as tx:
        assert jobs.succeed(tx, claim, image)
    row = job_row(database, job.id)
    assert (row.status, row.image_attempt, row.image_sha256) == ("succeeded", 1, image.sha256)
    assert row.warnings == image.warnings and row.completed_at is not None and row.lease_until is None
    with database.write() as tx:
        assert not jobs.succeed(tx, claim, image)
        assert not jobs.fail(tx, claim, AN_ERROR)
        assert not jobs.adopt(tx, image)
        assert not jobs.requeue(tx, claim, reason="transient", after_seconds=0, counts=True)
        assert not jobs.release(tx, claim, reason="x")
    assert event_types(database, job.id) == ["job.queued", "job.started", "job.succeeded"]
    assert job_row(database, job.id).sequence == 3


def test_a_slow_worker_cannot_overwrite_its_successor(database: Database) -> None:
    submit(database)
    slow = claim_one(database)
    let_lease_lapse(database, slow)
    with database.write() as tx:
        assert jobs.rescue(tx, slow.job_id, slow.fence, max_crashes=3) is Status.queued
    successor = claim_one(database)
    assert successor.fence > slow.fence
    with database.write() as tx:
        assert not jobs.succeed(tx, slow, an_image(slow))
        assert not jobs.fail(tx, slow, AN_ERROR)
        assert not jobs.requeue(tx, slow, reason="transient", after_seconds=0, counts=True)
        assert not jobs.release(tx, slow, reason="x")
        assert jobs.renew(tx, [(slow.job_id, slow.fence)], 20) == set()
    assert job_row(database, slow.job_id).status == Status.running


def test_a_late_picture_is_adopted_and_fences_the_successor_out(database: Database) -> None:
    submit(database)
    slow = claim_one(database)
    let_lease_lapse(database, slow)
    with database.write() as tx:
        jobs.rescue(tx, slow.job_id, slow.fence, max_crashes=3)
    successor = claim_one(database)
    with database.write() as tx:
        assert jobs.adopt(tx, an_image(slow))
    row = job_row(database, slow.job_id)
    assert (row.status, row.image_attempt) == ("succeeded", slow.attempt)
    with database.write() as tx:
        assert not jobs.succeed(tx, successor, an_image(successor))
        assert not jobs.adopt(tx, an_image(successor))
    assert job_row(database, slow.job_id).image_attempt == slow.attempt


def test_a_picture_is_adopted_by_a_job_that_waits_again(database: Database) -> None:
    submit(database)
    claim = claim_one(database)
    with database.write() as tx:
        jobs.requeue(tx, claim, reason="transient", after_seconds=60, counts=True)
    with database.write() as tx:
        assert jobs.adopt(tx, an_image(claim))
    assert job_row(database, claim.job_id).status == Status.succeeded


def test_a_failed_job_says_why(database: Database) -> None:
    submit(database)
    claim = claim_one(database)
    with database.write() as tx:
        assert jobs.fail(tx, claim, AN_ERROR)
    row = job_row(database, claim.job_id)
    assert row.status == Status.failed
    assert row.error == {"code": "rejected", "message": "no", "retryable": False, "billed": "no"}
    assert last_event(database, claim.job_id).data["error"] == row.error


def test_a_requeued_job_is_not_claimed_before_it_is_due(database: Database) -> None:
    submit(database)
    claim = claim_one(database)
    with database.write() as tx:
        assert jobs.requeue(tx, claim, reason="transient", after_seconds=60, counts=True)
    row = job_row(database, claim.job_id)
    assert (row.status, row.ready, row.failures, row.refusals) == ("queued", False, 1, 0)
    assert last_event(database, claim.job_id).data["reason"] == "transient"
    with database.write() as tx:
        assert not jobs.make_ready(tx, claim.job_id), "not yet"
        tx.execute(update(table).where(table.c.id == claim.job_id).values(ready_at=now(-1)))
        assert jobs.make_ready(tx, claim.job_id)
    assert claim_one(database).attempt == 2


def test_what_was_not_accepted_counts_apart_and_only_in_a_row(database: Database) -> None:
    submit(database)
    with database.write() as tx:
        jobs.requeue(tx, claim_one(database, tx), reason="rate_limited", after_seconds=0, counts=False)
    second = claim_one(database)
    assert (second.failures, second.refusals) == (0, 1)
    with database.write() as tx:
        jobs.requeue(tx, second, reason="transient", after_seconds=0, counts=True)
    third = claim_one(database)
    assert (third.failures, third.refusals) == (1, 0)


def test_a_released_job_is_claimable_at_once_and_nothing_counts(database: Database) -> None:
    submit(database)
    with database.write() as tx:
        assert jobs.release(tx, claim_one(database, tx), reason="worker_stopping")
    again = claim_one(database)
    assert (again.attempt, again.failures, again.refusals, again.crashes) == (2, 0, 0, 0)


def test_a_rescue_finds_nothing_to_do_when_the_lease_was_renewed(database: Database) -> None:
    submit(database)
    claim = claim_one(database)
    let_lease_lapse(database, claim)
    with database.write() as tx:
        assert jobs.renew(tx, [(claim.job_id, claim.fence)], 20) == {(claim.job_id, claim.fence)}
        assert jobs.rescue(tx, claim.job_id, claim.fence, max_crashes=3) is None
    assert job_row(database, claim.job_id).status == Status.running


def test_the_last_allowed_crash_fails_the_job(database: Database) -> None:
    job = submit(database)
    for crash in (1, 2, 3):
        claim = claim_one(database)
        assert claim.crashes == crash - 1
        let_lease_lapse(database, claim)
        with database.write() as tx:
            status = jobs.rescue(tx, claim.job_id, claim.fence, max_crashes=3)
        assert status is (Status.failed if crash == 3 else Status.queued)
    assert job_row(database, job.id).error["code"] == "worker_crashed"


def rows_of(database: Database) -> list[Row[Any]]:
    with database.read() as connection:
        return list(connection.execute(select(table)))


def claimed(database: Database, limit: int, worker: str = "w") -> list[str]:
    with database.write() as tx:
        return [claim.job_id for claim in jobs.claim(tx, "dataoorts", replace(TERMS, worker=worker), limit=limit)]


def test_a_job_that_one_more_death_would_end_is_the_only_such_suspect_in_its_process(database: Database) -> None:
    suspects = [submit(database).id for _ in range(3)]
    with database.write() as tx:
        tx.execute(update(table).values(crashes=2))
    innocent = [submit(database).id for _ in range(3)]
    assert claimed(database, 2) == [
        suspects[0],
        innocent[0],
    ]  # it passes the others by, and takes its fill all the same
    assert claimed(database, 1) == [innocent[1]]
    assert claimed(database, 9, worker="another") == [suspects[1], innocent[2]]
    assert claimed(database, 9) == []
    with database.write() as tx:
        jobs.cancel(tx, suspects[0])
    assert claimed(database, 9) == [suspects[2]]


def test_after_a_death_of_many_no_job_is_final_but_the_one_that_dies_alone(database: Database) -> None:
    """The poison kills its process whenever it runs; the others only had the bad luck to be there."""
    poison, *others = [submit(database).id for _ in range(8)]
    deaths = 0
    while {Status(row.status) for row in rows_of(database)} & {Status.queued, Status.running}:
        with database.write() as tx:
            running = jobs.claim(tx, "dataoorts", TERMS, limit=10)
        died = any(claim.job_id == poison for claim in running)
        deaths += died
        for claim in running:
            if died:
                let_lease_lapse(database, claim)
            with database.write() as tx:
                if died:
                    jobs.rescue(tx, claim.job_id, claim.fence, max_crashes=3)
                else:
                    assert jobs.succeed(tx, claim, an_image(claim))
    assert deaths == 3
    assert {row.id: str(row.status) for row in rows_of(database)} == {poison: "failed"} | dict.fromkeys(
        others, "succeeded"
    )


def test_no_lease_reaches_beyond_the_hard_deadline_of_its_attempt(database: Database) -> None:
    submit(database)
    with database.write() as tx:
        [claim] = jobs.claim(tx, "dataoorts", replace(TERMS, attempt_seconds=25))
        jobs.renew(tx, [(claim.job_id, claim.fence)], 3600)
    row = job_row(database, claim.job_id)
    assert row.lease_until == row.attempt_deadline_at


def test_renewing_tells_which_claims_are_still_ours(database: Database) -> None:
    submit(database), submit(database), submit(database)
    kept, finished, foreign = (claim_one(database) for _ in range(3))
    with database.write() as tx:
        jobs.succeed(tx, finished, an_image(finished))
        held = [(kept.job_id, kept.fence), (finished.job_id, finished.fence), (foreign.job_id, foreign.fence + 1)]
        assert jobs.renew(tx, held, 20) == {(kept.job_id, kept.fence)}


def test_a_job_past_its_deadline_expires_and_is_not_claimed(database: Database) -> None:
    job = submit(database, deadline_seconds=3600)
    with database.write() as tx:
        assert jobs.expire(tx, job.id) is None, "not yet"
        tx.execute(update(table).values(deadline_at=now(-1)))
        assert jobs.claim(tx, "dataoorts", TERMS) == []
        assert jobs.expire(tx, job.id) is Status.expired
    row = job_row(database, job.id)
    assert (row.status, row.error["code"], row.error["billed"]) == ("expired", "expired", "no")


def test_the_deadline_bounds_the_wait_for_the_first_try_only(database: Database) -> None:
    job = submit(database, deadline_seconds=3600)
    with database.write() as tx:
        jobs.requeue(tx, claim_one(database, tx), reason="transient", after_seconds=0, counts=True)
        tx.execute(update(table).values(deadline_at=now(-1)))
        assert jobs.expire(tx, job.id) is None
    assert claim_one(database).job_id == job.id


def test_a_job_that_was_only_refused_still_expires_unbilled(database: Database) -> None:
    job = submit(database, deadline_seconds=3600)
    with database.write() as tx:
        jobs.requeue(tx, claim_one(database, tx), reason="rate_limited", after_seconds=60, counts=False)
        tx.execute(update(table).values(deadline_at=now(-1)))
        assert jobs.expire(tx, job.id) is Status.expired


def test_a_job_that_was_tried_gives_up_after_its_time_in_the_queue(database: Database) -> None:
    job = submit(database)
    with database.write() as tx:
        jobs.requeue(tx, claim_one(database, tx), reason="transient", after_seconds=60, counts=True)
        tx.execute(update(table).values(queue_until=now(-1)))
        assert jobs.expire(tx, job.id) is Status.failed
    assert job_row(database, job.id).error["code"] == "gave_up"


def test_a_running_job_does_not_expire(database: Database) -> None:
    job = submit(database, deadline_seconds=3600)
    claim_one(database)
    with database.write() as tx:
        tx.execute(update(table).values(deadline_at=now(-1), queue_until=now(-1)))
        assert jobs.expire(tx, job.id) is None


def test_an_attempt_is_closed_once_but_unknown_may_become_known(database: Database) -> None:
    submit(database)
    claim = claim_one(database)
    with database.write() as tx:
        assert jobs.close_attempt(tx, claim.job_id, 1, Outcome.unknown, Billed.unknown)
        assert jobs.close_attempt(tx, claim.job_id, 1, Outcome.succeeded, Billed.yes), "it came after all"
        assert not jobs.close_attempt(tx, claim.job_id, 1, Outcome.failed, Billed.no)
    attempt = attempt_row(database, claim.job_id)
    assert (attempt.outcome, attempt.billed) == ("succeeded", "yes") and attempt.completed_at is not None


def test_a_transaction_that_breaks_off_leaves_no_move_and_no_event(database: Database) -> None:
    job = submit(database)

    def break_off() -> None:
        with database.write() as tx:
            claim_one(database, tx)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        break_off()
    assert job_row(database, job.id).status == Status.queued
    assert event_types(database, job.id) == ["job.queued"]


def test_the_sequence_numbers_the_events_without_a_gap(database: Database) -> None:
    job = submit(database)
    for _ in range(3):
        with database.write() as tx:
            jobs.release(tx, claim_one(database, tx), reason="x")
    ended(database, claim_one(database))
    with database.read() as connection:
        numbers = list(connection.scalars(select(events.c.sequence).order_by(events.c.sequence)))
    assert numbers == list(range(1, job_row(database, job.id).sequence + 1))


def test_a_claim_is_served_by_its_partial_index(database: Database) -> None:
    """Enough jobs that a plan without the index would be the worse one, then the plans themselves."""
    many(database, 500, status="succeeded", lease_until=None)
    many(database, 300)
    given = {"of_backend": "dataoorts", "of_models": list(PRICES), "by_worker": "w", "max_crashes": 3, "at_most": 1}
    claim = plan(database, moves.NEXT.params(given | {"from_rank": 1, "from_id": "job_"}))
    assert "ix_jobs_claim" in claim and "TEMP B-TREE" not in claim and "Sort" not in claim, claim
    from_a_place = r"\(rank,id\)>\(\?,\?\)" if database.is_sqlite else r"Index Cond: [^,]*ROW\(rank, \(id\)::text\) >= "
    assert re.search(from_a_place, claim), claim  # sought, and not filtered
    lapsed = select(table.c.id).where(standing.is_status(Status.running), table.c.lease_until < now())
    assert "ix_jobs_lease_until" in plan(database, lapsed)


def test_cancel_ends_a_queued_and_a_running_job_at_once_and_only_once(database: Database) -> None:
    submit(database), submit(database)
    running = claim_one(database)
    for job_id in (running.job_id, claim_one(database).job_id):
        with database.write() as tx:
            assert jobs.cancel(tx, job_id)
            assert not jobs.cancel(tx, job_id)
        row = job_row(database, job_id)
        assert (row.status, row.error, row.lease_until) == ("canceled", None, None)
        assert event_types(database, job_id)[-1] == "job.canceled"
    with database.write() as tx:
        assert not jobs.succeed(tx, running, an_image(running))
        assert not jobs.adopt(tx, an_image(running))
        assert jobs.renew(tx, [(running.job_id, running.fence)], 20) == set()


def test_what_a_canceled_call_costs_still_reaches_its_attempt(database: Database) -> None:
    submit(database)
    claim = claim_one(database)
    with database.write() as tx:
        jobs.cancel(tx, claim.job_id)
        assert jobs.close_attempt(tx, claim.job_id, claim.attempt, Outcome.canceled, Billed.yes)
    attempt = attempt_row(database, claim.job_id)
    assert (attempt.outcome, attempt.billed, attempt.price) == ("canceled", "yes", PRICES["m"])


def test_a_canceled_job_is_not_claimed(database: Database) -> None:
    job = submit(database)
    with database.write() as tx:
        jobs.cancel(tx, job.id)
        assert jobs.claim(tx, "dataoorts", TERMS) == []


def retry(database: Database, job_id: str) -> jobs.Made | None:
    with database.write() as tx:
        reason = RoutingReason.first
        return jobs.retry(tx, job_id, backend="dataoorts", reason=reason, sandbox=True, max_wait_seconds=60)


def test_a_retry_is_a_new_job_with_the_same_input_and_while_it_is_open_the_same_one(database: Database) -> None:
    job = submit(database, input={"prompt": "x", "seed": 7}, metadata={"a": "b"})
    with database.write() as tx:
        jobs.cancel(tx, job.id)
    first, second = retry(database, job.id), retry(database, job.id)
    assert first is not None and second is not None
    assert first.is_new and not second.is_new and first.job.id == second.job.id != job.id
    assert (first.job.input, first.job.metadata, first.job.retried_from) == (job.input, job.metadata, job.id)
    with database.write() as tx:
        jobs.cancel(tx, first.job.id)
    third = retry(database, job.id)
    assert third is not None and third.is_new


def test_only_a_job_that_ended_without_a_picture_is_retried(database: Database) -> None:
    queued = submit(database)
    assert retry(database, queued.id) is None
    claim = claim_one(database)
    assert retry(database, queued.id) is None
    ended(database, claim)
    assert retry(database, queued.id) is None


def test_retries_at_once_make_one_job(database: Database) -> None:
    job = submit(database)
    with database.write() as tx:
        jobs.cancel(tx, job.id)
    made: list[jobs.Made | None] = []
    threads = [threading.Thread(target=lambda: made.append(retry(database, job.id))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({retried.job.id for retried in made if retried}) == 1 and len(made) == 8
    assert sum(retried.is_new for retried in made if retried) == 1


def test_removed_data_are_gone_and_the_bill_stays(database: Database) -> None:
    job = submit(database, metadata={"a": "b"})
    with database.write() as tx:
        assert not jobs.remove_data(tx, job.id), "it has not ended"
    ended(database, claim_one(database))
    with database.write() as tx:
        assert jobs.remove_data(tx, job.id)
        assert jobs.remove_data(tx, job.id)
    row = job_row(database, job.id)
    assert (row.status, row.data_removed, row.input, row.metadata) == ("succeeded", True, {}, {})
    assert row.image_attempt is row.image_content_type is row.image_bytes is None
    assert row.image_sha256 == hashlib.sha256(b"picture").hexdigest(), "it stays known as ours"
    assert attempt_row(database, job.id).billed == "yes"
    assert retry(database, job.id) is None


def test_a_commit_tells_which_jobs_moved_and_a_rollback_tells_nothing(database: Database) -> None:
    told: list[list[str]] = []
    database.after_commit = told.append
    job = submit(database)
    assert told == [[job.id]]
    claim = claim_one(database)
    assert told == [[job.id]] * 2

    def break_off() -> None:
        with database.write() as tx:
            jobs.fail(tx, claim, AN_ERROR)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert told == [[job.id]] * 2
