"""Jobs: submit one, read one, list them."""

import secrets
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import RootModel
from sqlalchemy import ColumnElement, Row, exists, func, select

from api.auth import own_job
from api.errors import invalid_parameter, not_found
from api.openapi import KEY, answers
from api.schemas import Image, Job, JobError, JobList, JobPath, JobsQuery, NoQuery, Urls, Warning, usd
from api.services import Services
from api.submission import Submission, submission_body
from shared import jobs as life
from shared.catalogue import MODELS
from shared.settings import Settings
from shared.tables import Billed, Outcome, attempts, jobs

#: When to ask again, in seconds.
RETRY_AFTER = {"Retry-After": "1"}

#: What the attempts of a job cost, in millionths of a dollar. What is unknown counts in full.
_COST = (
    select(func.coalesce(func.sum(attempts.c.price), 0))
    .where(attempts.c.job_id == jobs.c.id, attempts.c.billed != Billed.no, attempts.c.outcome != Outcome.running)
    .scalar_subquery()
    .label("cost")
)
_SHOWN = select(jobs, _COST)


def routes(services: Services) -> APIBlueprint:
    settings, database = services.settings, services.database
    blueprint = APIBlueprint("jobs", __name__, url_prefix="/v1", abp_tags=[Tag(name="jobs")], abp_security=KEY)
    SubmitJob = submission_body(MODELS, settings.backends)  # noqa: N806  a class

    @blueprint.post(
        "/jobs",
        operation_id="submitJob",
        summary="Submit a job",
        responses=answers({202: Job}, refusals=(400, 401, 413, 415, 422), headers=("Location", "Retry-After")),
    )
    def submit_job(query: NoQuery, body: SubmitJob) -> Response:  # type: ignore[valid-type]  # made from the catalogue
        if "Idempotency-Key" in request.headers:
            raise invalid_parameter("Idempotency-Key", "Is not honoured yet, so it is not taken either.")
        row = _submit(services, body)
        services.bell.ring(row.backend)
        job = _show(row, 0, settings)
        return Response(
            job.model_dump_json(), 202, {"Location": job.urls.self, **RETRY_AFTER}, content_type="application/json"
        )

    @blueprint.get(
        "/jobs/<id>",
        operation_id="getJob",
        summary="Read a job",
        description="`If-None-Match` with the ETag of an earlier answer gets 304 as long as nothing happened.",
        responses=answers({200: Job, 304: None}, refusals=(401, 404, 422), headers=("ETag", "Retry-After")),
    )
    def get_job(path: JobPath, query: NoQuery) -> Response:
        with database.read() as connection:
            row = connection.execute(_SHOWN.where(own_job(path.id))).one_or_none()
        if row is None:
            raise not_found()
        headers = {} if row.status in life.TERMINAL else RETRY_AFTER
        if request.if_none_match.contains_weak(str(row.sequence)):
            response = Response(status=304, headers=headers)
        else:
            body = _show(row, row.cost, settings).model_dump_json()
            response = Response(body, 200, headers, content_type="application/json")
        response.set_etag(str(row.sequence), weak=True)
        return response

    @blueprint.get(
        "/jobs",
        operation_id="listJobs",
        summary="List jobs, newest first",
        responses=answers({200: JobList}, refusals=(401, 422)),
    )
    def list_jobs(query: JobsQuery) -> Response:
        statement = _SHOWN.where(*_conditions(query, database.is_sqlite)).order_by(jobs.c.id.desc())
        with database.read() as connection:
            rows = connection.execute(statement.limit(query.limit + 1)).all()
        page, has_more = rows[: query.limit], len(rows) > query.limit
        body = JobList(
            data=[_show(row, row.cost, settings) for row in page],
            has_more=has_more,
            next_cursor=page[-1].id.removeprefix("job_") if has_more else None,
        )
        return Response(body.model_dump_json(), content_type="application/json")

    return blueprint


def _submit(services: Services, body: RootModel[Any]) -> Row[Any]:
    submission: Submission = body.root
    settings = services.settings
    serving = [backend for backend in settings.backends if backend in MODELS[submission.model].backends]
    input = submission.input.model_dump()
    if "seed" in input and input["seed"] is None:
        # Drawn now, not by the backend: so every job can be made again.
        input["seed"] = secrets.randbelow(2**32)
    with services.database.write() as tx:
        return life.submit(
            tx,
            project_id=g.project_id,
            model=submission.model,
            backend_asked=submission.backend,
            backend=serving[0] if submission.backend == "auto" else submission.backend,
            input=input,
            metadata=submission.metadata,
            sandbox=settings.sandbox,
            deadline_seconds=submission.deadline_seconds,
            max_wait_seconds=settings.max_wait_seconds,
        )


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


def _show(row: Row[Any], cost: int, settings: Settings) -> Job:
    """A job's row as clients see it."""
    url = f"{(settings.public_url or request.host_url).rstrip('/')}/v1/jobs/{row.id}"
    return Job(
        id=row.id,
        object="job",
        status=row.status,
        sequence=row.sequence,
        model=row.model,
        backend=row.backend_asked,
        sandbox=row.sandbox,
        input=row.input,
        attempts=row.attempts,
        cost_usd=usd(cost),
        image=_show_image(row, f"{url}/image"),
        error=None if row.error is None else JobError.model_validate(row.error),
        warnings=[Warning.model_validate(warning) for warning in row.warnings],
        metadata=row.metadata,
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
        deadline_at=row.deadline_at,
        urls=Urls(self=url, image=f"{url}/image"),
    )


def _show_image(row: Row[Any], url: str) -> Image | None:
    if row.image_attempt is None:
        return None
    return Image(
        url=url,
        content_type=row.image_content_type,
        width=row.image_width,
        height=row.image_height,
        bytes=row.image_bytes,
        sha256=row.image_sha256,
    )
