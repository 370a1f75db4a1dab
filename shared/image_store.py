"""Where pictures are kept: put first and committed, under (job, attempt); only then does a job point at one.

So there is no succeeded job without a readable picture, a second picture of the same job harms nobody, and no
large write happens while a job's row is locked. What nothing points at is swept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Row, delete, insert, literal, select, tuple_
from sqlalchemy.exc import IntegrityError

from shared.database import Database, now
from shared.tables import images


@dataclass(frozen=True, slots=True)
class Image:
    """A stored picture, without its bytes. Sizes in pixels; `bytes` is its length; `sha256` in hex."""

    job_id: str
    attempt: int
    content_type: str
    width: int
    height: int
    bytes: int
    sha256: str
    warnings: list[dict[str, str]]


class ImageStore(Protocol):
    def put(self, image: Image, data: bytes) -> None:
        """Keep a picture, for good once this returns. Putting the same (job, attempt) again changes nothing."""

    def get(self, job_id: str, attempt: int) -> bytes | None:
        """The bytes as they were put; None if there are none."""

    def of_job(self, job_id: str) -> list[Image]:
        """Every picture that was put for a job, oldest attempt first: at most one is the job's own."""

    def page(self, after: tuple[str, int], limit: int) -> list[tuple[str, int]]:
        """The (job, attempt) of the next pictures in that order, for the sweep's walk over all of them."""

    def remove(self, job_id: str, attempt: int) -> None:
        """Forget a picture. Not being there is fine."""


_PUT = insert(images).values(created_at=now())  # built once: that takes longer than to run it
_DESCRIPTION: Sequence[Any] = [column for column in images.c if column.name not in ("data", "created_at")]


class DatabaseImageStore:
    """Pictures in a table of their own. Enough for one machine; each is read and written whole."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, image: Image, data: bytes) -> None:
        values = {name: getattr(image, name) for name in Image.__slots__}
        try:
            with self._database.write() as tx:
                tx.execute(_PUT, {**values, "data": data})
        except IntegrityError:
            # It is there already: the first try was committed, and its answer lost.
            pass

    def get(self, job_id: str, attempt: int) -> bytes | None:
        with self._database.read() as connection:
            query = select(images.c.data).where(images.c.job_id == job_id, images.c.attempt == attempt)
            return connection.scalar(query)

    def of_job(self, job_id: str) -> list[Image]:
        with self._database.read() as connection:
            query = select(*_DESCRIPTION).where(images.c.job_id == job_id).order_by(images.c.attempt)
            return [_image(row) for row in connection.execute(query)]

    def page(self, after: tuple[str, int], limit: int) -> list[tuple[str, int]]:
        place = tuple_(images.c.job_id, images.c.attempt)
        query = (
            select(images.c.job_id, images.c.attempt)
            .where(place > tuple_(*map(literal, after)))
            .order_by(*images.primary_key)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [(row.job_id, row.attempt) for row in connection.execute(query)]

    def remove(self, job_id: str, attempt: int) -> None:
        with self._database.write() as tx:
            tx.execute(delete(images).where(images.c.job_id == job_id, images.c.attempt == attempt))


def _image(row: Row[Any]) -> Image:
    return Image(**row._mapping)


def open_image_store(setting: str, database: Database) -> ImageStore:
    """The store that the setting IMAGE_STORE names."""
    if setting != "database":
        raise ValueError(f"no image store is called {setting}")
    return DatabaseImageStore(database)
