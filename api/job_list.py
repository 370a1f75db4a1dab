"""The list of a project's jobs, newest first, a page at a time."""

from flask import Response, g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import ColumnElement, exists, func

from api.job_object import show
from api.openapi import KEY, answers
from api.schemas import JobList, JobsQuery
from api.services import Services
from shared.job_object import SHOWN
from shared.tables import jobs


def routes(services: Services) -> APIBlueprint:
    settings, database = services.settings, services.database
    blueprint = APIBlueprint("job_list", __name__, url_prefix="/v1", abp_tags=[Tag(name="jobs")], abp_security=KEY)

    @blueprint.get(
        "/jobs",
        operation_id="listJobs",
        summary="List jobs, newest first",
        description="`queue_position` is null in lists.",
        responses=answers({200: JobList}, refusals=(401, 406, 422)),
    )
    def list_jobs(query: JobsQuery) -> Response:
        statement = SHOWN.where(*_conditions(query, database.is_sqlite)).order_by(jobs.c.id.desc())
        with database.read() as connection:
            rows = connection.execute(statement.limit(query.limit + 1)).all()
        page, has_more = rows[: query.limit], len(rows) > query.limit
        body = JobList(
            data=[show(row, row.cost, None, settings) for row in page],
            has_more=has_more,
            next_cursor=page[-1].id.removeprefix("job_") if has_more else None,
        )
        return Response(body.model_dump_json(), content_type="application/json")

    return blueprint


def _conditions(query: JobsQuery, is_sqlite: bool) -> list[ColumnElement[bool]]:
    conditions = [jobs.c.project_id == g.project_id]
    if query.status is not None:
        conditions.append(jobs.c.status == query.status)
    if query.backend is not None:
        conditions.append(jobs.c.backend_asked == query.backend)
    if query.model is not None:
        conditions.append(jobs.c.model == query.model)
    if (after := query.after()) is not None:
        conditions.append(jobs.c.created_at >= after)
    if (before := query.before()) is not None:
        conditions.append(jobs.c.created_at < before)
    if query.cursor is not None:
        conditions.append(jobs.c.id < f"job_{query.cursor}")
    return conditions + [_has_metadata(key, value, is_sqlite) for key, value in query.metadata.items()]


def _has_metadata(key: str, value: str, is_sqlite: bool) -> ColumnElement[bool]:
    # Not metadata[key]: SQLite knows no way to write a key with a quote or an escaped letter in a JSON path.
    each = (func.json_each if is_sqlite else func.json_each_text)(jobs.c.metadata).table_valued("key", "value")
    return exists().where(each.c.key == key, each.c.value == value)
