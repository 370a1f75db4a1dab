"""The attempts of a job: what was tried, how it ended, and what each cost."""

from typing import Any

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import Row, select

from api.auth import own_job
from api.errors import not_found
from api.openapi import KEY, answers
from api.schemas import Attempt, AttemptError, AttemptList, JobPath, NoQuery
from api.services import Services
from shared.job_object import usd
from shared.tables import Billed, Outcome, attempts, jobs


def routes(services: Services) -> APIBlueprint:
    database = services.database
    blueprint = APIBlueprint("attempts", __name__, url_prefix="/v1", abp_tags=[Tag(name="jobs")], abp_security=KEY)

    @blueprint.get(
        "/jobs/<id>/attempts",
        operation_id="listAttempts",
        summary="List the attempts of a job",
        responses=answers({200: AttemptList}, refusals=(401, 404, 406, 422)),
    )
    def list_attempts(path: JobPath, query: NoQuery) -> Response:
        # One row without an attempt for a job that has none, no row for no such job.
        statement = (
            select(jobs.c.id, attempts)
            .select_from(jobs.outerjoin(attempts, attempts.c.job_id == jobs.c.id))
            .where(own_job(path.id))
            .order_by(attempts.c.number)
        )
        with database.read() as connection:
            rows = connection.execute(statement).all()
        if not rows:
            raise not_found()
        body = AttemptList(data=[_show(row) for row in rows if row.number is not None])
        return Response(body.model_dump_json(), content_type="application/json")

    return blueprint


def _show(row: Row[Any]) -> Attempt:
    return Attempt(
        number=row.number,
        backend=row.backend,
        started_at=row.started_at,
        completed_at=row.completed_at,
        outcome=row.outcome,
        billed=row.billed,
        billed_usd=_bill(row),
        error=None if row.error is None else AttemptError.model_validate(row.error),
    )


def _bill(row: Row[Any]) -> str | None:
    if row.outcome == Outcome.running:
        return None
    return usd(0 if row.billed == Billed.no else row.price)
