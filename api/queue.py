"""The queue, a row a backend: how much waits, how much is being made, by how many slots."""

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import Connection, Integer, func, literal_column, select

from api.openapi import KEY, answers
from api.schemas import Breaker, NoQuery, Queue, QueueList
from api.services import Services
from shared import tallies
from shared.breaker import Standing
from shared.database import now
from shared.load import present
from shared.standing import is_status
from shared.tables import Status, jobs

#: Up to so many jobs are counted. A million rows would take 0.2 s: of more than this the tallies tell, which are a
#: second old at most while there is a sweep.
COUNTED = 10_000


def routes(services: Services) -> APIBlueprint:
    settings = services.settings
    blueprint = APIBlueprint("queue", __name__, url_prefix="/v1", abp_tags=[Tag(name="queue")], abp_security=KEY)

    @blueprint.get(
        "/queue",
        operation_id="getQueue",
        summary="Read the queue of each backend",
        responses=answers({200: QueueList}, refusals=(401, 406, 422)),
    )
    def get_queue(query: NoQuery) -> Response:
        breakers = services.breakers.read(settings.backends)
        with services.database.read() as connection:
            queues = [
                _queue(connection, backend, settings.lease_seconds, breakers[backend]) for backend in settings.backends
            ]
        return Response(QueueList(data=queues).model_dump_json(), content_type="application/json")

    return blueprint


def _queue(connection: Connection, backend: str, lease_seconds: float, breaker: Standing | None) -> Queue:
    def count(status: Status) -> int:
        some = select(literal_column("1", Integer)).where(jobs.c.backend == backend, is_status(status))
        return connection.scalar(select(func.count()).select_from(some.limit(COUNTED + 1).subquery())) or 0

    queued = count(Status.queued)
    if queued > COUNTED:
        queued = max(queued, tallies.read_one(connection, ("queued", backend)))
    # By queue_until, which has an index and stands a fixed time after the submission.
    first = select(jobs.c.created_at, now().label("now")).where(jobs.c.backend == backend, is_status(Status.queued))
    oldest = connection.execute(first.order_by(jobs.c.queue_until).limit(1)).one_or_none()
    there = present(connection, backend, lease_seconds)
    return Queue(
        backend=backend,
        queued=queued,
        running=count(Status.running),
        slots=there.slots,
        workers=there.workers,
        in_hand=there.in_hand,
        stuck=there.stuck,
        oldest_queued_seconds=None if oldest is None else max((oldest.now - oldest.created_at).total_seconds(), 0.0),
        breaker=None if breaker is None else Breaker(state=breaker.state, reason=breaker.reason, until=breaker.until),
    )
