"""The tasks that tickets name. Thin: a ticket carries no job, so running one twice, late or in vain does no harm."""

from collections.abc import Mapping

from celery import Celery

from shared import tickets
from worker.generation import Generation
from worker.sender import Sender


def register(app: Celery, generations: Mapping[str, Generation], sender: Sender | None) -> None:
    """Give the application its tasks, for the backends that this worker serves, and for deliveries if it sends them."""

    @app.task(name=tickets.TASK)
    def generate(backend: str) -> None:
        generations[backend].work()

    if sender is not None:

        @app.task(name=tickets.DELIVER_TASK)
        def deliver() -> None:
            sender.work()
