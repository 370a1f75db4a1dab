"""The tasks that tickets name. Thin: a ticket carries no job, so running one twice, late or in vain does no harm."""

from collections.abc import Mapping

from celery import Celery

from shared import tickets
from worker.generation import Generation


def register(app: Celery, generations: Mapping[str, Generation]) -> None:
    """Give the application its task, for the backends that this worker serves."""

    @app.task(name=tickets.TASK)
    def generate(backend: str) -> None:
        generations[backend].work()
