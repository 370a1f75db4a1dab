"""Did this project make this picture, when, and with what: by the SHA-256 of its bytes."""

from collections.abc import Sequence
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import Row, Select, bindparam, case, func, or_, select

from api.openapi import KEY, answers
from api.schemas import MadeBy, MadeImage, Provenance, ProvenanceQuery
from api.services import Services
from shared.provenance import said_by
from shared.tables import Outcome, attempts, jobs

#: How many jobs are told of one picture. More make the same file only where a vendor draws equal jobs equally.
MOST = 100

#: The backend that made it: the attempt that the job points at says so. Once the data are removed it points at none;
#: then it is known as long as all pictures that came for the job, which may be more than one, came from one backend.
_MADE_BY = (
    select(case((func.count(attempts.c.backend.distinct()) == 1, func.min(attempts.c.backend))))
    .where(
        attempts.c.job_id == jobs.c.id,
        attempts.c.outcome == Outcome.succeeded,
        or_(jobs.c.image_attempt.is_(None), attempts.c.number == jobs.c.image_attempt),
    )
    .scalar_subquery()
    .label("made_by")
)
MADE: Select[Any] = (
    select(jobs, _MADE_BY)
    .where(jobs.c.project_id == bindparam("project"), jobs.c.image_sha256 == bindparam("sha256"))
    .order_by(jobs.c.id.desc())
    .limit(MOST + 1)
)


def routes(services: Services) -> APIBlueprint:
    blueprint = APIBlueprint("provenance", __name__, url_prefix="/v1", abp_tags=[Tag(name="jobs")], abp_security=KEY)

    @blueprint.get(
        "/provenance",
        operation_id="getProvenance",
        summary="Find out which jobs made a picture",
        description="By the SHA-256 of its bytes as they were downloaded: a copy that was saved anew is another file. "
        "`made` is false for what no job of this project made, and for other projects' pictures all the same. What was "
        "made stays known when its job's data are removed. At most 100 jobs, the newest.",
        responses=answers({200: Provenance}, refusals=(401, 406, 422)),
    )
    def get_provenance(query: ProvenanceQuery) -> Response:
        sha256 = query.sha256.lower()
        with services.database.read() as connection:
            rows = connection.execute(MADE, {"project": g.project_id, "sha256": sha256}).all()
        said = _said_by_the_picture(services, rows)
        base_url = (services.settings.public_url or request.host_url).rstrip("/")
        body = Provenance(
            sha256=sha256,
            made=bool(rows),
            data=[_show(row, said, base_url) for row in rows[:MOST]],
            has_more=len(rows) > MOST,
        )
        return Response(body.model_dump_json(), content_type="application/json")

    return blueprint


def _said_by_the_picture(services: Services, rows: Sequence[Row[Any]]) -> dict[str, Any]:
    """All these jobs have the same bytes: one that still has them speaks for all."""
    for row in rows:
        if row.image_content_type == "image/png" and (data := services.images.get(row.id, row.image_attempt)):
            return said_by(data)
    return {}


def _show(row: Row[Any], said: dict[str, Any], base_url: str) -> MadeBy:
    revision = said.get("revision") if said.get("job_id") == row.id else None
    return MadeBy(
        job_id=row.id,
        created_at=row.created_at,
        completed_at=row.completed_at,
        model=row.model,
        revision=revision if isinstance(revision, str) else None,
        backend=row.made_by,
        input=row.input,
        image=None
        if row.image_attempt is None
        else MadeImage(
            content_type=row.image_content_type,
            width=row.image_width,
            height=row.image_height,
            bytes=row.image_bytes,
        ),
        data_removed=row.data_removed,
        url=f"{base_url}/v1/jobs/{row.id}",
    )
