"""Who is at work, as the others see it."""

from sqlalchemy import select, update

from shared.database import Database, now
from shared.tables import workers
from worker import presence


def test_a_worker_shows_itself_renews_and_leaves(database: Database) -> None:
    with database.write() as tx:
        presence.show(tx, "a:1", "dataoorts", 200, None)
        presence.show(tx, "b:2", "dataoorts", 100, 1.5)
        tx.execute(update(workers).values(seen_at=now(-60)))
        presence.show(tx, "a:1", "dataoorts", 200, 2.5)
        presence.leave(tx, "b:2")
        [row] = tx.execute(select(workers)).all()
        assert (row.name, row.backend, row.slots, row.seconds) == ("a:1", "dataoorts", 200, 2.5)
        assert row.seen_at > tx.scalar(select(now(-10)))


def test_a_worker_that_never_said_goodbye_is_forgotten_after_a_day(database: Database) -> None:
    with database.write() as tx:
        presence.show(tx, "dead:1", "dataoorts", 200, None)
        tx.execute(update(workers).values(seen_at=now(-25 * 3600)))
        presence.show(tx, "alive:1", "dataoorts", 200, None)
        presence.forget_the_dead(tx)
        assert list(tx.scalars(select(workers.c.name))) == ["alive:1"]
