"""The image of a job: its bytes as they were received, and links that open it without a key."""

from datetime import UTC, datetime
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import ColumnElement, Row, Select, select

from api.auth import own_job, readable_image
from api.errors import Refused, not_found
from api.job_object import queue_position
from api.openapi import KEY, LINK, answers
from api.schemas import ImageLink, ImageQuery, JobPath, MakeImageLink, NoQuery
from api.services import Services
from api.strict import refuse_unless_accepted
from shared.image_link import image_link
from shared.standing import TERMINAL
from shared.tables import jobs

#: What a job's row says of its image.
_POINTER: Select[Any] = select(jobs).with_only_columns(
    jobs.c.id,
    jobs.c.status,
    jobs.c.backend,
    jobs.c.backend_asked,
    jobs.c.model,
    jobs.c.input,
    jobs.c.ready,
    jobs.c.ready_at,
    jobs.c.rank,
    jobs.c.data_removed,
    jobs.c.image_attempt,
    jobs.c.image_content_type,
    jobs.c.image_bytes,
    jobs.c.image_sha256,
)

#: The routes whose bodies say nothing that must be said.
MAY_BE_EMPTY = ("images.make_image_link",)

_EXTENSIONS = {"image/jpeg": "jpg", "image/webp": "webp"}

#: It never changes, it is nobody else's business, and a browser that opens it must run nothing in it.
_YEAR = 31536000
_HEADERS = {
    "Cache-Control": f"private, immutable, max-age={_YEAR}",
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
        description="`Range`, `If-Match` and `If-None-Match` are honoured; the ETag is the image's sha256. A signed "
        "link needs no key: whoever has it may read this image until it expires or is removed.",
        security=LINK,  # or a key, as all its neighbours
        responses=answers(
            {200: "image/*", 206: "image/*", 304: None},
            refusals=(401, 403, 404, 406, 409, 410, 412, 416, 422),
            headers=("ETag", "Retry-After"),
        ),
    )
    def get_image(path: JobPath, query: ImageQuery) -> Response:
        row = _find(services, path.id, readable_image(path.id))
        refuse_unless_accepted(row.image_content_type)
        extension = _EXTENSIONS.get(row.image_content_type, "png")
        headers = _headers() | {"Content-Disposition": f'inline; filename="{path.id}.{extension}"'}
        response = Response(headers=headers, content_type=row.image_content_type)
        response.set_etag(row.image_sha256)
        if request.if_match and not request.if_match.contains(row.image_sha256):
            raise Refused("precondition_failed", "Its ETag is another one than the header If-Match names.")
        if request.if_none_match.contains_weak(row.image_sha256):
            response.status_code = 304
        elif request.method == "HEAD":
            response.content_length = row.image_bytes
        else:
            _fill(response, services, row)
        return response

    @blueprint.post(
        "/jobs/<id>/image/link",
        operation_id="makeImageLink",
        summary="Make a link that opens the image without a key",
        description="For 7 days if nothing else is asked for, for 30 at most. Nothing revokes it but the removal of "
        "the job's data.",
        responses=answers({200: ImageLink}, refusals=(400, 401, 404, 406, 409, 410, 413, 415, 422)),
    )
    def make_image_link(path: JobPath, query: NoQuery, body: MakeImageLink) -> Response:
        row = _find(services, path.id, own_job(path.id))
        settings = services.settings
        base_url = settings.public_url or request.host_url
        url, expires = image_link(base_url, settings.secret_key, row.id, body.expires_in)
        link = ImageLink(url=url, expires_at=datetime.fromtimestamp(expires, UTC))
        return Response(link.model_dump_json(), content_type="application/json")

    return blueprint


def _headers() -> dict[str, str]:
    seconds: int | None = g.get("link_seconds")
    if seconds is None:
        return _HEADERS
    return _HEADERS | {
        "Cache-Control": f"private, immutable, max-age={min(seconds, _YEAR)}",
        "Cross-Origin-Resource-Policy": "cross-origin",  # a link is made to be shown on pages of others
        "Referrer-Policy": "no-referrer",
    }


def _find(services: Services, job_id: str, which: ColumnElement[bool]) -> Row[Any]:
    with services.database.read() as connection:
        row = connection.execute(_POINTER.where(which)).one_or_none()
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
        _find(services, row.id, readable_image(row.id))  # refuses if it was removed meanwhile
        raise LookupError(f"the image of {row.id} is not in the store")
    response.set_data(data)
    environ = dict(request.environ)
    environ.pop("HTTP_IF_MATCH", None)  # looked at before; Werkzeug would send the picture with its refusal
    if request.range is None or request.range.units != "bytes" or len(request.range.ranges) != 1:
        # A range that can't be read, or several at once: RFC 9110 lets us send the whole image.
        environ.pop("HTTP_RANGE", None)
    response.make_conditional(environ, accept_ranges=True, complete_length=len(data))
