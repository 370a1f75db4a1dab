"""The image of a job: its bytes as they were received."""

from typing import Any

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import Row, Select, select

from api.auth import own_job
from api.errors import Refused, not_found
from api.job_object import queue_position
from api.openapi import KEY, answers
from api.schemas import JobPath, NoQuery
from api.services import Services
from api.strict import refuse_unless_accepted
from shared.standing import TERMINAL
from shared.tables import jobs

#: What a job's row says of its image.
_POINTER: Select[Any] = select(jobs).with_only_columns(
    jobs.c.id,
    jobs.c.status,
    jobs.c.backend,
    jobs.c.ready,
    jobs.c.rank,
    jobs.c.data_removed,
    jobs.c.image_attempt,
    jobs.c.image_content_type,
    jobs.c.image_bytes,
    jobs.c.image_sha256,
)

_EXTENSIONS = {"image/jpeg": "jpg", "image/webp": "webp"}

#: It never changes, it is nobody else's business, and a browser that opens it must run nothing in it.
_HEADERS = {
    "Cache-Control": "private, immutable, max-age=31536000",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Accept-Ranges": "bytes",
}


def routes(services: Services) -> APIBlueprint:
    blueprint = APIBlueprint("images", __name__, url_prefix="/v1", abp_tags=[Tag(name="jobs")], abp_security=KEY)

    @blueprint.get(
        "/jobs/<id>/image",
        operation_id="getImage",
        summary="Read the image of a job",
        description="`Range` and `If-None-Match` are honoured; the ETag is the image's sha256.",
        responses=answers(
            {200: "image/*", 206: "image/*", 304: None},
            refusals=(401, 404, 406, 409, 410, 416, 422),
            headers=("ETag", "Retry-After"),
        ),
    )
    def get_image(path: JobPath, query: NoQuery) -> Response:
        row = _find(services, path.id)
        refuse_unless_accepted(row.image_content_type)
        extension = _EXTENSIONS.get(row.image_content_type, "png")
        headers = _HEADERS | {"Content-Disposition": f'inline; filename="{path.id}.{extension}"'}
        response = Response(headers=headers, content_type=row.image_content_type)
        response.set_etag(row.image_sha256)
        if request.if_none_match.contains_weak(row.image_sha256):
            response.status_code = 304
        elif request.method == "HEAD":
            response.content_length = row.image_bytes
        else:
            _fill(response, services, row)
        return response

    return blueprint


def _find(services: Services, job_id: str) -> Row[Any]:
    with services.database.read() as connection:
        row = connection.execute(_POINTER.where(own_job(job_id))).one_or_none()
        if row is None:
            raise not_found()
        position = queue_position(connection, row)
    if row.data_removed:
        raise Refused("removed", "The image, the prompt and the metadata of this job were removed.")
    if row.image_attempt is None and row.status in TERMINAL:
        raise Refused("no_image", f"The job is {row.status}; its error says why.")
    if row.image_attempt is None:
        raise Refused("not_ready", f"The job is {row.status}.", headers=services.forecast.retry_after(row, position))
    return row


def _fill(response: Response, services: Services, row: Row[Any]) -> None:
    data = services.images.get(row.id, row.image_attempt)
    if data is None:
        _find(services, row.id)  # refuses if it was removed meanwhile
        raise LookupError(f"the image of {row.id} is not in the store")
    response.set_data(data)
    environ = dict(request.environ)
    if request.range is None or request.range.units != "bytes" or len(request.range.ranges) != 1:
        # A range that can't be read, or several at once: RFC 9110 lets us send the whole image.
        environ.pop("HTTP_RANGE", None)
    response.make_conditional(environ, accept_ranges=True, complete_length=len(data))
