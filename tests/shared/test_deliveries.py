"""A delivery's life on both databases: what is made, who gets it, and what becomes of it."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Row, insert, select, update

import shared.database
from shared import deliveries, endpoints, receivers, redelivery
from shared.database import Database, now
from shared.deliveries import PAUSES, Claim, Result
from shared.events import TERMINAL_EVENTS
from shared.tables import DeliveryStatus, Disabled, TryOutcome, delivery_tries, events, projects
from shared.tables import deliveries as table
from shared.tables import endpoints as endpoint_rows
from shared.tables import receivers as receiver_rows
from shared.webhook_secrets import Vault
from tests.lives import pass_time, submit
from worker.feed import Feed

VAULT = Vault("s" * 32)
DAY = 86400.0
TAKEN = Result(TryOutcome.delivered, seconds=0.1, status=204, answer="")
REFUSED = Result(TryOutcome.failed, seconds=0.1, status=500, answer="no")


def an_endpoint(database: Database, url: str = "https://a.example/hook", **given: Any) -> str:
    wanted = {"project_id": "prj_a", "description": "", "events": ["job.queued"], **given}
    with database.write() as tx:
        return str(endpoints.register(tx, VAULT, url=url, **wanted)[0].id)


def happen(database: Database, count: int = 1) -> list[Row[Any]]:
    """So many jobs are submitted, and who listens is to be told."""
    ids = [submit(database).id for _ in range(count)]
    with database.write() as tx:
        rows = tx.execute(select(events).where(events.c.subject_id.in_(ids)).order_by(events.c.id)).all()
        deliveries.plan(tx, rows)
    return list(rows)


def claim(database: Database, limit: int = 100, probes: int = 100) -> list[Claim]:
    with database.write() as tx:
        return deliveries.claim(tx, "w", limit=limit, probes=probes)


def rescue(database: Database) -> bool:
    row = the_one(database)
    with database.write() as tx:
        return deliveries.rescue(tx, row)


def redeliver(database: Database) -> bool:
    row = the_one(database)
    with database.write() as tx:
        return redelivery.redeliver(tx, row)


def settle(database: Database, claimed: Claim, result: Result) -> Disabled | None:
    with database.write() as tx:
        return deliveries.settle(tx, claimed, result)


def all_of(database: Database, rows: Any) -> list[Row[Any]]:
    with database.read() as connection:
        return list(connection.execute(select(rows).order_by(*rows.primary_key)).all())


def the_one(database: Database, rows: Any = table) -> Row[Any]:
    [row] = all_of(database, rows)
    return row


def clock(database: Database) -> datetime:
    with database.read() as connection:
        moment: datetime = connection.execute(select(now())).scalar_one()
    return moment


def refuse_and_see_when_it_is_due(
    database: Database, claimed: Claim, result: Result, least: float, most: float
) -> None:
    """The next try is due so many seconds after this one's end. Fails if it is not, however long the writing took."""
    began = clock(database)
    settle(database, claimed, result)
    ended, rounded = clock(database), timedelta(milliseconds=2)
    earliest, latest = began + timedelta(seconds=least), ended + timedelta(seconds=most)
    assert earliest - rounded <= the_one(database).due_at <= latest + rounded


def test_an_event_is_told_to_every_endpoint_of_its_project_that_asked_for_it_and_to_no_other(
    database: Database,
) -> None:
    wants = an_endpoint(database)
    an_endpoint(database, events=list(TERMINAL_EVENTS))
    an_endpoint(database, project_id="prj_b")
    disabled = an_endpoint(database)
    with database.write() as tx:
        endpoints.disable(tx, disabled, Disabled.by_hand)
    [event] = happen(database)
    delivery = the_one(database)
    assert (delivery.endpoint_id, delivery.event_id, delivery.status) == (wants, event.id, DeliveryStatus.pending)


def test_the_url_that_a_job_names_is_told_what_it_asked_for(database: Database) -> None:
    webhook = {"url": "https://b.example:8443/x?y=z", "events": ["job.queued"]}
    job = submit(database, webhook=webhook)
    other = submit(database, webhook={**webhook, "events": list(TERMINAL_EVENTS)})
    with database.write() as tx:
        rows = tx.execute(select(events).where(events.c.subject_id.in_((job.id, other.id)))).all()
        assert deliveries.plan(tx, rows) == 1
    delivery = the_one(database)
    assert (delivery.subject_id, delivery.url, delivery.endpoint_id) == (job.id, webhook["url"], None)
    assert (delivery.receiver, delivery.host) == ("prj_a https://b.example:8443", "b.example")


def test_what_is_due_is_claimed_once_however_many_ask(database: Database) -> None:
    for number in range(5):
        an_endpoint(database, f"https://{number}.example/")
    happen(database, 4)
    with ThreadPoolExecutor(8) as pool:
        taken = [one for claims in pool.map(lambda _: claim(database, limit=3), range(8)) for one in claims]
    taken += claim(database)
    assert len({one.delivery_id for one in taken}) == len(taken) == 5 * receivers.FIRST_WINDOW
    assert len({(one.delivery_id, one.fence) for one in taken}) == len(taken)
    assert [row.outcome for row in all_of(database, delivery_tries)] == [TryOutcome.running] * len(taken)


def test_the_window_of_a_receiver_grows_with_success_and_falls_to_one_at_a_failure(database: Database) -> None:
    an_endpoint(database)
    happen(database, 40)
    for window in range(receivers.FIRST_WINDOW, 6):
        in_flight = claim(database)
        assert len(in_flight) == window
        settle(database, in_flight.pop(), TAKEN)
        for one in in_flight:  # the rest goes back as if its sender had died
            with database.write() as tx:
                tx.execute(update(table).where(table.c.id == one.delivery_id).values(status="pending", is_retry=False))
                receivers.find_next_due(tx, one.receiver)
    [first, *_] = claim(database)
    settle(database, first, REFUSED)
    assert the_one(database, receiver_rows).window == 1


def test_a_dead_senders_delivery_does_not_count_as_on_its_way(database: Database) -> None:
    an_endpoint(database)
    happen(database, 4)
    assert len(claim(database)) == 2
    assert claim(database) == []
    pass_time(database, deliveries.LEASE_SECONDS + 1)
    assert len(claim(database)) == 2


def test_one_host_gets_no_more_at_once_however_many_endpoints_it_has(database: Database) -> None:
    for number in range(receivers.MOST_PER_HOST):
        an_endpoint(database, f"https://same.example/{number}")
    other = an_endpoint(database, "https://other.example/")
    happen(database, 2)
    taken: list[Claim] = []
    while some := claim(database, limit=1):
        taken += some
    assert sum(one.endpoint_id != other for one in taken) == receivers.MOST_PER_HOST
    assert sum(one.endpoint_id == other for one in taken) == 2


def test_the_dot_at_the_end_of_a_name_makes_no_other_host_of_it(database: Database) -> None:
    for number in range(receivers.MOST_PER_HOST):
        an_endpoint(database, f"https://same.example{'.' * (number % 2)}/{number}")
    happen(database, 2)
    assert len(claim(database)) == receivers.MOST_PER_HOST
    assert claim(database) == []
    assert receivers.receiver_of("prj_a", "https://same.example./", None) == (
        "prj_a https://same.example:",
        "same.example",
    )


def test_nor_in_one_claim_when_little_room_is_left(database: Database) -> None:
    for number in range(receivers.MOST_PER_HOST + 6):
        an_endpoint(database, f"https://same.example/{number}")
    happen(database, 2)
    first = receivers.MOST_PER_HOST - 2
    assert len(claim(database, limit=first)) == first
    assert len(claim(database)) == 2


def test_a_claim_that_another_overtakes_fills_no_window_twice(postgresql_url: str) -> None:
    """Whose turn it is is asked before the other has committed, and its rows are locked after that."""
    with closing(Database(postgresql_url)) as database:
        for number in range(40):
            an_endpoint(database, f"https://{number}.example/")
        happen(database, 10)
        for _ in range(10):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: claim(database, limit=3), range(60)))
            on_their_way = Counter(row.receiver for row in all_of(database, table) if row.status == "sending")
            assert max(on_their_way.values()) <= receivers.FIRST_WINDOW
            with database.write() as tx:
                tx.execute(update(table).where(table.c.status == "sending").values(status="pending"))
                tx.execute(update(receiver_rows).values(next_due_at=now()))


def test_a_delivery_that_ends_while_it_is_claimed_is_left_out(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.database, "BUSY_SECONDS", 60)  # whoever waits here waits until the other goes on
    with closing(Database(postgresql_url)) as database:
        an_endpoint(database)
        happen(database, 2)
        with database.write() as tx:
            tx.execute(update(receiver_rows).values(window=receivers.MOST_WINDOW))  # a success locks no receiver now
        late, other = claim(database)
        for row in all_of(database, table):
            with database.write() as tx:
                deliveries.rescue(tx, row)
        pass_time(database, DAY)
        with ThreadPoolExecutor(1) as pool:
            with database.write() as tx:
                deliveries.settle(tx, late, TAKEN)
                taken = pool.submit(claim, database)
                with pytest.raises(TimeoutError):
                    taken.result(timeout=0.5)  # it waits for this transaction
            assert [one.delivery_id for one in taken.result()] == [other.delivery_id]


def test_who_has_not_proved_itself_or_fails_shares_a_part_of_the_senders(database: Database) -> None:
    proven = an_endpoint(database, "https://good.example/")
    happen(database)
    settle(database, claim(database)[0], TAKEN)
    for number in range(10):
        an_endpoint(database, f"https://{number}.example/")
    happen(database, 2)
    taken = claim(database, probes=3)
    assert sorted(one.probe for one in taken) == [False] * 2 + [True] * 3
    assert {one.endpoint_id for one in taken if not one.probe} == {proven}
    assert claim(database, probes=0) == []


def test_those_who_fail_wait_behind_those_who_take_what_they_get(database: Database) -> None:
    bad = an_endpoint(database, "https://bad.example/")
    happen(database)
    settle(database, claim(database)[0], REFUSED)
    good = an_endpoint(database, "https://good.example/")
    happen(database)
    assert [one.endpoint_id for one in claim(database)] == [good, bad]


def test_first_tries_go_before_old_retries(database: Database) -> None:
    an_endpoint(database)
    [old] = happen(database)
    settle(database, claim(database)[0], REFUSED)
    pass_time(database, 600)
    [new] = happen(database)
    settle(database, claim(database)[0], TAKEN)
    rows = {row.event_id: row.status for row in all_of(database, table)}
    assert rows == {new.id: DeliveryStatus.delivered, old.id: DeliveryStatus.pending}


def test_a_receiver_that_fails_again_and_again_is_left_alone_in_between(database: Database) -> None:
    an_endpoint(database)
    happen(database, 20)
    for _ in range(receivers.FAILURES_BEFORE_REST):
        assert the_one(database, receiver_rows).rest_until is None
        settle(database, claim(database, limit=1)[0], REFUSED)
    assert the_one(database, receiver_rows).rest_until is not None
    with database.write() as tx:  # it is a second, which may be over before it is looked at; an hour is not
        tx.execute(update(receiver_rows).values(rest_until=now(3600)))
    assert claim(database) == []
    pass_time(database, 3601)
    [probe] = claim(database)
    settle(database, probe, TAKEN)
    assert len(claim(database)) == 2


def test_the_tries_of_a_delivery_come_at_the_promised_times_and_then_it_has_failed(database: Database) -> None:
    an_endpoint(database)
    happen(database)
    for number, pause in enumerate((*PAUSES[1:], None), 1):
        [claimed] = claim(database)
        assert (claimed.number, claimed.step) == (number, number - 1)
        if pause is None:
            settle(database, claimed, REFUSED)
            break
        refuse_and_see_when_it_is_due(database, claimed, REFUSED, pause, pause * (1 + deliveries.MOST_JITTER))
        pass_time(database, pause * (1 + deliveries.MOST_JITTER) + 1)
    assert the_one(database).status == DeliveryStatus.failed
    assert len(all_of(database, delivery_tries)) == len(PAUSES)
    assert sum(PAUSES) > 3 * DAY


@pytest.mark.parametrize(("asked", "least"), [(0.0, 5), (600.0, 600), (1e9, deliveries.LONGEST_RETRY_AFTER_SECONDS)])
def test_retry_after_is_obeyed_within_bounds(asked: float, least: float, database: Database) -> None:
    an_endpoint(database)
    happen(database)
    busy = Result(TryOutcome.failed, seconds=0.1, status=503, answer="", retry_after=asked)
    refuse_and_see_when_it_is_due(database, claim(database)[0], busy, least, least * 1.1)


def test_a_retry_after_speaks_for_all_that_goes_to_its_receiver_for_ten_minutes_at_most(database: Database) -> None:
    an_endpoint(database)
    happen(database, 2)
    for asked in (600.0, 1e9):
        [claimed] = claim(database, limit=1)
        settle(database, claimed, Result(TryOutcome.failed, seconds=0.1, status=503, answer="", retry_after=asked))
        with database.write() as tx:  # the other one is due, whatever became of this one
            tx.execute(update(table).values(due_at=now()))
            receivers.find_next_due(tx, claimed.receiver)
        pass_time(database, 540)
        assert claim(database) == []
        pass_time(database, 61)
    assert len(claim(database)) == 1


def test_who_is_gone_is_told_nothing_any_more_and_the_others_learn_of_it(database: Database) -> None:
    gone = an_endpoint(database)
    other = an_endpoint(database, "https://b.example/", events=["endpoint.disabled"])
    happen(database, 3)
    claimed = claim(database, limit=1)[0]
    answer = Result(TryOutcome.failed, seconds=0.1, status=410, answer="", gone=True)
    with database.write() as tx:
        reason = deliveries.settle(tx, claimed, answer)
        assert reason == Disabled.gone
        endpoints.disable(tx, gone, reason)
    assert {row.status for row in all_of(database, table)} == {DeliveryStatus.failed}
    rows = {row.id: row.disabled_reason for row in all_of(database, endpoint_rows)}
    assert rows == {gone: Disabled.gone, other: None}
    with database.write() as tx:
        told = tx.execute(select(events).where(events.c.subject_id == gone)).all()
        deliveries.plan(tx, told)
    assert [one.endpoint_id for one in claim(database)] == [other]


def test_what_an_old_url_answers_says_nothing_of_the_new_one(database: Database) -> None:
    endpoint = an_endpoint(database)
    happen(database, 2)
    claimed = claim(database)
    with database.write() as tx:
        endpoints.hold(tx, "prj_a", endpoint)
        endpoints.change(tx, endpoint, url="https://new.example/hook")
    for one, result in zip(claimed, (Result(TryOutcome.failed, status=410, gone=True), REFUSED), strict=True):
        assert settle(database, one, result) is None
    assert {row.status for row in all_of(database, table)} == {DeliveryStatus.pending}
    new = the_one(database, receiver_rows)
    assert (new.host, new.failures, new.window) == ("new.example", 0, receivers.FIRST_WINDOW)


def test_not_even_at_the_last_try_which_the_new_url_gets_at_once(database: Database) -> None:
    endpoint = an_endpoint(database)
    happen(database)
    last = len(PAUSES) - 1
    with database.write() as tx:
        tx.execute(update(table).values(step=last))
    [old] = claim(database)
    with database.write() as tx:
        endpoints.hold(tx, "prj_a", endpoint)
        endpoints.change(tx, endpoint, url="https://new.example/hook")
    settle(database, old, Result(TryOutcome.failed, seconds=0.1, status=503, answer="", retry_after=1e9))
    [new] = claim(database)
    assert (new.url, new.event_id, new.step) == ("https://new.example/hook", old.event_id, last)
    settle(database, new, REFUSED)
    assert the_one(database).status == DeliveryStatus.failed


def test_an_endpoint_that_did_nothing_but_fail_for_days_is_to_be_disabled(database: Database) -> None:
    an_endpoint(database)
    happen(database, 2)
    assert settle(database, claim(database, limit=1)[0], REFUSED) is None
    pass_time(database, (receivers.FAILING_DAYS - 0.1) * DAY)
    assert settle(database, claim(database, limit=1)[0], REFUSED) is None
    pass_time(database, 0.2 * DAY)
    assert settle(database, claim(database, limit=1)[0], REFUSED) == Disabled.failing


def test_a_success_between_failures_begins_the_count_of_days_anew(database: Database) -> None:
    an_endpoint(database)
    happen(database, 3)
    settle(database, claim(database, limit=1)[0], REFUSED)
    pass_time(database, 6 * DAY)
    settle(database, claim(database, limit=1)[0], TAKEN)
    assert settle(database, claim(database, limit=1)[0], REFUSED) is None


def test_a_sender_that_died_leaves_its_delivery_to_the_next_with_the_same_event(database: Database) -> None:
    an_endpoint(database)
    happen(database)
    [dead] = claim(database)
    assert rescue(database)
    assert not rescue(database)
    pass_time(database, 10)
    [again] = claim(database)
    assert (again.event_id, again.number) == (dead.event_id, 2)
    assert [one.outcome for one in all_of(database, delivery_tries)] == [TryOutcome.unknown, TryOutcome.running]
    settle(database, dead, REFUSED)  # it lived, and is too late
    assert the_one(database).status == DeliveryStatus.sending
    assert [one.outcome for one in all_of(database, delivery_tries)] == [TryOutcome.failed, TryOutcome.running]


def test_a_sender_that_was_taken_for_dead_spares_the_receiver_a_second_one(database: Database) -> None:
    an_endpoint(database)
    happen(database)
    [late] = claim(database)
    assert rescue(database)
    settle(database, late, TAKEN)
    pass_time(database, 10)
    assert claim(database) == []
    assert the_one(database).status == DeliveryStatus.delivered


def test_a_sender_that_dies_at_the_last_try_does_not_end_the_delivery(database: Database) -> None:
    an_endpoint(database)
    happen(database)
    with database.write() as tx:
        tx.execute(update(table).values(step=len(PAUSES) - 1))
    claim(database)
    assert rescue(database)
    pass_time(database, 2 * DAY)
    [again] = claim(database)
    settle(database, again, TAKEN)
    assert the_one(database).status == DeliveryStatus.delivered


def test_a_redelivery_begins_the_schedule_anew_and_not_for_what_is_on_its_way(database: Database) -> None:
    an_endpoint(database)
    happen(database)
    [first] = claim(database)
    assert not redeliver(database)
    settle(database, first, Result(TryOutcome.failed, seconds=0.1, status=400, answer="", final=True))
    assert the_one(database).status == DeliveryStatus.failed
    assert redeliver(database)
    pass_time(database, 60)
    [again] = claim(database)
    assert (again.event_id, again.step, again.number) == (first.event_id, 0, 2)


def test_what_waits_for_its_next_try_is_sent_now_on_a_wish(database: Database) -> None:
    an_endpoint(database)
    happen(database)
    with database.write() as tx:
        tx.execute(update(table).values(step=7))
    [failed] = claim(database)
    settle(database, failed, REFUSED)
    assert claim(database) == []  # for 20 hours
    assert redeliver(database)
    [again] = claim(database)
    assert (again.event_id, again.step, again.number) == (failed.event_id, 0, 2)


def test_the_feed_plans_each_event_once(database: Database) -> None:
    with database.write() as tx:
        tx.execute(insert(projects).values(id="prj_a", name="a", created_at=now()))
    an_endpoint(database)
    for _ in range(7):
        submit(database)
    planned: list[int] = []
    feed = Feed(database, planned.append)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: feed.round(), range(8)))
    assert sum(planned) == 7
    assert len({row.event_id for row in all_of(database, table)}) == len(all_of(database, table)) == 7
