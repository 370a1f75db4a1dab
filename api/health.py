"""Whether this process answers, and whether it can do its work. Without a key."""

from collections.abc import Sequence
from contextlib import suppress

import redis
from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

import migrations
from api.openapi import answers
from api.schemas import BackendBreaker, Check, Checks, Health, NoQuery, Readiness
from api.services import Services
from shared.breaker import BreakerBoard, State
from shared.database import AWAY
from shared.load import present
from shared.present import SWEEP
from shared.tickets import DELIVERIES


def routes(services: Services) -> APIBlueprint:
    blueprint = APIBlueprint("health", __name__, abp_tags=[Tag(name="health")])
    newest = migrations.newest()

    @blueprint.get(
        "/healthz",
        operation_id="healthz",
        summary="Does the process answer?",
        responses=answers({200: Health}, refusals=(422,)),
    )
    def healthz(query: NoQuery) -> Response:
        return Response(Health(status="ok").model_dump_json(), content_type="application/json")

    @blueprint.get(
        "/readyz",
        operation_id="readyz",
        summary="Can it do its work?",
        description="503 unless the database answers and is migrated. Without Redis, without a worker of each "
        "backend, or while the breaker of one is not closed, jobs are taken and wait; a worker that makes no progress "
        "counts as not there.",
        responses=answers({200: Readiness, 503: Readiness}, refusals=(422,)),
    )
    def readyz(query: NoQuery) -> Response:
        checks = _ask_database(services, newest)
        checks.redis = _ask_redis(services.redis)
        breakers = None
        if checks.redis == "ok":  # else nobody is to wait for it a second time
            breakers = _not_closed(services.breakers, services.settings.backends)
        checks.breakers = "ok" if breakers == [] else "degraded"
        ready = checks.database == checks.migrations == "ok"
        body = Readiness(status="ready" if ready else "not_ready", checks=checks, breakers=breakers or [])
        return Response(body.model_dump_json(), 200 if ready else 503, content_type="application/json")

    return blueprint


def _ask_database(services: Services, newest: str) -> Checks:
    checks = Checks(
        database="failed",
        migrations="failed",
        redis="degraded",
        workers="degraded",
        senders="degraded",
        sweep="degraded",
        breakers="degraded",
    )
    with suppress(*AWAY), services.database.read() as connection:
        checks.database = "ok"
        if migrations.current(connection) == newest:
            checks.migrations = "ok"

            def are_there(*works: str) -> Check:
                seconds = services.settings.lease_seconds
                return "ok" if all(present(connection, work, seconds).workers for work in works) else "degraded"

            checks.workers = are_there(*services.settings.backends)
            checks.senders = are_there(DELIVERIES)
            checks.sweep = are_there(SWEEP)
    return checks


def _not_closed(board: BreakerBoard, backends: Sequence[str]) -> list[BackendBreaker] | None:
    """None while that can't be known."""
    found = []
    for backend, standing in board.read(backends).items():
        if standing is None:
            return None
        if standing.state != State.closed:
            why = BackendBreaker(backend=backend, state=standing.state, reason=standing.reason, until=standing.until)
            found.append(why)
    return found


def _ask_redis(client: redis.Redis) -> Check:
    try:
        client.ping()
    except redis.RedisError:
        return "degraded"
    return "ok"
