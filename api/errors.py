"""What can be wrong with a request, and how it is said: one table of codes, one shape (RFC 9457).

Whoever refuses a request raises `Refused` with a code of the table. What never gets as far as the app is answered by
server.py, with the same codes; nobody else writes an error's body, and `problem` is its one shape.
docs/errors.md lists the codes for clients; a test holds the two together.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote

from flask import Flask, Request, Response, g, request
from pydantic import ValidationError
from uuid_utils import uuid7
from werkzeug.exceptions import HTTPException

from shared import logs
from shared.database import AWAY

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of refusal. `retryable`: whether the same request may succeed later."""

    status: int
    title: str
    retryable: bool = False


KINDS: Mapping[str, Kind] = {
    "malformed": Kind(400, "The request cannot be read"),
    "unauthenticated": Kind(401, "A valid key is needed"),
    "link_invalid": Kind(403, "The link is not as it was made"),
    "link_expired": Kind(403, "The link has expired"),
    "not_found": Kind(404, "Not found"),
    "method_not_allowed": Kind(405, "This method is not offered here"),
    "not_acceptable": Kind(406, "The answer is of a type that was not asked for"),
    "too_slow": Kind(408, "The body did not come in time", retryable=True),
    "not_ready": Kind(409, "The job has not ended yet", retryable=True),
    "no_image": Kind(409, "The job ended without an image"),
    "not_ended": Kind(409, "The job or delivery has not ended yet", retryable=True),
    "not_retryable": Kind(409, "Only a job that ended without an image is submitted again"),
    "endpoint_disabled": Kind(409, "The endpoint is disabled or removed"),
    "too_many_endpoints": Kind(409, "The project has as many endpoints as it may have"),
    "unreadable_secret": Kind(409, "The secret cannot be read"),
    "removed": Kind(410, "The job's data were removed"),
    "precondition_failed": Kind(412, "The image is not the one that was asked for"),
    "too_large": Kind(413, "The body is too large"),
    "uri_too_long": Kind(414, "The URL is too long"),
    "unsupported_media_type": Kind(415, "The body is of another type than is taken here"),
    "range_not_satisfiable": Kind(416, "The image has no such range"),
    "expectation_failed": Kind(417, "What the header Expect asks for is not done here"),
    "invalid": Kind(422, "The request is not valid"),
    "idempotency_key_reused": Kind(422, "The Idempotency-Key stands for another request"),
    "queue_full": Kind(429, "As many jobs wait as there may be", retryable=True),
    "too_many_streams": Kind(429, "As many streams are open as there may be", retryable=True),
    "headers_too_large": Kind(431, "The headers are too large"),
    "internal": Kind(500, "A fault of ours"),
    "unknown_coding": Kind(501, "The transfer coding is not known here"),
    "no_room": Kind(503, "There is no room for a body so large now", retryable=True),
    "not_judged": Kind(503, "The picture can't be looked at now", retryable=True),
    "unavailable": Kind(503, "The database is away", retryable=True),
}

#: The media type of an error's body.
PROBLEM = "application/problem+json"

#: What Flask and Werkzeug refuse by themselves, in our words. Any other 4xx of theirs is a request that cannot be read.
_BY_STATUS: Mapping[int, tuple[str, str]] = {
    400: ("malformed", "The request cannot be read."),
    404: ("not_found", "There is nothing here that this key may see."),
    405: ("method_not_allowed", "The header Allow names the methods that are."),
    413: ("too_large", "A body may have at most {most_bytes:,} bytes."),
    415: ("unsupported_media_type", "Send the body as application/json, in UTF-8, not compressed."),
    416: ("range_not_satisfiable", "The header Content-Range names the image's length."),
}
_KEPT_HEADERS = ("Allow", "Content-Range")

#: Bodies whose shape the model chooses: the first step on the way to a mistake is its name.
_BY_MODEL = ("SubmitJob", "VendorCall")
#: Steps that are none in the body: a mistake in a key, and the form of a webhook that was meant.
_MARKS = ("[key]", "[url]", "[webhook]")

#: More mistakes than this in one request are not listed.
_MOST_ERRORS = 20

_SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Refused(Exception):
    """A request that is not served, and why. `errors` names the fields: {pointer | parameter, detail}."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Iterable[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


def not_found() -> Refused:
    """The same for what is unknown, malformed or another project's, so that nobody learns which ids exist."""
    return Refused(*_BY_STATUS[404])


def invalid(errors: Iterable[Mapping[str, str]]) -> Refused:
    """A request whose fields are wrong."""
    return Refused("invalid", "Some fields are not valid; `errors` names them.", errors=errors)


def invalid_field(pointer: str, detail: str) -> Refused:
    return invalid([{"pointer": pointer, "detail": detail}])


def invalid_parameter(name: str, detail: str) -> Refused:
    return invalid([{"parameter": name, "detail": detail}])


def raise_for_validation(error: ValidationError) -> NoReturn:
    """Refuse for what pydantic found, in a query (shapes whose name ends so) or in a body."""
    say = _parameter if error.title.endswith("Query") else _field
    skipped = 1 if error.title in _BY_MODEL else 0
    found = error.errors()[:_MOST_ERRORS]
    raise invalid(say(problem["loc"][skipped:], problem["type"], _said(problem)) for problem in found)


def pointer_to(path: Iterable[str | int]) -> str:
    """A JSON pointer (RFC 6901) as a URI fragment: `#/input/width`."""
    return "#" + "".join("/" + quote(str(step).replace("~", "~0").replace("/", "~1"), safe="~") for step in path)


def _parameter(path: tuple[str | int, ...], kind: str, said: str) -> dict[str, str]:
    name = f"{path[0]}[{path[1]}]" if len(path) > 1 else str(path[0])
    return {"parameter": name, "detail": "There is no such parameter." if kind == "extra_forbidden" else said}


def _field(path: tuple[str | int, ...], kind: str, said: str) -> dict[str, str]:
    if kind.startswith("union_tag"):
        return {"pointer": "#/model", "detail": "No such model; GET /v1/models lists them."}
    steps = [step for step in path if step not in _MARKS]
    detail = "There is no such field." if kind == "extra_forbidden" else said
    return {"pointer": pointer_to(steps), "detail": detail}


def _said(problem: Any) -> str:
    """What pydantic says, in the words of JSON where it speaks of Python's."""
    kind, limits = problem["type"], problem.get("ctx", {})
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "Should be an object."
    if kind == "list_type":
        return "Should be an array."
    if kind == "too_long":
        return f"Should have at most {limits['max_length']} entries."
    if kind == "too_short":
        return f"Should have at least {limits['min_length']} {'entry' if limits['min_length'] == 1 else 'entries'}."
    message: str = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message[0].upper() + message[1:] + "."


def problem(code: str, detail: str, request_id: str, errors: Iterable[Mapping[str, str]] = ()) -> str:
    """The body of an answer (RFC 9457)."""
    kind = KINDS[code]
    body = {
        "type": f"urn:darkroom:error:{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "code": code,
        "retryable": kind.retryable,
        "request_id": request_id,
        **({"errors": errors} if errors else {}),
    }
    return json.dumps(body)


def _answer(code: str, detail: str, errors: list[Mapping[str, str]], headers: Mapping[str, str]) -> Response:
    body = problem(code, detail, g.request_id, errors)
    return Response(body, KINDS[code].status, headers, content_type=PROBLEM)


def _refused(error: Refused) -> Response:
    return _answer(error.code, error.detail, error.errors, error.headers)


def _by_framework(error: HTTPException) -> Response:
    code, detail = _BY_STATUS.get(error.code or 500, _BY_STATUS[400])
    headers = {name: value for name, value in error.get_headers() if name in _KEPT_HEADERS}
    return _answer(code, detail.format(most_bytes=most_bytes(request)), [], headers)


def most_bytes(of: Request) -> int:
    """How many bytes the body of this request may have; one more is what is read (see strict.py)."""
    return (of.max_content_length or 1) - 1


def _away(error: Exception) -> Response:
    # Its type alone: the message may quote a statement.
    log.warning("the database is away (%s)", type(error).__name__)
    return _answer("unavailable", "Try again in a few seconds.", [], {"Retry-After": "5"})


def _internal(error: Exception) -> Response:
    log.error("the request failed", exc_info=error)
    return _answer("internal", "It was written to the log under this request_id.", [], {})


def install(app: Flask) -> None:
    """Give every request an id, and every error its one shape."""

    @app.before_request
    def name_the_request() -> None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _SANE_REQUEST_ID.fullmatch(given) else uuid7().hex
        logs.begin(request_id=g.request_id)

    @app.after_request
    def finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        if response.status_code == 204:
            del response.headers["Content-Type"]  # Flask's own; there is nothing of that type
        return response

    app.register_error_handler(Refused, _refused)
    app.register_error_handler(HTTPException, _by_framework)
    for away in AWAY:
        app.register_error_handler(away, _away)
    app.register_error_handler(Exception, _internal)
