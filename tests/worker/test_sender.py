"""One try of a delivery, with a real receiver on loopback and both databases."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from typing import Any, Self

import pytest
from celery import Celery
from sqlalchemy import Row, select, update
from sqlalchemy.exc import OperationalError
from standardwebhooks.webhooks import Webhook

from shared import deliveries, endpoints, redelivery, webhook_secrets
from shared.database import Database, now
from shared.image_store import DatabaseImageStore
from shared.tables import DeliveryStatus, Disabled, TryOutcome, delivery_tries, events
from shared.tables import deliveries as table
from shared.tables import endpoints as endpoint_rows
from shared.tickets import Bell
from shared.webhook_secrets import Vault
from tests.lines import written
from tests.lives import pass_time, submit
from tests.receiver import Receiver, floods, hangs, resets, says
from tests.worker.conftest import VAULT
from worker.feed import Feed
from worker.lapses import Lapses
from worker.sender import Sender
from worker.sweep import Sweep

EVENTS = ["job.queued"]
DAY = 86400.0


def an_endpoint(database: Database, url: str) -> tuple[str, str]:
    with database.write() as tx:
        row, secret = endpoints.register(tx, VAULT, project_id="prj_a", url=url, description="", events=EVENTS)
    return row.id, secret


def happen(database: Database, count: int = 1, **changes: Any) -> None:
    for _ in range(count):
        submit(database, **changes)
    Feed(database).round()


def rows_of(database: Database, rows: Any) -> list[Row[Any]]:
    with database.read() as connection:
        return list(connection.execute(select(rows).order_by(*rows.primary_key)).all())


@pytest.fixture
def no_retry_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first retry is due in an hour and not in 5 s: `work()` would make it too, where this machine stood still."""
    monkeypatch.setattr(deliveries, "PAUSES", (0, 3600, *deliveries.PAUSES[2:]))


def said_to_be_disabled(database: Database) -> list[str]:
    return [row.subject_id for row in rows_of(database, events) if row.type == "endpoint.disabled"]


def test_what_is_due_arrives_signed_once_and_is_written_down(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    _, secret = an_endpoint(database, receiver.url + "/hook?a=b")
    happen(database, 5)
    a_sender().work()
    assert {row.status for row in rows_of(database, table)} == {DeliveryStatus.delivered}
    assert len(receiver.letters) == 5
    for letter in receiver.letters:
        assert letter.path == "/hook?a=b"
        assert Webhook(secret).verify(letter.body, letter.headers) == letter.told
        assert letter.headers["content-type"] == "application/json; charset=utf-8"
        assert letter.headers["user-agent"].startswith("Darkroom")
    assert {letter.id for letter in receiver.letters} == {row.id for row in rows_of(database, events)}
    for one in rows_of(database, delivery_tries):
        assert (one.number, one.outcome, one.status, one.error) == (1, TryOutcome.delivered, 204, None)
        assert one.seconds > 0


def test_the_url_of_a_job_is_signed_with_its_projects_secret_which_is_made_when_it_is_needed(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    happen(database, webhook={"url": receiver.url, "events": EVENTS})
    happen(database, webhook={"url": receiver.url, "events": EVENTS}, project_id="prj_b")
    a_sender().work()
    with database.read() as connection:
        secrets = {name: webhook_secrets.live(connection, VAULT, name) for name in ("prj_a", "prj_b")}
    owners = {row.id: row.project_id for row in rows_of(database, events)}
    assert len(receiver.letters) == 2
    for letter in receiver.letters:
        [secret] = secrets[owners[letter.id]]
        assert Webhook(secret).verify(letter.body, letter.headers)


@pytest.mark.usefixtures("no_retry_meanwhile")
def test_while_a_secret_is_replaced_both_verify_every_try(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    endpoint, old = an_endpoint(database, receiver.url)
    happen(database)
    receiver.behaviour = says(500)
    a_sender().work()
    with database.write() as tx:
        new = webhook_secrets.rotate(tx, VAULT, endpoint)
        tx.execute(update(table).values(due_at=now(-1)))
        tx.execute(update(endpoint_rows).values(description="changed"))
    receiver.behaviour = says(200)
    with database.write() as tx:
        from shared import receivers

        receivers.pardon(tx, endpoint)
        receivers.find_next_due(tx, endpoint)
    a_sender().work()
    first, second = receiver.letters
    assert first.id == second.id
    assert Webhook(old).verify(first.body, first.headers)
    for secret in (old, new):
        assert Webhook(secret).verify(second.body, second.headers)


@pytest.mark.usefixtures("no_retry_meanwhile")
@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        (says(500, b"oh no"), 500, None),
        (says(302, Location="http://127.0.0.1:1/"), 302, None),
        (resets, None, "broken"),
    ],
)
def test_what_went_wrong_is_written_down_for_its_owner(
    behaviour: Any,
    status: int | None,
    code: str | None,
    database: Database,
    receiver: Receiver,
    a_sender: Callable[..., Sender],
) -> None:
    receiver.behaviour = behaviour
    an_endpoint(database, receiver.url)
    happen(database)
    a_sender().work()
    [one] = rows_of(database, delivery_tries)
    assert (one.outcome, one.status) == (TryOutcome.failed, status)
    assert (one.error or {}).get("code") == code
    assert one.answer == {500: "oh no", 302: "", None: None}[status]
    [delivery] = rows_of(database, table)
    assert (delivery.status, delivery.is_retry) == (DeliveryStatus.pending, True)
    assert len(receiver.letters) == 1  # a redirect was not followed


def test_an_answer_without_end_is_no_more_than_its_start(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    receiver.behaviour = floods
    an_endpoint(database, receiver.url)
    happen(database)
    a_sender().work()
    assert rows_of(database, table)[0].status == DeliveryStatus.delivered


def test_gone_disables_the_endpoint_and_ends_what_waits_for_it(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    receiver.behaviour = says(410)
    endpoint, _ = an_endpoint(database, receiver.url)
    happen(database, 4)
    a_sender().work()
    assert rows_of(database, endpoint_rows)[0].disabled_reason == Disabled.gone
    assert {row.status for row in rows_of(database, table)} == {DeliveryStatus.failed}
    assert said_to_be_disabled(database) == [endpoint]


def test_nothing_but_failure_for_days_disables_the_endpoint_and_is_told(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    receiver.behaviour = says(500)
    endpoint, _ = an_endpoint(database, receiver.url)
    happen(database, 3)
    sender = a_sender()
    sender.work()
    pass_time(database, 4.9 * DAY)
    sender.work()
    assert rows_of(database, endpoint_rows)[0].disabled_at is None and said_to_be_disabled(database) == []
    pass_time(database, 0.2 * DAY)
    sender.work()
    [row] = rows_of(database, endpoint_rows)
    assert row.disabled_at is not None and row.disabled_reason == Disabled.failing
    assert said_to_be_disabled(database) == [endpoint]
    assert {row.status for row in rows_of(database, table)} == {DeliveryStatus.failed}


def test_what_was_planned_while_its_endpoint_was_disabled_is_not_sent(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    endpoint, _ = an_endpoint(database, receiver.url)
    happen(database)
    with database.write() as tx:
        tx.execute(update(endpoint_rows).where(endpoint_rows.c.id == endpoint).values(disabled_at=now()))
    a_sender().work()
    assert receiver.letters == []
    assert rows_of(database, table)[0].status == DeliveryStatus.failed
    assert rows_of(database, delivery_tries)[0].error["code"] == "endpoint_closed"


def test_a_secret_of_another_key_sends_nothing_unsigned(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    an_endpoint(database, receiver.url)
    happen(database)
    a_sender(vault=Vault("another secret key " * 2)).work()
    assert receiver.letters == []
    assert rows_of(database, delivery_tries)[0].error["code"] == "unreadable_secret"
    assert rows_of(database, table)[0].status == DeliveryStatus.pending


def test_those_who_hang_leave_half_of_the_senders_to_the_others(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    receiver.behaviours = {f"/{number}": hangs for number in range(10)}
    for path in receiver.behaviours:
        an_endpoint(database, receiver.url + path)
    an_endpoint(database, receiver.url + "/good")
    happen(database, 1)
    stopping = threading.Event()
    sender = a_sender(slots=4, stopping=stopping)
    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(sender.work) for _ in range(4)]
        happen(database, 30)
        with database.write() as tx:  # it has proved itself before
            from shared.tables import receivers as receiver_rows

            good = [row.id for row in rows_of(database, endpoint_rows) if row.url.endswith("/good")]
            tx.execute(update(receiver_rows).where(receiver_rows.c.id.in_(good)).values(window=16))
        while not stopping.wait(0.05):
            working.append(pool.submit(sender.work))
            came = sum(letter.path == "/good" for letter in receiver.letters)
            if came >= 31:
                stopping.set()  # first: else those who no longer hang get more and more
                receiver.closed.set()
    assert sum(letter.path != "/good" for letter in receiver.letters) <= 12


def test_an_end_that_the_database_would_not_take_is_written_down_when_it_is_back(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch
) -> None:
    an_endpoint(database, receiver.url)
    happen(database)
    real, times = deliveries.settle, iter(range(3))

    def away(*arguments: Any) -> Any:
        if next(times, None) is not None:
            raise OperationalError("", None, Exception("away"))
        return real(*arguments)

    monkeypatch.setattr(deliveries, "settle", away)
    monkeypatch.setattr(Sender, "AWAY_PAUSE_SECONDS", 0.01)
    a_sender().work()
    assert rows_of(database, table)[0].status == DeliveryStatus.delivered
    assert len(receiver.letters) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "least_tries"),
    [(12, 7), (300, 1)],  # so many wait there that, one at a time, not all had a try while it was down
)
def test_everything_arrives_at_a_receiver_that_was_down_for_three_days(
    count: int,
    least_tries: int,
    database: Database,
    receiver: Receiver,
    a_sender: Callable[..., Sender],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receiver.behaviour = says(503)
    _, secret = an_endpoint(database, receiver.url)
    happen(database, count)
    begun, passed, read = time.time(), 0.0, 0

    class Then(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(begun + passed, tz)

    monkeypatch.setattr("standardwebhooks.webhooks.datetime", Then)  # it allows for five minutes
    sender = a_sender(clock=lambda: begun + passed)

    def work() -> None:
        nonlocal read
        sender.work()
        for letter in receiver.letters[read:]:  # each try is signed anew
            assert letter.headers["webhook-timestamp"] == str(int(begun + passed))
            assert Webhook(secret).verify(letter.body, letter.headers) == letter.told
        read = len(receiver.letters)

    while passed < 3 * DAY:
        work()
        step = 60.0 if passed < 7200 else 1800.0
        pass_time(database, step)
        passed += step
    assert {row.status for row in rows_of(database, table)} == {DeliveryStatus.pending}
    down = len(receiver.letters)
    receiver.behaviour = says(200)
    longest = max(deliveries.PAUSES) * (1 + deliveries.MOST_JITTER) + 1800
    while {row.status for row in rows_of(database, table)} != {DeliveryStatus.delivered}:
        assert passed < 3 * DAY + longest
        pass_time(database, 1800.0)
        passed += 1800.0
        work()
    came = Counter(letter.id for letter in receiver.letters)
    assert len(came) == count and len(receiver.letters) == down + count
    tries = Counter(row.delivery_id for row in rows_of(database, delivery_tries))
    assert all(least_tries <= made <= len(deliveries.PAUSES) for made in tries.values())


def test_however_much_waits_for_an_endpoint_its_end_is_short(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redelivery, "MOST_AT_ONCE", 3)
    endpoint_id, _ = an_endpoint(database, receiver.url)
    sender = a_sender()
    happen(database, 12)
    with database.write() as tx:
        endpoints.disable(tx, endpoint_id, Disabled.by_hand)
    statuses = Counter(row.status for row in rows_of(database, table))
    assert statuses == {DeliveryStatus.failed: 3, DeliveryStatus.pending: 9}  # the lock was not held for more
    sender.work()
    assert {row.status for row in rows_of(database, table)} == {DeliveryStatus.failed}
    assert receiver.letters == [] and len(rows_of(database, delivery_tries)) <= 4


def test_all_that_waits_goes_to_the_new_url(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redelivery, "MOST_AT_ONCE", 2)
    endpoint_id, _ = an_endpoint(database, "http://old.example/")
    sender = a_sender()
    happen(database, 5)
    with database.write() as tx:
        endpoints.hold(tx, "prj_a", endpoint_id)
        endpoints.change(tx, endpoint_id, url=receiver.url)
    assert Counter(row.url for row in rows_of(database, table)) == {receiver.url: 2, "http://old.example/": 3}
    sender.work()
    assert len(receiver.letters) == 5
    assert {(row.url, row.status) for row in rows_of(database, table)} == {(receiver.url, DeliveryStatus.delivered)}


def test_a_try_is_said_with_the_id_of_its_jobs_request(
    database: Database, receiver: Receiver, a_sender: Callable[..., Sender]
) -> None:
    an_endpoint(database, receiver.url)
    happen(database, request_id="req_a")
    with written() as lines:
        a_sender().work()
    [line] = lines.as_json(logger="worker.sender")
    [event] = rows_of(database, events)
    assert (line["message"], line["event_id"]) == ("the try ended", event.id)
    assert (line["job_id"], line["request_id"]) == (event.subject_id, "req_a")


@pytest.mark.usefixtures("a_sender")  # and its projects
def test_a_delivery_whose_sender_died_is_said_with_the_id_of_its_jobs_request(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lapses, "PAUSE_SECONDS", 0.0)
    an_endpoint(database, receiver.url)
    happen(database, request_id="req_a")
    with database.write() as tx:
        assert deliveries.claim(tx, "w", limit=1, probes=1)
        tx.execute(update(table).values(lease_until=now(-1)))
    sweep = Sweep(database, DatabaseImageStore(database), Bell(Celery()), [], Feed(database), max_crashes=3)
    with written() as lines:
        sweep.rescue_deliveries()
    [line] = lines.as_json(logger="worker.sweep")
    [event] = rows_of(database, events)
    assert (line["job_id"], line["event_id"], line["request_id"]) == (event.subject_id, event.id, "req_a")
