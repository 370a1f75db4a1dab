"""The real worker, with more patience than it has: `celery -A tests.drills.patient_worker worker …`.

It waits longer for those who judge pictures, at the vendor's door, and for what a server says of a picture; so a drill
that stops the one or the other, or a machine that stands still, has that long to go on.
"""

from typing import Any

from shared.inspector import Inspector
from worker.app import app
from worker.backends import automatic1111_server, dataoorts

__all__ = ["app"]

SECONDS = 50.0


class PatientDataoorts(dataoorts.Dataoorts):
    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, connect_seconds=SECONDS, inspector=Inspector(seconds=SECONDS), **rest)


dataoorts.Dataoorts = PatientDataoorts  # type: ignore[misc]
automatic1111_server.QUESTION_SECONDS = SECONDS
