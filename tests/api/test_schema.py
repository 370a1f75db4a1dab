"""Schemathesis: what the OpenAPI document promises, held against what is answered, on thousands of made-up requests.

All of its checks, on data that fit the document and on data that do not, with the key set: by rules at every limit,
at random, and in sequences of calls that follow each other's ids.
"""

import hashlib
import io
import itertools
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlsplit

import pytest
import requests
import schemathesis
from flask import Flask, request
from hypothesis import strategies as st
from schemathesis.engine import StopReason, events, from_schema
from werkzeug.serving import make_server

from api import idempotency
from api.app import build
from api.services import Services
from shared.tickets import Bell
from tests.api.altering import b64
from tests.api.people import KEY, Worker
from tests.shared.pictures import whole

if TYPE_CHECKING:  # there is no such module at run time
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:schemathesis"),
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),  # of bodies with many fields; slow at worst
    pytest.mark.filterwarnings("ignore:Do not use the `random` module"),  # the server's threads do, beside it
]

schemathesis.openapi.format(
    "webhook-url",
    st.from_regex(
        r"\Ahttps?://[a-z]([a-z0-9-]{0,9}[a-z])?(\.[a-z][a-z0-9]{0,9}){0,3}(:[1-9][0-9]{0,3})?([/?][!$-Z_a-~]{0,40})?\Z"
    ),
)

# One size for all: so that a mask always fits its image, and each side that is asked for alone leads to a good one.
schemathesis.openapi.format(
    "picture", st.sampled_from([b64(whole(kind, 256, 256)) for kind in ("PNG", "JPEG", "WEBP")])
)

SETTINGS: dict[str, Any] = {
    "headers": {"Authorization": f"Bearer {KEY}"},
    # The same requests in every run; what it finds is found again.
    "generation": {"max-examples": 40, "deterministic": True, "database": "none"},
    "continue-on-failure": True,
    "checks": {
        # A request that fits the document may still be refused for what its job is or was: besides 404 and 409, which
        # are taken for granted, 410 (its data were removed), 412 (its image is another one) and 416 (its image is
        # shorter than the range asked for). 403: a signature has the form of one, and is none of ours.
        "positive_data_acceptance": {
            "expected-statuses": ["2xx", "304", "401", "403", "404", "409", "410", "412", "416"]
        },
        # DELETE removes what a job was about, not the job: it stays, with its bill, and can be read.
        "use_after_free": {"enabled": False},
    },
}


class Workshop:
    """In the bell's place: each job is brought into another state at once, so that every answer is met."""

    def __init__(self, services: Services) -> None:
        self._worker = Worker(services)
        self._turns = itertools.cycle(("queued", "running", "succeeded", "failed"))
        self._lock = threading.Lock()

    def ring(self, backend: str) -> None:
        with self._lock:
            # Who comes by the vendor's door waits for the end of his own job, which is behind those left open.
            ends = itertools.repeat("succeeded") if request.path == "/api/v1" else iter([next(self._turns)])
            for end in ends:
                if end == "queued" or not self._bring_to(end, backend):
                    return

    def _bring_to(self, end: str, backend: str) -> bool:
        try:
            claim = self._worker.claim(backend=backend)
        except ValueError:
            return False  # none is left
        if end == "succeeded":
            self._worker.succeed(claim)
        elif end == "failed":
            self._worker.fail(claim)
        return True


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here."""
    return sqlite_url


@pytest.fixture
def backends() -> tuple[str, ...]:
    return ("dataoorts", "diffusers")


def with_keys_apart(app: Flask) -> "WSGIApplication":
    """The app, for a client that sends the same few Idempotency-Keys with ever other bodies: that is refused, rightly.

    A good key is made one of its request alone: sent again with the same body, it is the same.
    """

    def call(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        key = environ.get("HTTP_IDEMPOTENCY_KEY")
        with suppress(ValueError):
            if key is not None:
                body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                environ["wsgi.input"] = io.BytesIO(body)
                request = idempotency.parse(key).encode() + environ["PATH_INFO"].encode() + body
                environ["HTTP_IDEMPOTENCY_KEY"] = hashlib.sha256(request).hexdigest()
        return app(environ, start_response)

    return call


@pytest.fixture
def url(services: Services) -> Iterator[str]:
    """Over a socket: in its calls by WSGI, Schemathesis 4.32 breaks off over an option that only requests knows."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = build(replace(services, bell=cast(Bell, Workshop(services))))
    server = make_server("127.0.0.1", 0, with_keys_apart(app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


def with_our_formats(url: str) -> dict[str, Any]:
    """The document, where URLs and pictures have formats of ours: no schema says all that they must keep to."""

    def of_our_format(schema: dict[str, Any]) -> dict[str, Any]:
        if "base64" in str(schema.get("pattern")):
            return schema | {"format": "picture"}
        return {"type": "string", "format": "webhook-url"} if schema.get("format") == "uri" else schema

    return dict(json.loads(requests.get(f"{url}/openapi.json", timeout=30).text, object_hook=of_our_format))


@pytest.mark.long
@pytest.mark.timeout(400)  # a thousand requests and more, on machines that are busy
def test_the_document_holds_what_it_promises(url: str) -> None:
    config = schemathesis.Config.from_dict({"base-url": url, **SETTINGS})
    schema = schemathesis.openapi.from_dict(with_our_formats(url), config=config)
    found: list[str] = []
    answers: Counter[int] = Counter()
    phases: dict[str, str] = {}
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError):
            found.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            found.append(repr(event.exception))
        elif isinstance(event, events.PhaseFinished):
            phases[event.phase.name.name] = event.status.value
        elif isinstance(event, events.ScenarioFinished):
            found += failures(event)
            heard = [each.response for each in event.recorder.interactions.values()]
            answers.update(response.status_code for response in heard if response is not None)
        elif isinstance(event, events.EngineFinished):
            assert event.stop_reason == StopReason.COMPLETED
    assert not found, f"{len(found)} findings:\n" + "\n\n".join(found[:10])
    # It ran, and met what there is to meet.
    assert phases["COVERAGE"] == phases["FUZZING"] == phases["STATEFUL_TESTING"] == "success", phases
    assert answers.total() > 1000
    assert set(answers) >= {200, 202, 204, 400, 401, 404, 405, 409, 415, 422}, answers
    assert max(answers) < 500


def failures(event: events.ScenarioFinished) -> Iterator[str]:
    """What the checks found, each with the request that shows it."""
    for case_id, checks in event.recorder.checks.items():
        for check in checks:
            if check.failure_info is not None:
                failure = check.failure_info.failure
                # It was wrong as JSON, a null under the name 0 say. A query holds texts, and there it may be right.
                of_metadata = check.name == "negative_data_rejection" and "`metadata` in query" in failure.message
                if of_metadata and metadata_fits(event.recorder.interactions[case_id].request.uri):
                    continue
                yield f"{event.recorder.label}: {check.name}: {failure.message}\n{check.failure_info.code_sample}"


def metadata_fits(url: str) -> bool:
    """Whether the metadata in a query keep to the document, as they were sent."""
    pairs = [pair for pair in parse_qsl(urlsplit(url).query, keep_blank_values=True) if pair[0].startswith("metadata")]
    names = [re.fullmatch(r"metadata\[([^\0]{1,64})\]", name) for name, _ in pairs]
    right = all(names) and all(len(value) <= 2048 and "\0" not in value for _, value in pairs)
    return right and len(pairs) == len({name for name, _ in pairs}) <= 16


def test_metadata_of_a_query_are_taken_as_they_were_sent() -> None:
    assert metadata_fits("http://x/v1/jobs?status=expired&metadata%5B0%5D=null")
    wrong = ["metadata[]=x", "metadata=x", f"metadata[{'k' * 65}]=x", "metadata[a]=%00", "metadata[a]=1&metadata[a]=2"]
    wrong += ["&".join(f"metadata[{number}]=x" for number in range(17)), f"metadata[a]={'x' * 2049}"]
    assert not any(metadata_fits(f"http://x/v1/jobs?{query}") for query in wrong)
