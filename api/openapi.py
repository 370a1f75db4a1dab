"""OpenAPI, made from the routes, and the page that shows it to people, from files of our own and of a package."""

import json
import threading
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

import flask_openapi3_swagger  # type: ignore[import-untyped]
from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.openapi import OpenAPI
from flask_openapi3.types import SecuritySchemesDict
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import webhook_shapes as webhooks
from api.compat import shapes as compat
from api.schemas import ANSWERS, QUERIES, NoQuery

#: What a route under /v1/ declares: it asks for a key.
KEY: list[dict[str, list[str]]] = [{"key": []}]
#: Beside it, what an image takes in its place.
LINK: list[dict[str, list[str]]] = [{"link": []}]
SECURITY_SCHEMES: SecuritySchemesDict = {
    "key": {"type": "http", "scheme": "bearer", "description": "a key of your project: `dk_...`"},
    "link": {"type": "apiKey", "in": "query", "name": "signature", "description": "of a signed link to an image"},
}

_REF = "#/components/schemas/{model}"
_HEADERS = {
    "ETag": "what to send as If-None-Match",
    "Idempotent-Replayed": "`true` if an earlier request with this key made the job",
    "Location": "the URL of what was made",
    "Preference-Applied": "the wait that was honoured",
    "Retry-After": "seconds after which to ask again",
    "X-Job-Id": "the job that the answer is about",
}

#: The headers that a route reads, by its operation, and what they are. Any value but the key's is taken: what makes no
#: sense there is ignored, as HTTP has it.
_ASKED: Mapping[str, tuple[str, ...]] = {
    "submitJob": ("Idempotency-Key", "Prefer"),
    "retryJob": ("Idempotency-Key", "Prefer"),
    "getJob": ("If-None-Match", "Prefer"),
    "getImage": ("If-Match", "If-None-Match", "Range"),
    "listJobEvents": ("Last-Event-ID",),
    "listEvents": ("Last-Event-ID",),
    "callAsVendor": ("Idempotency-Key",),
}
_ASKED_FOR: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Idempotency-Key": (
        "1 to 255 visible characters, bare or quoted: the same request with the same key gets the same job for 24 h",
        {"pattern": "^[!-~]+$", "minLength": 1, "maxLength": 255},
    ),
    "Last-Event-ID": ("of a stream, in place of `after`: the `id` that came last; what came after it follows", {}),
    "If-Match": ("an ETag: 412 if it is not the image's", {}),
    "If-None-Match": ("the ETag of an earlier answer: 304 as long as it is what there is", {}),
    "Prefer": ("`wait=N`: answer when the job has ended, or after so many seconds, at most 60", {}),
    "Range": ("`bytes=FIRST-LAST`: a part of the image", {}),
}

_HERE = Path(__file__).parent / "docs"
_SWAGGER = Path(flask_openapi3_swagger.__file__).parent / "templates" / "swagger"
_FILES = {
    "page.css": _HERE / "page.css",
    "page.js": _HERE / "page.js",
    "swagger-ui.css": _SWAGGER / "css" / "swagger-ui.css",
    "swagger-ui-bundle.js": _SWAGGER / "js" / "swagger-ui-bundle.js",
}
#: Nothing from elsewhere, and no script that is not one of these files.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def answers(
    bodies: Mapping[int, type[BaseModel] | str | None], *, refusals: tuple[int, ...], headers: tuple[str, ...] = ()
) -> dict[Any, Any]:
    """The answers of a route: each status with its shape (a text names a media type), and what it may refuse with.

    Any route may also answer 400 (a query that can't be read), 500 and 503; and one that reads a body, 408.
    """
    described = {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in headers}
    result: dict[Any, Any] = {}
    for status, body in bodies.items():
        result[status] = (
            {"description": HTTPStatus(status).phrase, "headers": described}
            if headers
            else {"description": HTTPStatus(status).phrase}
        )
        if isinstance(body, str):
            result[status]["content"] = {body: {}}
        elif body is not None:
            result[status]["content"] = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
    problem = {"application/problem+json": {"schema": {"$ref": _REF.format(model="Problem")}}}
    too_slow = {408} if 413 in refusals else set()
    for status in sorted({*refusals, *too_slow, 400, 500, 503} - set(bodies)):
        result[status] = {"description": HTTPStatus(status).phrase, "content": problem}
    return result


def register(app: OpenAPI, routes: APIBlueprint) -> None:
    """Add routes to the app, and to its document beside what other files serve under the same paths."""
    for path in routes.paths.keys() & app.paths.keys():  # flask-openapi3 would forget the earlier ones
        methods = {name: getattr(routes.paths[path], name) for name in routes.paths[path].model_fields_set}
        routes.paths[path] = app.paths[path].model_copy(update=methods)
    app.register_api(routes)


def document(app: OpenAPI, *bodies: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI document of all routes. Its schemas are pydantic's own: flask-openapi3's leave out some keywords."""
    made: dict[str, Any] = json.loads(json.dumps(app.api_doc))
    shapes = (*ANSWERS, *webhooks.ANSWERS, *compat.ANSWERS)
    _, definitions = models_json_schema(
        [*((body, "validation") for body in bodies), *((shape, "serialization") for shape in shapes)], ref_template=_REF
    )
    made["components"]["schemas"] = definitions["$defs"]
    queries = {**QUERIES, **webhooks.QUERIES}
    for path in made["paths"].values():
        for operation in path.values():
            query = queries.get(operation["operationId"], NoQuery)
            exact = query.model_json_schema(ref_template=_REF).get("properties", {})
            for parameter in operation.get("parameters", []):
                parameter["schema"] = deepcopy(exact.get(parameter["name"], parameter["schema"]))
                _tell_the_truth(parameter)
            asked = _ASKED.get(operation["operationId"], ())
            operation.setdefault("parameters", []).extend(map(_header, asked))
    return made


def _header(name: str) -> dict[str, Any]:
    description, limits = _ASKED_FOR[name]
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"} | limits}


def _tell_the_truth(parameter: dict[str, Any]) -> None:
    """A query cannot say null: a parameter that is not given is absent."""
    schema = parameter["schema"]
    if schema.get("default", ...) is None:
        del schema["default"]
    kinds = [kind for kind in schema.pop("anyOf", []) if kind != {"type": "null"}]
    schema.update(*kinds)
    if schema.get("type") == "object":
        parameter.update(style="deepObject", explode=True)


def install(app: OpenAPI, *bodies: type[BaseModel]) -> None:
    """Serve the document and the page. Both without a key: they hold nothing of anybody's."""

    @cache
    def text() -> str:
        """Made when somebody asks for it: it takes longer than all else that the API does at its start."""
        return json.dumps(document(app, *bodies))

    one_at_a_time = threading.Lock()

    @app.route("/openapi.json", methods=["GET"])
    def openapi_json() -> Response:
        with one_at_a_time:
            return Response(text(), content_type="application/json")

    @app.route("/docs", methods=["GET"])
    def docs() -> Response:
        page = (_HERE / "page.html").read_bytes()
        return Response(page, headers={"Content-Security-Policy": _POLICY}, content_type="text/html; charset=utf-8")

    names = ",".join(f"'{name}'" for name in _FILES)

    @app.route(f"/docs/<any({names}):name>", methods=["GET"])
    def docs_file(name: str) -> Response:
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        headers = {"Cache-Control": "public, max-age=3600"}
        return Response(_FILES[name].read_bytes(), headers=headers, content_type=f"{kind}; charset=utf-8")
