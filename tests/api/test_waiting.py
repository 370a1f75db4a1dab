"""The waiting places: who is woken, who is not, and how a wait ends."""

import socket
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import OperationalError

from api.waiting import Waiting, preferred_wait, standing
from shared.announcements import Listener
from shared.database import Database, now
from shared.tables import projects
from tests import lives
from tests.service import eventually
from worker.feed import Feed


class SilentListener(Listener):
    """A subscription that never hears anything."""

    def __init__(self, heard: Callable[[str | None], None], progressed: Callable[[str], None]) -> None:
        self.started = 0

    def start(self) -> None:
        self.started += 1

    def close(self) -> None: ...


def waiting(places: int = 2) -> Waiting:
    return Waiting(SilentListener, lambda subjects: {}, places, 2)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("wait=10", 10),
        ("wait=0", 0),
        ("wait=61", 60),
        ("wait=999999999", 60),
        ("WAIT = 5", 5),
        ('wait="7"', 7),
        ("respond-async, wait=3", 3),
        ("wait=3; foo=bar", 3),
        ("wait=1, wait=2", 1),
        ('foo="a, wait=5, b"', None),
        ('foo="a, wait=5, b", wait=3', 3),
        ('foo="a\\", wait=5, b", wait=3; bar="x, y", wait=4', 3),
        ('foo="a, wait=5', None),
        ("wait", None),
        ("wait=", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        ("wait=soon", None),
        ("wait=9999999999", 60),
        ("wait=\N{ARABIC-INDIC DIGIT ONE}", None),
        ("handling=lenient", None),
        ("", None),
        (None, None),
    ],
)
def test_a_preference_that_makes_no_sense_is_ignored(header: str | None, seconds: int | None) -> None:
    assert preferred_wait(header) == seconds


def test_what_is_enough_already_is_not_waited_for() -> None:
    found, waited = waiting().until("job_a", 60, lambda: "succeeded", lambda found: True)
    assert (found, waited) == ("succeeded", True)


def test_a_wait_is_woken_by_its_job_and_not_by_others() -> None:
    places = waiting()
    reads: list[float] = []
    first_read, state = threading.Event(), "running"

    def read() -> str:
        reads.append(time.monotonic())
        first_read.set()
        return state

    result: list[tuple[str, bool]] = []
    thread = threading.Thread(
        target=lambda: result.append(places.until("job_a", 3600, read, lambda found: found == "succeeded"))
    )
    thread.start()
    assert first_read.wait(60)
    places.wake("job_b")
    assert len(reads) == 1
    state = "succeeded"
    places.wake("job_a")
    thread.join(60)
    assert result == [("succeeded", True)]


class Standing:
    """What the look-out sees: how far each subject has come. `asked`: for what it asked, each time.

    It sees nothing before `may_see` is set, as it is at first.
    """

    def __init__(self, **seen: int) -> None:
        self.seen = seen
        self.asked: list[list[str]] = []
        self.trouble: list[Exception] = []
        self.may_see = threading.Event()
        self.may_see.set()

    def __call__(self, subjects: Sequence[str]) -> dict[str, int]:
        self.asked.append(sorted(subjects))
        assert self.may_see.wait(60)
        if self.trouble:
            raise self.trouble.pop()
        return {subject: self.seen[subject] for subject in subjects if subject in self.seen}


@pytest.fixture
def standing_now(monkeypatch: pytest.MonkeyPatch) -> Standing:
    monkeypatch.setattr("api.waiting.READ_AGAIN", 0.01)
    return Standing(job_a=1, job_b=1, prj_a=7)


def test_a_wait_that_nothing_woke_is_woken_by_the_look_out_once_its_job_has_come_further(
    standing_now: Standing,
) -> None:
    places = Waiting(SilentListener, standing_now, 2, 2)
    reads = 0

    def read() -> bool:
        nonlocal reads
        reads += 1
        if reads == 2:  # the first look: nobody knows whether the job has moved since it was read
            standing_now.seen["job_a"] = 2
        return reads == 3

    assert places.until("job_a", 60, read, bool) == (True, True)
    places.close()
    places.join()


def test_the_look_out_asks_for_all_at_once_and_wakes_who_is_concerned(standing_now: Standing) -> None:
    places = Waiting(SilentListener, standing_now, 2, 4)
    standing_now.may_see.clear()  # whose job was looked at before he came is woken by no first look
    taken = [places.stream(subject, None) for subject in ("job_a", "job_a", "job_b", "prj_a")]
    standing_now.may_see.set()
    first, second, other, feed = [place for place in taken if place is not None]
    for place in (first, second, other, feed):
        assert place.wait(60)
    standing_now.seen["prj_a"] = 8
    assert feed.wait(60)
    assert not any(place.bell.is_set() for place in (first, second, other))
    standing_now.seen["job_a"] = 2
    assert first.wait(60) and second.wait(60)
    assert not other.bell.is_set() and not feed.bell.is_set()
    assert ["job_a", "job_b", "prj_a"] in standing_now.asked
    places.close()
    places.join()


def test_a_look_that_fails_is_followed_by_another(standing_now: Standing, caplog: pytest.LogCaptureFixture) -> None:
    standing_now.trouble = [RuntimeError("a fault"), OperationalError("SELECT", None, Exception("it is away"))]
    places = Waiting(SilentListener, standing_now, 2, 2)
    place = places.stream("job_a", None)
    assert place is not None and place.wait(60)
    assert len(standing_now.asked) >= 3
    assert "nobody can look" in caplog.text and "a fault" in caplog.text
    places.close()
    places.join()


def test_the_look_out_ends_with_the_process_and_asks_nothing_while_nobody_waits(standing_now: Standing) -> None:
    places = Waiting(SilentListener, standing_now, 2, 2)
    places.close()
    places.join()  # it never began
    places = Waiting(SilentListener, standing_now, 2, 2)
    place = places.stream("job_a", None)
    assert place is not None and place.wait(60)
    place.leave()
    standing_now.asked.clear()
    places.until("job_b", 0.2, lambda: False, bool)
    assert all(asked == ["job_b"] for asked in standing_now.asked[1:])
    places.close()
    places.join()
    assert not places._look_out.is_alive()


def test_a_stream_whose_client_has_hung_up_is_over(standing_now: Standing) -> None:
    places = Waiting(SilentListener, standing_now, 2, 2)
    ours, theirs = socket.socketpair()
    other_end, stays = socket.socketpair()
    with ours, theirs, other_end, stays:
        place, neighbour = places.stream("job_none", ours), places.stream("job_none", other_end)
        assert place is not None and neighbour is not None
        theirs.close()
        assert place.wait(60) and place.is_over
        states = [neighbour.is_over]
        places.close()
        assert neighbour.wait(60) and [*states, neighbour.is_over] == [False, True]
    places.join()


def test_a_wait_whose_client_hangs_up_after_a_look_gives_its_place_back(standing_now: Standing) -> None:
    """And the next look-out sees it: nothing else wakes the wait, whose job stands still."""
    places = Waiting(SilentListener, standing_now, 1, 2)
    ours, theirs = socket.socketpair()
    reads = threading.Event()
    with ours, theirs:
        thread = threading.Thread(
            target=places.until, args=("job_a", 3600, reads.set, bool), kwargs={"connection": ours}, daemon=True
        )
        thread.start()
        assert reads.wait(60)
        eventually("it has been looked at, and stands still", lambda: len(standing_now.asked) > 3, 60)
        assert thread.is_alive()
        theirs.close()
        thread.join(60)
        assert not thread.is_alive()
    assert places.until("job_b", 0, lambda: "queued", lambda found: False) == ("queued", True)
    places.close()
    places.join()


def test_streams_and_waits_have_places_apart() -> None:
    places = Waiting(SilentListener, lambda subjects: {}, 1, 1)
    stream = places.stream("job_a", None)
    assert stream is not None and places.stream("job_a", None) is None
    assert places.until("job_a", 0.01, lambda: "running", lambda found: False) == ("running", True)
    stream.leave()
    assert places.stream("job_a", None) is not None
    places.close()
    assert places.stream("job_b", None) is None
    places.join()


def test_it_is_seen_how_far_jobs_and_feeds_have_come(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.waiting.CHUNK", 2)
    with database.write() as tx:
        tx.execute(insert(projects).values(id="prj_a", name="a", created_at=now()))
    made = [lives.submit(database).id for _ in range(3)]
    claimed = lives.claim_one(database).job_id
    wanted = {job_id: 2 if job_id == claimed else 1 for job_id in made}
    assert standing(database, [*made, "prj_a", "job_none"]) == wanted | {"prj_a": 0}
    Feed(database).round()
    assert standing(database, ["prj_a"]) == {"prj_a": 4}
    assert standing(database, []) == {}


def test_a_wait_ends_with_its_time() -> None:
    found, waited = waiting().until("job_a", 0.05, lambda: "running", lambda found: False)
    assert (found, waited) == ("running", True)


def test_when_the_database_goes_away_a_wait_ends_with_what_was_read_last() -> None:
    places, answers = waiting(), ["running"]

    def read() -> str:
        places.wake("job_a")  # the next look comes at once
        if answers:
            return answers.pop()
        raise OperationalError("SELECT", None, Exception("it is away"))

    assert places.until("job_a", 60, read, lambda found: False, known="queued") == ("running", True)
    assert places.until("job_a", 60, read, lambda found: False, known="queued") == ("queued", True)
    with pytest.raises(OperationalError):
        places.until("job_a", 60, read, lambda found: False)


def test_when_no_place_is_free_the_answer_comes_at_once() -> None:
    places = waiting(places=1)
    inside, leave = threading.Event(), threading.Event()

    def read() -> bool:
        inside.set()
        return leave.is_set()

    thread = threading.Thread(target=places.until, args=("job_a", 3600, read, bool))
    thread.start()
    assert inside.wait(60)
    assert places.until("job_b", 60, lambda: "running", lambda found: False) == ("running", False)
    leave.set()
    places.wake("job_a")
    thread.join(60)
    assert places.until("job_b", 0.01, lambda: "running", lambda found: False) == ("running", True)


def test_every_wait_ends_when_the_process_stops() -> None:
    places = waiting()
    inside = threading.Event()
    thread = threading.Thread(target=places.until, args=("job_a", 3600, inside.set, lambda found: False))
    thread.start()
    assert inside.wait(60)
    places.close()
    thread.join(60)
    assert not thread.is_alive()
    assert places.until("job_a", 60, lambda: "running", lambda found: False) == ("running", False)


def test_the_subscription_begins_with_the_first_wait() -> None:
    listeners: list[SilentListener] = []

    def listen(heard: Callable[[str | None], None], progressed: Callable[[str], None]) -> Listener:
        listeners.append(SilentListener(heard, progressed))
        return listeners[0]

    places = Waiting(listen, lambda subjects: {}, 2, 2)
    assert listeners[0].started == 0
    for _ in range(2):
        places.until("job_a", 0, lambda: None, lambda found: True)
    assert listeners[0].started == 1
