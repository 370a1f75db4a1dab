"""The tasks that tickets name. Thin: a ticket carries no job, so running one twice, late or in vain does no harm."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from celery import Celery

from shared import tickets
from worker.generation import Generation

if TYPE_CHECKING:
    from worker.sender import Sender

log = logging.getLogger(__name__)


@contextmanager
def _telling_of_faults() -> Iterator[None]:
    """Here, and not by Celery, which shows an exception with its words: they may quote a prompt."""
    try:
        yield
    except Exception:
        log.exception("the work for a ticket broke off")  # what it had claimed is rescued when its lease ends


def register(app: Celery, generations: Mapping[str, Generation], sender: "Sender | None") -> None:
    """Give the application its tasks, for the backends that this worker serves, and for deliveries if it sends them."""

    @app.task(name=tickets.TASK)
    def generate(backend: str) -> None:
        with _telling_of_faults():
            generations[backend].work()

    if sender is not None:

        @app.task(name=tickets.DELIVER_TASK)
        def deliver() -> None:
            with _telling_of_faults():
                sender.work()
