"""The project's feed: every event gets a number, after its commit, so that whoever reads on from a number misses none.

Ids and serials are given before a commit, and transactions commit in another order than they began: a reader who has
seen 7 would never see a 6 that comes late. So nobody who makes an event numbers it, and no counter stands in their way.
"""

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select, update

from shared import deliveries
from shared.announcements import Listener
from shared.database import AWAY, Database
from shared.tables import events, projects
from worker import tallying

log = logging.getLogger(__name__)

#: Events in one transaction.
AT_MOST = 500

_NUMBER = (
    update(events)
    .where(events.c.subject_id == bindparam("its_subject"), events.c.sequence == bindparam("its_sequence"))
    .values(number=bindparam("its_number"))
)


class Feed:
    """Numbers the events of all projects, and makes the deliveries that each of them leads to."""

    def __init__(self, database: Database, planned: Callable[[int], None] = lambda count: None) -> None:
        """`planned`: called after the commit with how many deliveries were made."""
        self._database = database
        self._planned = planned

    def round(self) -> int:
        """Number what is not numbered yet, AT_MOST at once; returns how many, and 0 without having locked anything."""
        waiting = select(events.c.subject_id).where(events.c.number.is_(None)).order_by(events.c.created_at)
        with self._database.read() as connection:
            subjects = set(connection.scalars(waiting.limit(AT_MOST)))
        if not subjects:
            return 0
        with self._database.write() as tx:
            numbered, planned = self._number(tx, subjects)
        if planned:
            self._planned(planned)
        return numbered

    def _number(self, tx: Connection, subjects: set[str]) -> tuple[int, int]:
        # One at a time: whoever holds the projects' rows gives the numbers, and others see them once it has committed.
        numbered = select(projects.c.id, projects.c.feed).order_by(projects.c.id).with_for_update(key_share=True)
        feeds = {project.id: project.feed for project in tx.execute(numbered)}
        before = dict(feeds)
        # Read under the lock, and all that their subjects have: none of a subject's events overtakes an earlier one.
        open_ones = select(events).where(events.c.subject_id.in_(subjects), events.c.number.is_(None))
        rows = _in_order(tx.execute(open_ones.order_by(events.c.created_at, events.c.id)).all())
        rows = [row for row in rows if row.project_id in feeds]
        numbers = []
        for row in rows:
            feeds[row.project_id] += 1
            place = {"its_subject": row.subject_id, "its_sequence": row.sequence}
            numbers.append({**place, "its_number": feeds[row.project_id]})
        if not rows:
            return 0, 0
        tx.execute(_NUMBER, numbers)
        for project_id in sorted(feeds):
            if feeds[project_id] != before[project_id]:
                tx.execute(update(projects).where(projects.c.id == project_id).values(feed=feeds[project_id]))
                tx.info["moved"].append(project_id)  # announced after the commit: its streams are woken
        planned = deliveries.plan(tx, rows)
        tallying.of_events(tx, rows)
        return len(rows), planned


def _in_order(rows: Sequence[Row[Any]]) -> list[Row[Any]]:
    """In the order of their times, but each subject's in that of its sequence, whatever the clock did."""
    queues: dict[str, deque[Row[Any]]] = defaultdict(deque)
    for row in sorted(rows, key=lambda row: row.sequence):
        queues[row.subject_id].append(row)
    return [queues[row.subject_id].popleft() for row in rows]


class FeedClerk:
    """Numbers events as soon as Redis tells of them, in a thread of its own. What it misses the sweep finds."""

    #: Events that come together are numbered together.
    PAUSE_SECONDS = 0.05

    def __init__(self, feed: Feed, listen: Callable[[Callable[[str | None], None]], Listener]) -> None:
        """`listen` makes the listener, given what it calls."""
        self._feed = feed
        self._listener = listen(self._hear)
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def start(self) -> None:
        self._listener.start()
        self._thread.start()

    def close(self) -> None:
        self._listener.close()
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=10)

    def _hear(self, subject_id: str | None) -> None:
        if subject_id is None or not subject_id.startswith("prj_"):  # those are told by the feed itself
            self._wake.set()

    def _run(self) -> None:
        while self._wake.wait() and not self._closed.is_set():
            self._wake.clear()
            try:
                while self._feed.round() >= AT_MOST:  # more, where a subject has many
                    pass
            except AWAY as error:
                log.warning("events could not be numbered, the database is away (%s)", type(error).__name__)
            except Exception:
                log.exception("events could not be numbered")
            self._closed.wait(self.PAUSE_SECONDS)
