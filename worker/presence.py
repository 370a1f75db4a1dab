"""Who is at work: each worker's row, renewed with every heartbeat, so that others know how many slots there are."""

from sqlalchemy import Connection, delete
from sqlalchemy.dialects import postgresql, sqlite

from shared.database import now
from shared.tables import workers

#: A row that nobody renewed for a day belongs to a worker that never said goodbye.
FORGOTTEN_SECONDS = 24 * 3600


def show(tx: Connection, name: str, backend: str, slots: int, seconds: float | None) -> None:
    """This worker is there. `seconds`: what its latest attempts took on average."""
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    values = {"slots": slots, "seconds": seconds, "seen_at": now()}
    row = dialect.insert(workers).values(name=name, backend=backend, **values)
    tx.execute(row.on_conflict_do_update(index_elements=[workers.c.name, workers.c.backend], set_=values))


def leave(tx: Connection, name: str) -> None:
    """It ends in good order."""
    tx.execute(delete(workers).where(workers.c.name == name))


def forget_the_dead(tx: Connection) -> int:
    """Returns how many."""
    return tx.execute(delete(workers).where(workers.c.seen_at < now(-FORGOTTEN_SECONDS))).rowcount
