"""One job: submit it, read it, wait for it, cancel it, submit it again, remove what it was about."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import RootModel
from sqlalchemy import Connection, Row

from api import altering, idempotency, strict
from api.connection import connection_of_request
from api.errors import Refused, invalid_field, not_found
from api.job_object import is_settled, queue_position, read_job, show
from api.openapi import KEY, answers
from api.schemas import JobPath, NoQuery
from api.services import Services
from api.strict import whole_body
from api.submission import start_of, submission_body, submit
from api.waiting import preferred_wait
from shared import jobs as life
from shared import logs
from shared.catalogue import MODELS
from shared.database import AWAY
from shared.job_object import Job
from shared.standing import TERMINAL

#: What a submission's answers carry.
_SUBMITTED = ("Location", "Retry-After", "Preference-Applied", "Idempotent-Replayed")


def larger_bodies(backends: Collection[str]) -> dict[str, int]:
    """How many bytes the routes read that read more than others: submissions, where images are taken."""
    takes_images = any(altering.able(model, backends) for model in MODELS.values())
    return {"jobs.submit_job": altering.MOST_BYTES} if takes_images else {}


def routes(services: Services) -> APIBlueprint:
    settings, database = services.settings, services.database
    blueprint = APIBlueprint("jobs", __name__, url_prefix="/v1", abp_tags=[Tag(name="jobs")], abp_security=KEY)
    SubmitJob = submission_body(settings.backends)  # noqa: N806  a class

    @blueprint.post(
        "/jobs",
        operation_id="submitJob",
        summary="Submit a job",
        description="`Prefer: wait=N` waits up to 60 s for its end; 200 says that it has ended. A request that is sent "
        "again with the same `Idempotency-Key` within 24 h gets the job of the first one. Where images are taken "
        f"(`GET /v1/models`), a body may have {altering.MOST_BYTES:,} bytes, elsewhere {strict.MOST_BYTES:,}.",
        responses=answers({200: Job, 202: Job}, refusals=(400, 401, 406, 413, 415, 422, 429), headers=_SUBMITTED),
    )
    def submit_job(query: NoQuery, body: SubmitJob) -> Response:  # type: ignore[valid-type]  # made from the catalogue
        found = _submit(services, body)
        strict.give_room_back()  # who waits for the job holds nothing of the body
        return _answer(services, found)

    @blueprint.get(
        "/jobs/<id>",
        operation_id="getJob",
        summary="Read a job",
        description="`Prefer: wait=N` waits up to 60 s for its end. `If-None-Match` with the ETag of an earlier answer "
        "gets 304 as long as nothing happened; with both, it waits for the next event.",
        responses=answers(
            {200: Job, 304: None}, refusals=(401, 404, 406, 422), headers=("ETag", "Retry-After", "Preference-Applied")
        ),
    )
    def get_job(path: JobPath, query: NoQuery) -> Response:
        def is_news(seen: _Seen) -> bool:
            # An ended job has no next event: who knows its end already is told so at once.
            return seen.row.status in TERMINAL or (bool(request.if_none_match) and not _is_known(seen))

        seen = _look(services, path.id, is_news)
        row = seen.row
        headers = seen.headers
        response = Response(status=304, headers=headers)
        if not _is_known(seen):
            body = show(row, seen.cost, seen.position, settings, services.progress.of(row)).model_dump_json()
            response = Response(body, 200, headers, content_type="application/json")
        response.set_etag(_etag(seen), weak=True)
        return response

    @blueprint.post(
        "/jobs/<id>/cancel",
        operation_id="cancelJob",
        summary="Cancel a job",
        description="At once, whether it waits or runs. A job that has ended is returned unchanged. A call to a hosted "
        "backend that runs meanwhile is let run to its end, and what it costs is counted.",
        responses=answers({200: Job}, refusals=(401, 404, 406, 413, 422)),
    )
    def cancel_job(path: JobPath, query: NoQuery) -> Response:
        refuse_body()
        with database.write() as tx:
            if read_job(tx, path.id) is None:
                raise not_found()
            life.cancel(tx, path.id)
            row = read_job(tx, path.id)
        assert row is not None
        return Response(show(row, row.cost, None, settings).model_dump_json(), content_type="application/json")

    @blueprint.post(
        "/jobs/<id>/retry",
        operation_id="retryJob",
        summary="Submit an ended job again",
        description="Only one that failed, was canceled or expired: a new job with the same input and seed (202). "
        "While one such is open, it is that one (200). Its `deadline_seconds` is not taken over: the new job has none.",
        responses=answers({200: Job, 202: Job}, refusals=(401, 404, 406, 409, 410, 413, 422, 429), headers=_SUBMITTED),
    )
    def retry_job(path: JobPath, query: NoQuery) -> Response:
        refuse_body()
        key = idempotency.asked_key(None)
        return _answer(services, _once(services, key, lambda tx: _retry(tx, services, path.id)))

    @blueprint.delete(
        "/jobs/<id>",
        operation_id="removeJobData",
        summary="Remove the image, the prompt and the metadata of an ended job",
        description="Its row stays, with `data_removed`: that it was, how it ended, what it cost. So does the hash of "
        "its image, by which `/v1/provenance` knows it. What receivers of its webhooks answered goes too.",
        responses=answers({204: None}, refusals=(401, 404, 409, 413, 422)),
    )
    def remove_job_data(path: JobPath, query: NoQuery) -> Response:
        refuse_body()
        with database.write() as tx:
            row = read_job(tx, path.id)
            if row is None:
                raise not_found()
            if not life.remove_data(tx, path.id):
                raise Refused("not_ended", f"The job is {row.status}: cancel it, or wait for its end.")
        # After the commit: what a crash leaves behind here, nothing points at, and the sweep removes it.
        for image in services.images.of_job(path.id):
            services.images.remove(path.id, image.attempt)
        return Response(status=204)

    return blueprint


def _retry(tx: Connection, services: Services, job_id: str) -> life.Made:
    row = read_job(tx, job_id)
    if row is None:
        raise not_found()
    settings, choice = services.settings, services.router.choose(row.model, row.backend_asked, row.input)
    if choice is None:
        raise Refused("not_retryable", f"The model {row.model} is no longer served here as it was asked for.")
    retried = life.retry(
        tx,
        job_id,
        backend=choice.backend,
        reason=choice.reason,
        sandbox=settings.is_sandbox(choice.backend),
        request_id=g.request_id,
        max_wait_seconds=settings.max_wait_seconds,
    )
    if retried is not None:
        if retried.is_new:
            services.depth.take_place(choice.backend)  # a refusal takes the new job back
        return retried
    row = read_job(tx, job_id)  # as it stands now: it may have moved since
    assert row is not None
    if row.data_removed:
        raise Refused("removed", "The input of this job was removed, so it can't be submitted again.")
    raise Refused("not_retryable", f"The job is {row.status}.")


@dataclass(frozen=True)
class _Found:
    """The job that a request led to. `row`: as it was read in the transaction that made or found it, if one did."""

    job_id: str
    row: Row[Any] | None
    is_new: bool = False
    is_replay: bool = False
    was_there: bool = False

    def seen(self, services: Services) -> "_Seen | None":
        """What there is to say of it without another look."""
        if self.row is None:
            return None
        again = services.forecast.retry_after(self.row, 1)
        return _Seen(self.row, 0 if self.is_new else self.row.cost, None, {"Vary": "Prefer"} | again)


def _submit(services: Services, body: RootModel[Any]) -> _Found:
    """In a call of its own: who waits for the job must not keep in memory what it starts from."""
    key = idempotency.asked_key(body.root.model_dump(mode="json"))
    if altering.has_image(body.root.input) and (first := idempotency.seen(services.database, key)):
        # Before it is looked at what the job starts from: that may be gone by now, and the repeat gets its job.
        return _Found(first, None, is_replay=True)
    start = start_of(services, body)
    return _once(services, key, lambda tx: life.Made(submit(tx, services, body, start), is_new=True))


def _once(services: Services, key: idempotency.Key | None, make: Callable[[Connection], life.Made]) -> _Found:
    """Make a job, or find the one that an earlier request with this key made."""
    services.router.look()
    with services.database.write() as tx:
        first = idempotency.first_of(tx, key)
        made = make(tx) if first is None else None
        if made is not None and key is not None:
            idempotency.keep(tx, key, made.job.id)
        if made is None:
            assert first is not None
            # Read now: the database may be away after the commit, and who asked must learn which job he has.
            return _Found(first, read_job(tx, first), is_replay=True)
        if not made.is_new:
            return _Found(made.job.id, read_job(tx, made.job.id), was_there=True)
    services.bell.ring(made.job.backend)
    return _Found(made.job.id, made.job, is_new=True)


def _answer(services: Services, found: _Found) -> Response:
    """Wait for the job, if that is wanted, and show it."""
    logs.note(job_id=found.job_id)
    seen = _look(services, found.job_id, lambda seen: seen.row.status in TERMINAL, found)
    row = seen.row
    job = show(row, seen.cost, seen.position, services.settings, services.progress.of(row))
    headers = {"Location": job.urls.self} | seen.headers
    if found.is_replay:
        headers["Idempotent-Replayed"] = "true"
    return Response(
        job.model_dump_json(),
        200 if found.was_there or row.status in TERMINAL else 202,
        headers,
        content_type="application/json",
    )


@dataclass(frozen=True)
class _Seen:
    """A job as it was read last: its row, its cost, its place in the queue; and what the headers say of waiting.

    `settled`: whether that cost stays; looked up only for the ETag.
    """

    row: Row[Any]
    cost: int
    position: int | None
    headers: dict[str, str]
    settled: bool = True


def _look(services: Services, job_id: str, enough: Callable[[_Seen], bool], found: _Found | None = None) -> _Seen:
    """Read a job; if the client prefers to wait, until it is `enough`.

    One that is new was read when it was made. Its place in the queue is left to the first who asks: counting it would
    be the dearest part of a submission. While the database is away, what is known of one that was `found` is the
    answer: with a 503 nobody would know that he has a job, and who sent no key would buy another one.
    """

    def read() -> _Seen:
        with services.database.read() as connection:
            row = read_job(connection, job_id)
            if row is None:
                raise not_found()
            position = queue_position(connection, row)
            settled = found is not None or is_settled(connection, row)
        # It may read too, and not while a connection is held: threads that each hold one and want another starve.
        again = services.forecast.retry_after(row, position)
        return _Seen(row, row.cost, position, {"Vary": "Prefer"} | again, settled)

    seconds = preferred_wait(request.headers.get("Prefer"))
    known = None if found is None else found.seen(services)
    if seconds is None:
        if known is not None and found is not None and found.is_new:
            return known
        try:
            return read()
        except AWAY:
            if known is None:
                raise
            return known
    seen, had_a_place = services.waiting.until(
        job_id, seconds, read, enough, connection=connection_of_request(), known=known
    )
    if had_a_place:
        seen.headers["Preference-Applied"] = f"wait={seconds}"
    return seen


def _etag(seen: _Seen) -> str:
    # Neither removing data nor a bill that is settled late is an event, and yet each makes another representation.
    marks = [str(seen.row.sequence)]
    if not seen.settled:
        marks.append(str(seen.cost))
    if seen.row.data_removed:
        marks.append("removed")
    return "-".join(marks)


def _is_known(seen: _Seen) -> bool:
    return request.if_none_match.contains_weak(_etag(seen))


def refuse_body() -> None:
    """Nothing is taken in the body, and so nothing is ignored in it. `{}` says nothing."""
    if b"".join(whole_body(request).split()) not in (b"", b"{}"):
        raise invalid_field("#", "This route takes no body.")
