"""Whether this process answers, and whether it can do its work. Without a key."""

from contextlib import suppress

import redis
from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

import migrations
from api.forecast import present
from api.openapi import answers
from api.schemas import Check, Checks, Health, NoQuery, Readiness
from api.services import Services
from shared.database import AWAY
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
        description="503 unless the database answers and is migrated. Without Redis, or without a worker of each "
        "backend, jobs are taken and wait; one that makes no progress counts as not there.",
        responses=answers({200: Readiness, 503: Readiness}, refusals=(422,)),
    )
    def readyz(query: NoQuery) -> Response:
        checks = _ask_database(services, newest)
        checks.redis = _ask_redis(services.redis)
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


def _ask_redis(client: redis.Redis) -> Check:
    try:
        client.ping()
    except redis.RedisError:
        return "degraded"
    return "ok"
