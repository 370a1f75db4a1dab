"""The vendor's own door: `POST /api/v1` takes Dataoorts' body and answers as Dataoorts does, from our queue.

A job like every other. The request waits for its end; a client that hangs up, or for whom it takes too long, loses
nothing: the job goes on, X-Job-Id tells which, and the same request joins it (see repeats.py).
"""

import base64
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import RootModel
from sqlalchemy import Row

from api import idempotency
from api.compat import repeats
from api.compat.delivery import Delivery
from api.compat.shapes import Call, Result, VendorError, VendorPicture, VendorProblem, call_body
from api.connection import connection_of_request
from api.errors import Refused
from api.job_object import queue_position, read_job
from api.openapi import KEY, answers
from api.schemas import NoQuery
from api.services import Services
from api.submission import submission_body, submit
from shared import logs
from shared.errors import JobErrorCode
from shared.standing import TERMINAL
from shared.tables import Status

PATH = "/api/v1"

#: Longer than most proxies wait, and than the 30 s of the vendor's own example: who is cut off loses nothing.
LONGEST_WAIT = 120.0  # seconds

#: How many requests of a process wait here at once, or are written to: fewer than it has waiting places, each of which
#: takes one, so that `Prefer: wait` has some.
PLACES = 120

#: The vendor answers these with JSON, and with the bare picture otherwise.
ANSWERED_IN_JSON = frozenset({"black-forest-labs/flux-1-schnell"})

#: Cloudflare's codes, whose API the vendor's is; where it has none for a case, the status stands for it.
BAD_INPUT, NO_SUCH_MODEL, NO_CAPACITY, TIMEOUT, ABORTED = 5006, 5007, 3040, 3007, 3008

#: A refused request: status and the vendor's code, by the code of the problem.
REFUSALS: Mapping[str, tuple[int, int]] = {
    "malformed": (400, BAD_INPUT),
    "invalid": (400, BAD_INPUT),
    "unauthenticated": (401, 10000),
    "method_not_allowed": (405, 7001),
    "too_slow": (408, TIMEOUT),
    "too_large": (413, 3006),
    "unsupported_media_type": (415, BAD_INPUT),
    "idempotency_key_reused": (422, BAD_INPUT),
    "queue_full": (429, NO_CAPACITY),
}

#: A job that ended without a picture: status and the vendor's code, by the code of the job's error.
ENDS: Mapping[str, tuple[int, int]] = {
    JobErrorCode.rejected: (400, BAD_INPUT),
    JobErrorCode.content_filtered: (400, 3030),
    JobErrorCode.out_of_memory: (400, BAD_INPUT),
    JobErrorCode.bad_output: (502, 502),
    JobErrorCode.backend_unavailable: (502, 502),
    JobErrorCode.worker_crashed: (500, 500),
    JobErrorCode.internal_error: (500, 500),
    JobErrorCode.gave_up: (504, TIMEOUT),
    JobErrorCode.expired: (504, TIMEOUT),
}


def routes(services: Services) -> APIBlueprint:
    blueprint = APIBlueprint("dataoorts", __name__, abp_tags=[Tag(name="as the vendor")], abp_security=KEY)
    blueprint.after_app_request(_speak_as_the_vendor)
    VendorCall = call_body(services.settings.backends)  # noqa: N806  a class
    SubmitJob = submission_body(services.settings.backends)  # noqa: N806  a class
    free = threading.BoundedSemaphore(PLACES)

    @blueprint.post(
        PATH,
        operation_id="callAsVendor",
        summary="Make an image, as the vendor's own API does",
        description="Dataoorts' body and answers: a program for it runs with URL and key changed. It waits for the "
        f"end of the job, at most {LONGEST_WAIT:.0f} s; what goes on then, or after the client has hung up, is joined "
        "by the same request. The same body again, without a seed and after it was answered, makes another image. "
        "`Idempotency-Key` is honoured as on POST /v1/jobs.",
        responses=_described(),
    )
    def call_as_vendor(query: NoQuery, body: VendorCall) -> Response:  # type: ignore[valid-type]  # made at run time
        leave = _take_place(services, free)
        if leave is None:
            # Before anything is made, so that nothing is bought for whom we can't wait.
            message = "AiError: Capacity temporarily exceeded, please try again; nothing was begun."
            return _error(429, NO_CAPACITY, message, {"Retry-After": "5"})
        try:
            call: Call = body.root  # type: ignore[attr-defined]
            response = _serve(services, call, SubmitJob.model_validate(call.as_submission()))
        except BaseException:
            leave()
            raise
        # Not before its answer is written, which takes a thread as long as its client takes.
        response.call_on_close(leave)
        return response

    return blueprint


def _take_place(services: Services, free: threading.Semaphore) -> Callable[[], None] | None:
    """One of this door's places, and one of all that wait. Returns what gives them back; None if there is none."""
    if not free.acquire(blocking=False):
        return None
    give_back = services.waiting.reserve()
    if give_back is None:
        free.release()
        return None

    def leave() -> None:
        give_back()
        free.release()

    return leave


def _serve(services: Services, call: Call, submission: RootModel[Any]) -> Response:
    asked = idempotency.asked_key(call.model_dump(mode="json"))
    has_seed = getattr(call.data, "seed", None) is not None
    derived = repeats.key_of(g.project_id, submission.model_dump(mode="json"))
    key = asked or derived
    services.router.look()
    with services.database.write() as tx:
        first = idempotency.first_of(tx, asked) if asked else repeats.first_of(tx, derived, has_seed=has_seed)
        made = submit(tx, services, submission) if first is None else None
        if made is not None:
            idempotency.keep(tx, key, made.id)
    g.job_id, g.is_repeat = made.id if made is not None else first, made is None
    if made is not None:
        services.bell.ring(made.backend)
    began = time.monotonic()
    logs.note(job_id=g.job_id)
    row = _wait(services, g.job_id)
    if row.status == Status.succeeded:
        return _picture(services, row, None if asked or has_seed else derived)
    if row.status in TERMINAL:
        return _end(row)
    return _unfinished(services, row, timed_out=time.monotonic() - began >= LONGEST_WAIT)


def _wait(services: Services, job_id: str) -> Row[Any]:
    def read() -> Row[Any]:
        with services.database.read() as connection:
            row = read_job(connection, job_id)
        assert row is not None  # rows of jobs stay
        return row

    def enough(row: Row[Any]) -> bool:
        return row.status in TERMINAL

    row, _ = services.waiting.until(
        job_id, LONGEST_WAIT, read, enough, connection=connection_of_request(), reserved=True
    )
    return row


def _unfinished(services: Services, row: Row[Any], *, timed_out: bool) -> Response:
    with services.database.read() as connection:
        position = queue_position(connection, row)
    headers = services.forecast.retry_after(row, position)  # it may read too: never two connections at once
    if timed_out:
        return _error(
            504, TIMEOUT, "AiError: Request timeout; the job goes on, and the same request joins it.", headers
        )
    # The client is seen to be gone, or this process stops.
    return _error(503, ABORTED, "AiError: The wait was cut short; the job goes on, the same request joins it.", headers)


def _picture(services: Services, row: Row[Any], once: idempotency.Key | None) -> Response:
    """The job's picture; `once`: the key of a picture that is for one client alone."""
    job_id = g.job_id
    data = None if row.image_attempt is None else services.images.get(job_id, row.image_attempt)
    if data is None:
        raise Refused("removed", "The image of this job was removed.")
    content_type = row.image_content_type
    if row.model in ANSWERED_IN_JSON:
        picture = VendorPicture(result=Result(image_base64=base64.b64encode(data).decode()))
        data, content_type = picture.model_dump_json().encode(), "application/json"
    if once is None:
        return Response(data, content_type=content_type)
    delivery = Delivery(
        data,
        connection_of_request(),
        taken=lambda: repeats.delivered(services.database, once, job_id),
        lost=lambda: repeats.offer_again(services.database, once, job_id),
    )
    return Response(delivery, headers={"Content-Length": str(len(data))}, content_type=content_type)


def _end(row: Row[Any]) -> Response:
    """How a job ended that has no picture."""
    if row.status == Status.canceled:
        return _error(409, ABORTED, "AiError: The job was canceled.")
    status, code = ENDS[row.error["code"]]
    return _error(status, code, f"AiError: {row.error['message']}")


def _error(status: int, code: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    problem = VendorProblem(errors=[VendorError(code=code, message=message)])
    return Response(problem.model_dump_json(), status, headers, content_type="application/json")


def _speak_as_the_vendor(response: Response) -> Response:
    """Say on each answer of this address which job it is about, and turn our errors into the vendor's."""
    if request.path != PATH:
        return response
    if "job_id" in g:
        response.headers["X-Job-Id"] = g.job_id
        if g.is_repeat:
            response.headers["Idempotent-Replayed"] = "true"
    if response.mimetype == "application/problem+json":
        problem = json.loads(response.get_data())
        response.status_code, code = REFUSALS.get(problem["code"], (problem["status"], problem["status"]))
        body = VendorProblem(errors=_errors_of(problem, code))
        response.set_data(body.model_dump_json())
        response.content_type = "application/json"
    return response


def _errors_of(problem: dict[str, Any], code: int) -> list[VendorError]:
    if "errors" not in problem:
        prefix = "AiError: Bad input: " if code == BAD_INPUT else ""
        return [VendorError(code=code, message=prefix + problem["detail"])]
    errors = []
    for error in problem["errors"]:
        if error.get("pointer") == "#/model":
            errors.append(VendorError(code=NO_SUCH_MODEL, message=f"AiError: {error['detail']}"))
        else:
            where = error["pointer"][1:] or "/" if "pointer" in error else error["parameter"]
            errors.append(VendorError(code=code, message=f"AiError: Bad input: Error: '{where}': {error['detail']}"))
    return errors


def _described() -> dict[Any, Any]:
    """The answers for OpenAPI."""
    statuses = {status for status, _ in (*REFUSALS.values(), *ENDS.values())} | {409, 410, 429, 503}
    headers = ("X-Job-Id", "Idempotent-Replayed", "Retry-After")
    made = answers({200: VendorPicture, **dict.fromkeys(sorted(statuses), VendorProblem)}, refusals=(), headers=headers)
    made[200]["content"]["image/*"] = {}
    return made
