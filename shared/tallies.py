"""What is counted for /metrics: a small table of amounts that only grow, or follow what stands in other tables.

The sweep's process folds into it what happened (worker/tallying.py); the API shows it (api/metrics.py). So a scrape
reads a hundred rows, however many jobs there are, and every API process says the same. Whoever submits or claims never
touches it.
"""

from bisect import bisect_left
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from shared.tables import tallies

#: What is counted, and of what: ("attempts", "dataoorts", "failed").
Series = tuple[str, ...]

#: Upper bounds of how long a job took to start or to end, in seconds; the last has none.
BOUNDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)
#: Where the sum of a histogram stands, in milliseconds, beside its buckets.
SUM = "sum"
#: When the sweep was seen last that ended in good order, in milliseconds since 1970: its row went with it.
SWEPT: Series = ("swept",)


def buckets() -> list[str]:
    """The histogram's buckets, each by its upper bound as Prometheus writes it."""
    return [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]


def took(of: Series, began: datetime, ended: datetime) -> dict[Series, int]:
    """One duration, as a histogram counts it. A clock that was set back counts as no time at all."""
    seconds = max((ended - began).total_seconds(), 0.0)
    return {(*of, buckets()[bisect_left(BOUNDS, seconds)]): 1, (*of, SUM): round(seconds * 1000)}


def add(tx: Connection, amounts: Mapping[Series, int]) -> None:
    """Add to the tallies, in the transaction that marks as tallied what is counted here: so it is counted once."""
    # In one order, the last locks of their transaction: two sweeps wait for each other, and never in a circle.
    rows = [{"series": "/".join(series), "amount": amount} for series, amount in sorted(amounts.items()) if amount]
    if rows:
        dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
        given = dialect.insert(tallies)
        more = {"amount": tallies.c.amount + given.excluded.amount}
        tx.execute(given.values(rows).on_conflict_do_update(index_elements=[tallies.c.series], set_=more))


def put(tx: Connection, series: Series, amount: int) -> None:
    """In place of what stood there."""
    dialect = sqlite if tx.dialect.name == "sqlite" else postgresql
    row = dialect.insert(tallies).values(series="/".join(series), amount=amount)
    tx.execute(row.on_conflict_do_update(index_elements=[tallies.c.series], set_={"amount": amount}))


def read(connection: Connection) -> dict[Series, int]:
    """All of them."""
    return {tuple(row.series.split("/")): row.amount for row in connection.execute(select(tallies))}


def read_one(connection: Connection, series: Series) -> int:
    """0 for what was never counted."""
    return connection.scalar(select(tallies.c.amount).where(tallies.c.series == "/".join(series))) or 0
