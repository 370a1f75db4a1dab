"""How an attempt is closed: one rule, for the worker that made it and for the one that finds its picture on a spool."""

from collections.abc import Callable

from sqlalchemy import Connection

from shared import jobs
from shared.database import Database
from shared.image_store import Image, ImageStore
from shared.jobs import Claim
from shared.tables import Billed, Outcome, Status
from worker.backends.base import Failure, Kind, Picture
from worker.room import Room

#: So many pictures are put at once, and how long the others wait for that. Less than a slot may wait (slots.py).
PUT_AT_ONCE, PATIENCE_SECONDS = 16, 5.0


def outcome_of(status: Status) -> Outcome:
    """How an attempt ended that made a picture, by where its job stands then."""
    return Outcome.canceled if status == Status.canceled else Outcome.succeeded


class Closing:
    """Puts pictures, points jobs at them, and settles what the attempts cost. All of it is safe to do twice."""

    def __init__(self, database: Database, images: ImageStore) -> None:
        self._database = database
        self._images = images
        self._room = Room(PUT_AT_ONCE)

    def with_picture(self, job_id: str, attempt: int, picture: Picture, claim: Claim | None = None) -> Status:
        """The picture ends its job unless the job has ended. Returns where the job stands then; raises AWAY.

        `claim`: the caller's own. Without one, or when it is the caller's no more, the picture is adopted.
        """
        image = self._put(job_id, attempt, picture)
        pointed_at: int | None = attempt
        with self._database.write() as tx:
            if (claim is not None and jobs.succeed(tx, claim, image)) or jobs.adopt(tx, image):
                status = Status.succeeded
            else:  # somebody else decided, or we did: this may be the second try at a commit whose answer was lost
                status, pointed_at = jobs.end_of(tx, job_id)
            jobs.close_attempt(tx, job_id, attempt, outcome_of(status), Billed.yes)
        if pointed_at != attempt:
            self._images.remove(job_id, attempt)
        return status

    def _put(self, job_id: str, attempt: int, picture: Picture) -> Image:
        with self._room.place(PATIENCE_SECONDS):
            data = picture.read()
            image = Image(
                job_id=job_id,
                attempt=attempt,
                content_type=picture.content_type,
                width=picture.width,
                height=picture.height,
                bytes=len(data),
                sha256=picture.sha256,
                warnings=[{"code": warning.code, "message": warning.message} for warning in picture.warnings],
            )
            self._images.put(image, data)
        return image

    def with_failure(
        self, job_id: str, attempt: int, failure: Failure, move: Callable[[Connection], object] = lambda tx: None
    ) -> None:
        """There is no picture. `move`: what becomes of the job, in the same transaction. Raises AWAY."""
        said = {"code": str(failure.kind), "message": failure.message}
        with self._database.write() as tx:
            move(tx)
            outcome = Outcome.canceled if failure.kind == Kind.canceled else Outcome.failed
            jobs.close_attempt(tx, job_id, attempt, outcome, failure.billed, said)
