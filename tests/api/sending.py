"""What the sweep and a sender do to deliveries, by the verbs that they use; and many callers at once."""

import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import update

from shared import deliveries, endpoints
from shared.database import Database, now
from shared.deliveries import Claim, Result
from shared.tables import DeliveryStatus, TryOutcome, receivers
from shared.tables import deliveries as table
from worker.feed import Feed

HOOK = "https://hooks.example.com/darkroom"

TAKEN = Result(TryOutcome.delivered, seconds=0.25, status=204, answer="")
#: Its receiver asks for an hour: the five seconds before a second try may pass while a test stands still.
REFUSED = Result(TryOutcome.failed, seconds=0.5, status=500, answer="oh no", retry_after=3600)
UNREACHED = Result(TryOutcome.failed, seconds=15.0, error={"code": "timeout", "message": "No answer in 15 s."})
GIVEN_UP = Result(TryOutcome.failed, seconds=0.5, status=400, answer="never", final=True)
GONE = Result(TryOutcome.failed, seconds=0.5, status=410, answer="bye", gone=True)


class PostOffice:
    """Makes the deliveries of what happened, and ends their tries as it is told to."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._feed = Feed(database)

    def plan(self) -> None:
        """Number all that happened, and make the deliveries that it leads to."""
        while self._feed.round():
            pass

    def claim(self) -> list[Claim]:
        """All that is due, as far as its receivers take it; those that failed have rested."""
        with self._database.write() as tx:
            tx.execute(update(receivers).values(rest_until=None))
            return deliveries.claim(tx, "sender", limit=100, probes=100)

    def make_due(self) -> None:
        """The pauses before the next tries are over."""
        with self._database.write() as tx:
            tx.execute(update(table).where(table.c.status == DeliveryStatus.pending).values(due_at=now()))
            tx.execute(update(receivers).where(receivers.c.next_due_at.is_not(None)).values(next_due_at=now()))

    def settle(self, claim: Claim, result: Result) -> None:
        with self._database.write() as tx:
            reason = deliveries.settle(tx, claim, result)
            if reason is not None and claim.endpoint_id is not None:
                endpoints.disable(tx, claim.endpoint_id, reason)

    def send(self, result: Result = TAKEN) -> int:
        """Plan, and end a try of each that is due like this; returns how many tries there were."""
        self.plan()
        count = 0
        while claims := self.claim():
            for claim in claims:
                self.settle(claim, result)
            count += len(claims)
        return count


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """What so many threads get that call at the same time."""
    got: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            got[index] = call(index)
        except BaseException as error:  # noqa: BLE001  a thread has nobody else to tell
            got[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got
