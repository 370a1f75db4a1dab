"""Waiting for a job, or for a project's feed, without asking again and again: places that are woken when it moves.

Whoever waits takes a place first, then reads, then waits: so what happens in between is not missed. Every second or
two one look-out a process asks for all that is waited for at once, because a subscription can be silent for other
reasons than silence. No database connection is held while waiting.
"""

import logging
import random
import re
import select as polling
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar
from urllib.request import parse_http_list

from sqlalchemy import BindParameter, bindparam, select

from shared.announcements import Listener
from shared.database import AWAY, Database
from shared.tables import jobs, projects

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_WAIT = 60  # seconds
READ_AGAIN = 1.5  # seconds, on average
#: For jitter. Its own: the dice that a process has in common are nobody's to draw from in a thread.
_dice = random.Random()

#: What is asked for in one statement.
CHUNK = 500

_ASKED_FOR: BindParameter[list[str]] = bindparam("asked_for", expanding=True)
_STANDING = (
    select(jobs.c.id, jobs.c.sequence)
    .where(jobs.c.id.in_(_ASKED_FOR))
    .union_all(select(projects.c.id, projects.c.feed).where(projects.c.id.in_(_ASKED_FOR)))
)

#: Linux alone tells of a connection whose other end has closed; elsewhere only one that was broken is noticed.
_GONE = polling.POLLHUP | polling.POLLERR | getattr(polling, "POLLRDHUP", 0)

_PREFERENCE = re.compile(r'\s*wait\s*=\s*(?:([0-9]{1,30})|"([0-9]{1,30})")\s*(?:;.*)?', re.IGNORECASE)


def preferred_wait(header: str | None) -> int | None:
    """The seconds of `Prefer: wait=N` (RFC 7240), at most 60. None if it is absent or makes no sense: then ignored."""
    for preference in parse_http_list(header or ""):  # which knows that a comma in quotes ends nothing
        if match := _PREFERENCE.fullmatch(preference):
            return min(int(match[1] or match[2]), LONGEST_WAIT)
    return None


def standing(database: Database, subjects: Sequence[str]) -> dict[str, int]:
    """How far each of these jobs and projects has come: the number of its latest event."""
    found: dict[str, int] = {}
    with database.read() as connection:
        for start in range(0, len(subjects), CHUNK):
            asked_for = subjects[start : start + CHUNK]
            found.update({row.id: row.sequence for row in connection.execute(_STANDING, {"asked_for": asked_for})})
    return found


class Place:
    """Where somebody waits for one job or one project.

    `hears_progress`: it is also woken by hints of how far the job is; `has_progressed` says that there was one.
    """

    def __init__(
        self,
        subject: str,
        free: Callable[["Place"], None],
        connection: socket.socket | None,
        hears_progress: bool = False,
    ) -> None:
        """`free` is called when it is left. `connection`: that of a client who may hang up meanwhile."""
        self.subject = subject
        self.connection = connection
        self.hears_progress = hears_progress
        self.has_progressed = False
        self.has_moved = False
        self.bell = threading.Event()
        self.is_over = False
        self._free = free

    def wait(self, seconds: float) -> bool:
        """Until it is woken, or the time is over. Returns whether there may be news. Read after it."""
        if not self.bell.wait(max(seconds, 0)):
            return False  # and a bell that rings only now is kept for the next time
        self.bell.clear()
        moved, self.has_moved = self.has_moved, False
        return moved

    def wake(self) -> None:
        """There may be news."""
        self.has_moved = True
        self.bell.set()

    def hint(self) -> None:
        """The job is further than it was."""
        self.has_progressed = True
        self.bell.set()

    def end(self) -> None:
        """There is nothing left to wait for: the process stops, or the client is gone."""
        self.is_over = True
        self.wake()

    def leave(self) -> None:
        self._free(self)


class Waiting:
    """The waiting places of this process, and the one subscription and the one look-out that wake them."""

    def __init__(
        self,
        listen: Callable[[Callable[[str | None], None], Callable[[str], None]], Listener],
        look: Callable[[Sequence[str]], Mapping[str, int]],
        places: int,
        stream_places: int,
    ) -> None:
        """`listen` makes the listener, given what it calls with moves and with hints of progress; `look` says how far
        jobs and projects have come.

        `places`: how many may wait for an answer at once; `stream_places`: how many streams may be open beside them.
        """
        self._listener = listen(self._hear, self._hear_progress)
        self._look = look
        self._free = threading.BoundedSemaphore(places)
        self._free_streams = threading.BoundedSemaphore(stream_places)
        self._lock = threading.Lock()
        self._places: dict[str, set[Place]] = {}
        self._seen: dict[str, int] = {}
        self._look_now = threading.Event()
        # Started with the first wait: a thread does not survive the fork that makes a process of the API.
        self._look_out = threading.Thread(target=self._keep_looking, name="look-out", daemon=True)
        self._started = False
        self._closed = False

    def until(
        self,
        job_id: str,
        seconds: float,
        read: Callable[[], T],
        enough: Callable[[T], bool],
        *,
        connection: socket.socket | None = None,
        known: T | None = None,
        reserved: bool = False,
    ) -> tuple[T, bool]:
        """Read until it is enough, or the time is over. Returns what was read last, and whether there was a place.

        `connection`: that of the client, who waits no more when he has hung up: his place is another's.
        `known`: what was read before. While the database is away, what is known is all there is to say, and the wait
        ends; who knows nothing yet raises AWAY. `reserved`: the caller has a place, by `reserve()`.
        """
        with self._place(job_id, connection, None if reserved else self._free) as place:
            found = known
            deadline = time.monotonic() + seconds
            try:
                found = read()
                while place is not None and not enough(found) and not place.is_over:
                    if (left := deadline - time.monotonic()) <= 0:
                        break
                    place.wait(left)
                    found = read()
            except AWAY as error:
                if found is None:
                    raise
                log.warning("a wait was cut short (%s)", type(error).__name__)
            return found, place is not None

    def reserve(self) -> Callable[[], None] | None:
        """A place for who does not know yet for which job. Returns what gives it back; None if none is free."""
        if self._closed or not self._free.acquire(blocking=False):
            return None
        return self._free.release

    def stream(self, subject: str, connection: socket.socket | None) -> Place | None:
        """A place for a stream, to be left by `leave()`; None if none is free."""
        return self._take(subject, self._free_streams, connection, hears_progress=True)

    def wake(self, subject: str) -> None:
        """This job, or the feed of this project, has moved."""
        with self._lock:
            places = list(self._places.get(subject, ()))
        for place in places:
            place.wake()

    def close(self) -> None:
        """The process stops: every wait and every stream ends now."""
        self._closed = True
        self._listener.close()
        self._look_now.set()
        for place in self._all():
            place.end()

    def join(self) -> None:
        """After close(): until nobody here looks into the database any more."""
        with self._lock:
            started = self._started
        if started:
            self._look_out.join()

    @contextmanager
    def _place(
        self, job_id: str, connection: socket.socket | None, free: threading.Semaphore | None
    ) -> Iterator[Place | None]:
        place = self._take(job_id, free, connection)
        try:
            yield place
        finally:
            if place is not None:
                place.leave()

    def _take(
        self,
        subject: str,
        free: threading.Semaphore | None,
        connection: socket.socket | None,
        hears_progress: bool = False,
    ) -> Place | None:
        if self._closed or (free is not None and not free.acquire(blocking=False)):
            return None

        def leave(place: Place) -> None:
            with self._lock:
                self._places[subject].discard(place)
                if not self._places[subject]:
                    del self._places[subject]
                    self._seen.pop(subject, None)
            if free is not None:
                free.release()

        place = Place(subject, leave, connection, hears_progress)
        with self._lock:
            self._places.setdefault(subject, set()).add(place)
            if not self._started:
                self._started = True
                self._listener.start()
                self._look_out.start()
            place.is_over = self._closed  # close() may have passed by meanwhile
        return place

    def _all(self) -> list[Place]:
        with self._lock:
            return [place for places in self._places.values() for place in places]

    def _hear(self, subject: str | None) -> None:
        if subject is None:  # a subscription began: anything may have been missed
            self._look_now.set()
        else:
            self.wake(subject)

    def _hear_progress(self, job_id: str) -> None:
        with self._lock:
            places = [place for place in self._places.get(job_id, ()) if place.hears_progress]
        for place in places:
            place.hint()

    def _keep_looking(self) -> None:
        while not self._closed:
            self._look_now.wait(READ_AGAIN * _dice.uniform(0.7, 1.3))
            self._look_now.clear()
            try:
                self._look_around()
            except AWAY as error:
                log.warning("nobody can look whether jobs have moved (%s)", type(error).__name__)
            except Exception:
                # Whoever waits here relies on the next look.
                log.exception("the look-out failed")

    def _look_around(self) -> None:
        for place in _hung_up(self._all()):
            place.end()
        with self._lock:
            subjects = list(self._places)
        if not subjects or self._closed:
            return
        for subject, standing in self._look(subjects).items():
            with self._lock:
                # What nobody looked at before counts as moved: it may have, since whoever waits for it read it.
                moved = self._seen.get(subject) != standing
                if subject in self._places:
                    self._seen[subject] = standing
            if moved:
                self.wake(subject)


def _hung_up(places: Iterable[Place]) -> list[Place]:
    """Those whose client has closed its connection: else it would be noticed only by what is sent to it next."""
    poll = polling.poll()
    watched: dict[int, Place] = {}
    for place in places:
        number = -1 if place.connection is None else place.connection.fileno()
        if number >= 0:
            watched[number] = place
            poll.register(number, _GONE)
    return [watched[number] for number, _ in poll.poll(0)] if watched else []
