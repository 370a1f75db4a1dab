"""Whether this process answers, and whether it can do its work. Without a key."""

from collections.abc import Sequence
from contextlib import suppress

import redis
from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

import migrations
from api.openapi import answers
from api.schemas import Check, Checks, Health, NoQuery, Readiness
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
        if checks.redis == "ok":  # else nobody is to wait for it a second time
            checks.breakers = _ask_breakers(services.breakers, services.settings.backends)
        ready = checks.database == checks.migrations == "ok"
        body = Readiness(status="ready" if ready else "not_ready", checks=checks)
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


def _ask_breakers(board: BreakerBoard, backends: Sequence[str]) -> Check:
    standings = board.read(backends).values()
    return (
        "ok" if all(standing is not None and standing.state == State.closed for standing in standings) else "degraded"
    )


def _ask_redis(client: redis.Redis) -> Check:
    try:
        client.ping()
    except redis.RedisError:
        return "degraded"
    return "ok"
