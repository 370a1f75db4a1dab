"""What a picture starts from, as it is kept: the image that a job alters and its mask, with the job and as received.

Rows of the job's own, made in the transaction that accepts it and removed in the one that forgets it. The job's input
only describes them, so that neither a queue, an event nor a log ever carries a picture.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, String, bindparam, delete, insert, select

from shared.database import now
from shared.tables import inputs

Name = Literal["image", "mask"]


@dataclass(frozen=True, slots=True)
class Input:
    """One of them. `width` and `height` in pixels, as it is seen: upright. `sha256` of `data`, in hex."""

    name: Name
    content_type: str
    width: int
    height: int
    sha256: str
    data: bytes

    def description(self) -> dict[str, Any]:
        """What the job's input says of it."""
        return {
            "content_type": self.content_type,
            "width": self.width,
            "height": self.height,
            "bytes": len(self.data),
            "sha256": self.sha256,
        }


# Built once, as the moves are.
_KEEP = insert(inputs).values(created_at=now())
_READ = select(inputs.c.name, inputs.c.data).where(inputs.c.job_id == bindparam("its_id"))
_REMOVE = delete(inputs).where(inputs.c.job_id == bindparam("its_id"))
_OTHERS = [column for column in inputs.c if column.name != "job_id"]
_COPY = insert(inputs).from_select(
    ["job_id", *(column.name for column in _OTHERS)],
    select(bindparam("new_id", type_=String), *_OTHERS).where(inputs.c.job_id == bindparam("its_id")),
)


def keep(tx: Connection, job_id: str, given: Iterable[Input]) -> None:
    """Keep them with a job that this transaction makes."""
    for each in given:
        tx.execute(_KEEP, {"job_id": job_id, "name": each.name, "data": each.data, **each.description()})


def copy(tx: Connection, job_id: str, to: str) -> None:
    """Give another job the same ones: its own, so that what becomes of the first does not matter to it."""
    tx.execute(_COPY, {"its_id": job_id, "new_id": to})


def read(connection: Connection, job_id: str) -> dict[str, bytes]:
    """The bytes by name; nothing for a job that starts from nothing, or whose data were removed."""
    return {row.name: row.data for row in connection.execute(_READ, {"its_id": job_id})}


def remove(tx: Connection, job_id: str) -> None:
    """Forget them. There being none is fine."""
    tx.execute(_REMOVE, {"its_id": job_id})
