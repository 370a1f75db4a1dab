"""Who is at work: each worker's row, renewed with every heartbeat, so that others know how many slots there are."""

import os
import socket
from dataclasses import dataclass

from sqlalchemy import Connection, delete
from sqlalchemy.dialects import postgresql, sqlite

from shared import tallies
from shared.database import now
from shared.machine import machine
from shared.present import SWEEP
from shared.tables import workers

#: A row that nobody renewed for a day belongs to a worker that never said goodbye.
FORGOTTEN_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Progress:
    """What a worker tells of itself.

    `quiet_seconds`: how long nothing has moved in its slots; `deaf_seconds`: how long Celery's consumer has heard
    nothing of Redis (None: it has none); `trouble`: why it is stuck, if it is.
    """

    in_hand: int = 0
    done: int = 0
    quiet_seconds: float = 0.0
    deaf_seconds: float | None = None
    trouble: str | None = None


def own_name() -> str:
    """Of this process, in its row."""
    return f"{socket.gethostname()}:{os.getpid()}"


def show(
    tx: Connection, name: str, backend: str, slots: int, seconds: float | None, progress: Progress = Progress()
) -> None:
    """This worker is there. `seconds`: what its latest attempts took on average."""
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    values = {
        "slots": slots,
        "seconds": seconds,
        "seen_at": now(),
        "machine": machine(),
        "in_hand": progress.in_hand,
        "done": progress.done,
        "progressed_at": now(-progress.quiet_seconds),
        "heard_at": None if progress.deaf_seconds is None else now(-progress.deaf_seconds),
        "trouble": progress.trouble and progress.trouble[:300],
    }
    row = dialect.insert(workers).values(name=name, backend=backend, **values)
    tx.execute(row.on_conflict_do_update(index_elements=[workers.c.name, workers.c.backend], set_=values))


def leave(tx: Connection, name: str) -> None:
    """It ends in good order. Of the sweep it stays known when that was: whoever watches it is told of its age."""
    gone = delete(workers).where(workers.c.name == name).returning(workers.c.backend, workers.c.seen_at)
    for row in tx.execute(gone).all():
        if row.backend == SWEEP:
            tallies.put(tx, tallies.SWEPT, round(row.seen_at.timestamp() * 1000))


def forget_the_dead(tx: Connection) -> int:
    """Returns how many."""
    return tx.execute(delete(workers).where(workers.c.seen_at < now(-FORGOTTEN_SECONDS))).rowcount
