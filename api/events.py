"""Events, of one job or of the whole project: pages as JSON, and streams that go on (server-sent events).

Both lead through the same numbers: a job's events by `sequence`, the project's feed by `number`. Whoever has read up to
one asks for what comes after it, in whichever form, and misses nothing.
"""

import base64
import json
import logging
import select as polling
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from sqlalchemy import BigInteger, Connection, Row, bindparam, select

from api.connection import connection_of_request
from api.errors import Refused, invalid_parameter, not_found
from api.job_object import queue_position
from api.openapi import KEY, answers
from api.schemas import PLACE, EventList, EventsQuery, JobPath
from api.services import Services
from api.strict import quality_of, refuse_unless_accepted
from api.waiting import Place
from shared.database import AWAY, Database, now
from shared.events import Event, event_object, jobs_of
from shared.ids import is_id
from shared.job_object import SHOWN, job_object, rfc3339
from shared.progress import ProgressBoard, Report
from shared.standing import TERMINAL
from shared.tables import Status, events, jobs, projects

log = logging.getLogger(__name__)

#: The media type of a stream.
STREAM = "text/event-stream"

#: A hint on the stream of a job: not stored, and so without a place to resume from.
PROGRESS = "job.progress"

#: A comment is sent so often, or somebody in between takes a quiet stream for a dead one. The key is looked at again.
HEARTBEAT_SECONDS = 15.0
#: How long a client waits before it comes back, in milliseconds.
RETRY = 2000
#: How long a stream waits for a client that does not read: a thread is held no longer than that.
SEND_SECONDS = 10.0
#: What a stream may have sent that was not read yet, in bytes, half of what the system then reserves for it. By default
#: that would be megabytes for each client that has stopped reading.
UNREAD_BYTES = 64 * 1024
#: Events that a stream reads at once.
PAGE = 100
#: Between two tries to read while the database is away, in seconds.
TRY_AGAIN_SECONDS = 1.5

# Built once: the streams that wait for the same event all read at the same time.
_AFTER = bindparam("after", type_=BigInteger)
_OF_JOB = (
    select(events)
    .where(events.c.subject_id == bindparam("job_id"), events.c.sequence > _AFTER)
    .order_by(events.c.sequence)
    .limit(bindparam("at_most", type_=BigInteger))
)
_OF_PROJECT = (
    select(events)
    .where(events.c.project_id == bindparam("project"), events.c.number > _AFTER)
    .order_by(events.c.number)
    .limit(bindparam("at_most", type_=BigInteger))
)
_JOB = SHOWN.where(jobs.c.id == bindparam("job_id"), jobs.c.project_id == bindparam("project"))
_FEED = select(projects.c.feed, now().label("moment")).where(projects.c.id == bindparam("project"))


@dataclass(frozen=True)
class Page:
    """Some events with their places, in order. `more`: there are more already; `ended`: none will ever follow."""

    events: list[tuple[int, Event]]
    more: bool
    ended: bool


@dataclass(frozen=True)
class Start:
    """What a stream begins with: the place of the latest event, and a snapshot. `ended` as of a page."""

    place: int
    snapshot: Mapping[str, Any]
    ended: bool


class Story(ABC):
    """Events in the order that clients follow them by. `subject`: under what those who wait for more are woken."""

    def __init__(self, database: Database, project: str, base_url: str) -> None:
        self._database = database
        self._project = project
        self._base_url = base_url
        self.subject = project

    @abstractmethod
    def start(self) -> Start: ...

    @abstractmethod
    def page(self, after: int, at_most: int) -> Page: ...

    def progress(self) -> Mapping[str, Any] | None:
        """What there is to say of how far it is, between two events."""
        return None


class JobStory(Story):
    """The events of one job, by `sequence`. It ends with the job. Refused as not found unless it is the project's."""

    def __init__(self, database: Database, project: str, base_url: str, job_id: str, board: ProgressBoard) -> None:
        super().__init__(database, project, base_url)
        if not is_id("job", job_id):
            raise not_found()
        self.subject = job_id
        self._board = board
        self._running_attempt: int | None = None
        self._told: Report | None = None  # of its progress, so that nothing is told twice

    def start(self) -> Start:
        with self._database.read() as connection:
            moment = connection.execute(select(now())).scalar_one()
            row = self._job(connection)
            position = queue_position(connection, row)
        job = job_object(row, row.cost, position, self._base_url)
        snapshot = {
            "type": "snapshot",
            "timestamp": rfc3339(moment),
            "sequence": row.sequence,
            "data": job.model_dump(mode="json"),
        }
        return Start(row.sequence, snapshot, row.status in TERMINAL)

    def page(self, after: int, at_most: int) -> Page:
        with self._database.read() as connection:
            asked = {"job_id": self.subject, "after": after, "at_most": at_most + 1}
            found = connection.execute(_OF_JOB, asked).all()
            # After its events: so it knows of each of them.
            row = self._job(connection)
        told = [(event.sequence, event_object(event, row, self._base_url)) for event in found[:at_most]]
        reached = told[-1][0] if told else after
        return Page(told, len(found) > at_most, row.status in TERMINAL and reached >= row.sequence)

    def progress(self) -> Mapping[str, Any] | None:
        attempt = self._running_attempt
        report = None if attempt is None else self._board.latest(self.subject, attempt)
        if report is None or report == self._told:  # what woke us was news of an attempt that is over
            return None
        self._told = report
        preview = report.preview and {
            "content_type": "image/jpeg",
            "base64": base64.b64encode(report.preview).decode("ascii"),
        }
        data = {"id": self.subject, "attempt": report.attempt, "progress": report.progress.model_dump()}
        return {"type": PROGRESS, "timestamp": rfc3339(datetime.now(UTC)), "data": data | {"preview": preview or None}}

    def _job(self, connection: Connection) -> Row[Any]:
        row = connection.execute(_JOB, {"job_id": self.subject, "project": self._project}).one_or_none()
        if row is None:
            raise not_found()
        self._running_attempt = row.attempts if row.status == Status.running else None
        return row


class FeedStory(Story):
    """All events of a project, by `number`: those that have one already. It never ends."""

    def start(self) -> Start:
        with self._database.read() as connection:
            row = connection.execute(_FEED, {"project": self._project}).one()
        snapshot = {"type": "snapshot", "timestamp": rfc3339(row.moment), "number": row.feed}
        return Start(row.feed, snapshot, ended=False)

    def page(self, after: int, at_most: int) -> Page:
        with self._database.read() as connection:
            asked = {"project": self._project, "after": after, "at_most": at_most + 1}
            found = connection.execute(_OF_PROJECT, asked).all()
            shown = found[:at_most]
            rows = {row.id: row for row in connection.execute(jobs_of(shown))} if shown else {}
        told = [(event.number, event_object(event, rows.get(event.subject_id), self._base_url)) for event in shown]
        return Page(told, len(found) > at_most, ended=False)


def routes(services: Services) -> APIBlueprint:
    settings, database = services.settings, services.database
    blueprint = APIBlueprint("events", __name__, url_prefix="/v1", abp_tags=[Tag(name="events")], abp_security=KEY)

    def base_url() -> str:
        return settings.public_url or request.host_url

    @blueprint.get(
        "/jobs/<id>/events",
        operation_id="listJobEvents",
        summary="The events of a job, as a list or a stream",
        description="In order of `sequence`. With `Accept: text/event-stream` as a stream: a snapshot of the job (not "
        "if `after` or `Last-Event-ID` is given), then each event as it happens, until the job has ended; between them "
        "`job.progress`, without id or sequence, where the backend tells how far it is, with a small preview. Whoever "
        "comes back with its last id gets what came after it; nothing will, if that was the end: 204.",
        responses=_answers((401, 404, 406, 422, 429), {204: None}),
    )
    def list_job_events(path: JobPath, query: EventsQuery) -> Response:
        return _answer(services, query, JobStory(database, g.project_id, base_url(), path.id, services.progress))

    @blueprint.get(
        "/events",
        operation_id="listEvents",
        summary="All events of the project, as a list or a stream",
        description="In order of `number`, which an event gets a moment after it happened, without gaps: whoever has "
        "read up to a number has missed nothing before it. With `Accept: text/event-stream` as a stream that does not "
        "end: a snapshot with the latest number (not if `after` or `Last-Event-ID` is given), then each event.",
        responses=_answers((401, 406, 422, 429), {}),
    )
    def list_events(query: EventsQuery) -> Response:
        return _answer(services, query, FeedStory(database, g.project_id, base_url()))

    return blueprint


def _answers(refusals: tuple[int, ...], further: Mapping[int, None]) -> dict[Any, Any]:
    described = answers({200: EventList, **further}, refusals=refusals)
    described[200]["content"][STREAM] = {"schema": {"type": "string"}}
    return described


def _answer(services: Services, query: EventsQuery, story: Story) -> Response:
    response = _stream(services, query, story) if _prefers_stream() else _list(query, story)
    response.headers["Vary"] = "Accept"
    return response


def _prefers_stream() -> bool:
    """Whether it is more welcome than a list; refused if neither is. Of two as welcome, the one that is named."""
    stream, as_list = quality_of(STREAM), quality_of("application/json")
    if not stream:
        refuse_unless_accepted("application/json")
    named = {value.partition(";")[0].strip().lower() for value, _ in request.accept_mimetypes}
    return stream > as_list or (stream == as_list and STREAM in named and "application/json" not in named)


def _list(query: EventsQuery, story: Story) -> Response:
    page = story.page(query.after or 0, query.limit)
    body = EventList(
        data=[event for _, event in page.events],
        has_more=page.more,
        next_cursor=str(page.events[-1][0]) if page.events else None,
    )
    return Response(body.model_dump_json(), content_type="application/json")


def _stream(services: Services, query: EventsQuery, story: Story) -> Response:
    if "limit" in request.args:
        raise invalid_parameter("limit", "A stream takes none.")
    after, said_as = _resumed_from(query)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    connection = connection_of_request()
    # The place first, then the look: what happens in between rings the bell.
    place = None if request.method == "HEAD" else services.waiting.stream(story.subject, connection)
    try:
        start = story.start()
        if after is not None and after >= start.place and start.ended:
            response = Response(status=204, headers=headers)
        elif after is not None and after > start.place:
            raise invalid_parameter(said_as, "There is no such event yet.")
        elif request.method == "HEAD":
            response = Response(headers=headers, content_type=STREAM)
        elif place is None and not start.ended:
            raise Refused("too_many_streams", "Try again in a few seconds.", headers={"Retry-After": "5"})
        else:
            known = _key_check(services, request.headers.get("Authorization"), g.project_id)
            told = _tell(story, start, after, place, known)
            response = Response(_in_time(told, connection), headers=headers, content_type=STREAM)
    except BaseException:
        if place is not None:
            place.leave()
        raise
    if place is not None:
        response.call_on_close(place.leave)
    return response


def _resumed_from(query: EventsQuery) -> tuple[int | None, str]:
    """The place after which a stream goes on, None if it starts, and by which parameter it was said.

    The header counts more: a client that comes back by itself sends it to the URL that it began with.
    """
    header = request.headers.get("Last-Event-ID", "")
    if not header:
        return query.after, "after"
    if not PLACE.fullmatch(header):
        raise invalid_parameter("Last-Event-ID", "Must be a whole number of at most 18 digits.")
    return int(header), "Last-Event-ID"


def _key_check(services: Services, authorization: str | None, project: str) -> Callable[[], bool]:
    """Whether the key that a stream was opened with is still good. It is as long as nobody can tell."""

    def is_good() -> bool:
        try:
            return services.keys.project_of(authorization) == project
        except Refused as error:
            return error.code != "unauthenticated"
        except AWAY:
            return True

    return is_good


def _tell(
    story: Story, start: Start, after: int | None, place: Place | None, is_good: Callable[[], bool]
) -> Iterator[bytes]:
    """The stream: what it begins with, then every event after it, each once. Without a place only what there is."""
    yield f"retry: {RETRY}\n\n".encode()
    if after is None:
        yield _message(start.place, "snapshot", json.dumps(start.snapshot, ensure_ascii=False))
        if start.ended:
            return
        after = start.place
    beat_at = time.monotonic() + HEARTBEAT_SECONDS
    news, pause = True, 0.0
    while place is None or not place.is_over:
        if news:
            try:
                page = story.page(after, PAGE)
            except AWAY as error:
                # Its client would take an end for a reason to come back, and find no better process.
                log.warning("a stream can't read its events (%s)", type(error).__name__)
                page, pause = Page([], more=True, ended=False), TRY_AGAIN_SECONDS
            for after, event in page.events:
                yield _message(after, event.type, event.model_dump_json())
            if page.ended or (place is None and not page.more):
                return
            news = page.more
        if time.monotonic() >= beat_at:
            if not is_good():
                return
            yield b": still here\n\n"
            beat_at = time.monotonic() + HEARTBEAT_SECONDS
        if place is not None and (pause or not news):
            news = place.wait(pause or beat_at - time.monotonic()) or bool(pause)
            pause = 0.0
            yield from _hint(story, place)


def _hint(story: Story, place: Place) -> Iterator[bytes]:
    """How far the job is, if somebody said so since. Not counted: a client resumes from the event before it."""
    if place.has_progressed:
        place.has_progressed = False
        if (told := story.progress()) is not None:
            yield f"event: {PROGRESS}\ndata: {json.dumps(told)}\n\n".encode()


def _message(place: int, kind: str, data: str) -> bytes:
    return f"id: {place}\nevent: {kind}\ndata: {data}\n\n".encode()


def _in_time(chunks: Iterable[bytes], connection: socket.socket | None) -> Iterator[bytes]:
    """The chunks, as long as the client takes them. One that does not is hung up on, and may come back and resume."""
    if connection is None:
        yield from chunks
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD_BYTES)
    # A last resort: where there is room for something, what we send next has room as a rule.
    connection.settimeout(SEND_SECONDS)
    room = polling.poll()
    room.register(connection, polling.POLLOUT)
    for chunk in chunks:
        if not room.poll(SEND_SECONDS * 1000):
            log.warning("a stream was ended whose client had not read for %g s", SEND_SECONDS)
            # The server would still send that this was the end, and wait for room to do so.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            return
        yield chunk
