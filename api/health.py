"""Whether this process answers, and whether it can do its work. Without a key."""

import redis
from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

import migrations
from api.openapi import answers
from api.schemas import Check, Checks, Health, NoQuery, Readiness
from api.services import Services
from shared.database import AWAY, Database


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
        description="503 unless the database answers and is migrated. Without Redis jobs are taken and wait for it.",
        responses=answers({200: Readiness, 503: Readiness}, refusals=(422,)),
    )
    def readyz(query: NoQuery) -> Response:
        database, migrated = _ask_database(services.database, newest)
        ready = database == migrated == "ok"
        body = Readiness(
            status="ready" if ready else "not_ready",
            checks=Checks(database=database, migrations=migrated, redis=_ask_redis(services.redis)),
        )
        return Response(body.model_dump_json(), 200 if ready else 503, content_type="application/json")

    return blueprint


def _ask_database(database: Database, newest: str) -> tuple[Check, Check]:
    try:
        with database.read() as connection:
            return "ok", "ok" if migrations.current(connection) == newest else "failed"
    except AWAY:
        return "failed", "failed"


def _ask_redis(client: redis.Redis) -> Check:
    try:
        client.ping()
    except redis.RedisError:
        return "degraded"
    return "ok"
