"""Bad requests as a table: each with the exact status, code and place of the mistake that its sender is told.

What is wrong with a submission's fields one by one stands in test_submit_job.py; the parameters of lists in
test_list_jobs.py. Here is one of each kind, and everything around them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import func, select

from api.errors import KINDS
from api.services import Services
from shared.image_link import image_link
from shared.tables import events, idempotency_keys
from shared.tables import jobs as table
from tests.api.people import Caller, Submit, Worker

JSON = {"Content-Type": "application/json"}
GOOD = b'{"input": {"prompt": "a cat"}}'
NOBODY = "job_" + "0" * 32


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here: none of this reaches it."""
    return sqlite_url


@dataclass(frozen=True)
class Bad:
    """A request, and what must be said of it.

    In `path`, {queued} {succeeded} {failed} {removed} stand for jobs, {disabled} for an endpoint, and {over} for the
    rest of a link that has expired.
    """

    what: str
    status: int
    code: str
    places: tuple[str, ...] = ()  # pointers begin with #
    method: str = "POST"
    path: str = "/v1/jobs"
    body: Any = GOOD  # bytes as they are; anything else as JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    answered: Mapping[str, str] = field(default_factory=dict)  # headers of the answer


def body(what: str, place: str, body: Any) -> Bad:
    return Bad(what, 422, "invalid", (place,), body=body)


def of_input(what: str, name: str, value: Any) -> Bad:
    return body(what, f"#/input/{name}", {"input": {"prompt": "a cat"} | {name: value}})


def malformed(what: str, body: bytes) -> Bad:
    return Bad(what, 400, "malformed", body=body)


def header(what: str, name: str, value: str, place: str) -> Bad:
    return Bad(what, 422, "invalid", (place,), headers={name: value})


def get(what: str, path: str, status: int, code: str, *places: str, **rest: Any) -> Bad:
    return Bad(what, status, code, places, "GET", path, b"", **rest)


def query(what: str, query: str, name: str) -> Bad:
    return get(what, f"/v1/jobs?{query}", 422, "invalid", name)


BAD = [
    # Types.
    of_input("a number in a text", "width", "512"),
    of_input("a truth value as a number", "num_steps", True),
    of_input("a text as a number", "guidance", "7.5"),
    of_input("a fraction where none fits", "height", 512.5),
    of_input("nothing where something must be", "width", None),
    of_input("a list as a prompt", "prompt", ["a cat"]),
    of_input("an object as a seed", "seed", {}),
    body("input as a text", "#/input", {"input": "a cat"}),
    body("null as the input", "#/input", {"input": None}),
    body("metadata as a list", "#/metadata", {"input": {"prompt": "a cat"}, "metadata": []}),
    body("a number in the metadata", "#/metadata/n", {"input": {"prompt": "a cat"}, "metadata": {"n": 1}}),
    body("a deadline in a text", "#/deadline_seconds", {"input": {"prompt": "a cat"}, "deadline_seconds": "60"}),
    body("a list", "#", []),
    body("a text", "#", "a cat"),
    body("null", "#", None),
    # Ranges.
    of_input("too short a prompt", "prompt", "a"),
    of_input("too long a prompt", "prompt", "a" * 2049),
    of_input("too long a negative prompt", "negative_prompt", "a" * 2049),
    of_input("too small", "width", 248),
    of_input("too large", "height", 2056),
    of_input("off the grid", "width", 513),
    of_input("no steps", "num_steps", 0),
    of_input("too many steps", "num_steps", 21),
    of_input("negative guidance", "guidance", -0.1),
    of_input("too much guidance", "guidance", 30.5),
    of_input("a negative seed", "seed", -1),
    of_input("a seed beyond 32 bits", "seed", 2**32),
    of_input("a number beyond all bounds", "seed", 10**300),
    body("no time at all", "#/deadline_seconds", {"input": {"prompt": "a cat"}, "deadline_seconds": 0}),
    body("more than a week", "#/deadline_seconds", {"input": {"prompt": "a cat"}, "deadline_seconds": 604_801}),
    # Fields.
    body("no input", "#/input", {}),
    body("no prompt", "#/input/prompt", {"input": {}}),
    of_input("an unknown field of the input", "sampler", "euler"),
    body("an unknown field", "#/prompt", {"input": {"prompt": "a cat"}, "prompt": "a cat"}),
    body("a field of a later day", "#/batch", {"input": {"prompt": "a cat"}, "batch": "b"}),
    body("a webhook to a file", "#/webhook", {"input": {"prompt": "a cat"}, "webhook": "file:///etc/passwd"}),
    body("a webhook without a URL", "#/webhook/url", {"input": {"prompt": "a cat"}, "webhook": {}}),
    body("an unknown model", "#/model", {"input": {"prompt": "a cat"}, "model": "sdxl"}),
    body("an unknown backend", "#/backend", {"input": {"prompt": "a cat"}, "backend": "diffusers"}),
    body("a name that must be escaped", "#/a~1b~0%22", {"input": {"prompt": "a cat"}, 'a/b~"': 1}),
    # Metadata.
    body("17 pairs", "#/metadata", {"input": {"prompt": "a cat"}, "metadata": {str(n): "" for n in range(17)}}),
    body("more than 2 kB", "#/metadata", {"input": {"prompt": "a cat"}, "metadata": {"a": "ü" * 1024}}),
    body("an empty name", "#/metadata/", {"input": {"prompt": "a cat"}, "metadata": {"": "x"}}),
    body("too long a name", "#/metadata/" + "k" * 65, {"input": {"prompt": "a cat"}, "metadata": {"k" * 65: "x"}}),
    body("NUL in a value", "#/metadata/a", {"input": {"prompt": "a cat"}, "metadata": {"a": "\0"}}),
    # What is no JSON, or no text.
    malformed("nothing", b""),
    malformed("half an object", b'{"input": {"prompt": "a cat"'),
    malformed("Python's idea of JSON", b"{'input': {'prompt': 'a cat'}}"),
    malformed("a number of 5,000 digits", b'{"input": {"prompt": "a cat", "seed": ' + b"1" * 5000 + b"}}"),
    malformed("NaN", b'{"input": {"prompt": "a cat", "guidance": NaN}}'),
    malformed("a name twice", b'{"input": {"prompt": "a cat"}, "input": {"prompt": "a dog"}}'),
    malformed("something behind it", GOOD + b" x"),
    malformed("no UTF-8", b'{"input": {"prompt": "caf\xe9"}}'),
    malformed("half a character of UTF-8", b'{"input": {"prompt": "caf\xc3"}}'),
    malformed("UTF-16", GOOD.decode().encode("utf-16")),
    malformed("too deep", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    malformed("a number with too many digits", b'{"input": {"prompt": "a cat", "seed": ' + b"9" * 5000 + b"}}"),
    of_input("half a surrogate pair", "prompt", "a \ud83d cat"),
    of_input("NUL", "prompt", "a \0 cat"),
    body("deep, and unknown", "#/a", {"input": {"prompt": "a cat"}, "a": json.loads("[" * 200 + "]" * 200)}),
    # Size and type.
    Bad("more than a megabyte", 413, "too_large", body=b" " * 1_000_001, headers=JSON),
    Bad("more than a megabyte to cancel", 413, "too_large", path="/v1/jobs/{queued}/cancel", body=b" " * 1_000_001),
    Bad("no type", 415, "unsupported_media_type", headers={"Content-Type": ""}),
    Bad("a form", 415, "unsupported_media_type", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    Bad("several parts", 415, "unsupported_media_type", headers={"Content-Type": "multipart/form-data; boundary=x"}),
    Bad("another charset", 415, "unsupported_media_type", headers={"Content-Type": "application/json; charset=utf-16"}),
    Bad("compressed", 415, "unsupported_media_type", headers=JSON | {"Content-Encoding": "gzip"}),
    # What is wanted back.
    Bad("only pages", 406, "not_acceptable", headers=JSON | {"Accept": "text/html"}),
    Bad("anything but JSON", 406, "not_acceptable", headers=JSON | {"Accept": "application/json;q=0, */*"}),
    get("a job as an image", "/v1/jobs/{queued}", 406, "not_acceptable", headers={"Accept": "image/png"}),
    get("PNG as JSON", "/v1/jobs/{succeeded}/image", 406, "not_acceptable", headers={"Accept": "application/json"}),
    # Keys.
    Bad("no key", 401, "unauthenticated", headers={"Authorization": ""}, answered={"WWW-Authenticate": "Bearer"}),
    Bad("another scheme", 401, "unauthenticated", headers={"Authorization": "Basic ZGs6ZGs="}),
    Bad(
        "an unknown key",
        401,
        "unauthenticated",
        headers={"Authorization": "Bearer dk_" + "x" * 40},
        answered={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    ),
    header("an empty Idempotency-Key", "Idempotency-Key", "", "Idempotency-Key"),
    header("a blank in the Idempotency-Key", "Idempotency-Key", "a b", "Idempotency-Key"),
    header("too long an Idempotency-Key", "Idempotency-Key", "k" * 256, "Idempotency-Key"),
    header("an Idempotency-Key beyond ASCII", "Idempotency-Key", "clé", "Idempotency-Key"),
    Bad("a key that was used", 422, "idempotency_key_reused", headers=JSON | {"Idempotency-Key": "taken"}),
    # Links.
    get("a link that was made up", "/v1/jobs/{succeeded}/image?expires=1&signature=x", 403, "link_invalid"),
    get("a link that is over", "/v1/jobs/{over}", 403, "link_expired"),
    # Ids and addresses.
    get("an unknown id", f"/v1/jobs/{NOBODY}", 404, "not_found"),
    get("what is no id", "/v1/jobs/42", 404, "not_found"),
    get("another kind of id", "/v1/jobs/evt_" + "0" * 32, 404, "not_found"),
    get("an id in capitals", "/v1/jobs/JOB_" + "0" * 32, 404, "not_found"),
    get("an id with NUL", "/v1/jobs/job_%00", 404, "not_found"),
    get("an id that is no UTF-8", "/v1/jobs/job_%ff", 404, "not_found"),
    get("SQL", "/v1/jobs/'%20OR%201=1--", 404, "not_found"),
    get("a way up", "/v1/jobs/../../etc/passwd", 404, "not_found"),
    get("nothing behind the slash", "/v1/jobs/", 404, "not_found"),
    get("an unknown address", "/v1/batches", 404, "not_found"),
    Bad("an unknown id to cancel", 404, "not_found", path=f"/v1/jobs/{NOBODY}/cancel", body=b""),
    Bad("an unknown id to retry", 404, "not_found", path=f"/v1/jobs/{NOBODY}/retry", body=b""),
    Bad("an unknown id to remove", 404, "not_found", method="DELETE", path=f"/v1/jobs/{NOBODY}", body=b""),
    get("attempts of an unknown id", f"/v1/jobs/{NOBODY}/attempts", 404, "not_found"),
    get("the image of an unknown id", f"/v1/jobs/{NOBODY}/image", 404, "not_found"),
    # Methods.
    Bad("another method", 405, "method_not_allowed", method="PUT", answered={"Allow": "GET, HEAD, POST"}),
    Bad(
        "to change a job",
        405,
        "method_not_allowed",
        method="PATCH",
        path="/v1/jobs/{queued}",
        answered={"Allow": "DELETE, GET, HEAD"},
    ),
    get("to look at a cancel", "/v1/jobs/{queued}/cancel", 405, "method_not_allowed", answered={"Allow": "POST"}),
    Bad("a preflight", 405, "method_not_allowed", method="OPTIONS", path="/v1/queue", answered={"Allow": "GET, HEAD"}),
    # Parameters.
    query("a cursor of another make", "cursor=abc", "cursor"),
    query("a cursor that is an id", f"cursor={NOBODY}", "cursor"),
    query("too many at once", "limit=101", "limit"),
    query("none at once", "limit=0", "limit"),
    query("a limit in words", "limit=ten", "limit"),
    query("an unknown status", "status=done", "status"),
    query("no time", "created_after=yesterday", "created_after"),
    query("a time without a zone", "created_before=2026-01-01T00:00:00", "created_before"),
    query("a parameter twice", "limit=1&limit=2", "limit"),
    query("an unknown parameter", "sort=asc", "sort"),
    get("a query that is not UTF-8", "/v1/jobs?metadata[a]=%ff", 400, "malformed"),
    get("a name in a query that is not UTF-8", "/v1/jobs?metadata[%c3]=a", 400, "malformed"),
    query("metadata without a name", "metadata=x", "metadata"),
    query("too long a name of metadata", "metadata[" + "k" * 65 + "]=x", "metadata[" + "k" * 65 + "]"),
    Bad("a parameter of a submission", 422, "invalid", ("dry_run",), path="/v1/jobs?dry_run=1"),
    get("a parameter of a job", "/v1/jobs/{queued}?wait=5", 422, "invalid", "wait"),
    get("a parameter of the queue", "/v1/queue?backend=dataoorts", 422, "invalid", "backend"),
    get("a parameter of the health", "/healthz?x", 422, "invalid", "x"),
    # What the job is not ready for.
    get("an image too early", "/v1/jobs/{queued}/image", 409, "not_ready", answered={"Retry-After": "1"}),
    get("an image of a failure", "/v1/jobs/{failed}/image", 409, "no_image"),
    get("an image that was removed", "/v1/jobs/{removed}/image", 410, "removed"),
    get("another image", "/v1/jobs/{succeeded}/image", 412, "precondition_failed", headers={"If-Match": '"other"'}),
    get(
        "a range beyond the image",
        "/v1/jobs/{succeeded}/image",
        416,
        "range_not_satisfiable",
        headers={"Range": "bytes=9999-"},
        answered={"Content-Range": "bytes */1032"},
    ),
    Bad("a test of what is disabled", 409, "endpoint_disabled", path="/v1/endpoints/{disabled}/test", body=b""),
    Bad("an endpoint too many", 409, "too_many_endpoints", path="/v1/endpoints", body={"url": "https://example.com"}),
    Bad("an open job again", 409, "not_retryable", path="/v1/jobs/{queued}/retry", body=b""),
    Bad("a success again", 409, "not_retryable", path="/v1/jobs/{succeeded}/retry", body=b""),
    Bad("a removed job again", 410, "removed", path="/v1/jobs/{removed}/retry", body=b""),
    Bad("to remove an open job", 409, "not_ended", method="DELETE", path="/v1/jobs/{queued}", body=b""),
    Bad("a reason to cancel", 422, "invalid", ("#",), path="/v1/jobs/{queued}/cancel", body={"reason": "x"}),
    Bad("a seed to retry", 422, "invalid", ("#",), path="/v1/jobs/{failed}/retry", body={"seed": 1}),
]


@pytest.fixture
def job_ids(api: Caller, submit: Submit, worker: Worker) -> dict[str, str]:
    """A job for each state that a request may be wrong about."""
    made = {name: submit()["id"] for name in ("succeeded", "failed", "removed")}
    worker.succeed(worker.claim())
    worker.fail(worker.claim())
    worker.fail(worker.claim())
    assert api.delete(f"/v1/jobs/{made['removed']}").status_code == 204
    other = api.post("/v1/jobs", json={"input": {"prompt": "a dog"}}, headers={"Idempotency-Key": "taken"})
    hooks = [api.post("/v1/endpoints", json={"url": "https://example.com"}).json["id"] for _ in range(50)]
    api.patch(f"/v1/endpoints/{hooks[0]}", json={"disabled": True})
    link, _ = image_link("", "s" * 32, made["succeeded"], -1)
    over = link.removeprefix("/v1/jobs/")
    return made | {"queued": other.json["id"], "disabled": hooks[0], "over": over}


def everything(services: Services) -> list[Any]:
    with services.database.read() as connection:
        counts = [connection.scalar(select(func.count()).select_from(each)) for each in (events, idempotency_keys)]
        return counts + list(connection.execute(select(table).order_by(table.c.id)))


def test_each_bad_request_is_told_exactly_what_is_wrong_and_changes_nothing(
    api: Caller, services: Services, job_ids: dict[str, str]
) -> None:
    before = everything(services)
    for bad in BAD:
        path = bad.path
        for name, job_id in job_ids.items():
            path = path.replace(f"{{{name}}}", job_id)
        data = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
        headers = {"X-Request-Id": "r-1", **(JSON if bad.method == "POST" else {}), **bad.headers}
        response = api.open(path, method=bad.method, data=data, headers=headers)
        said = f"{bad.what}: {response.status_code} {response.text}"
        assert (response.status_code, response.content_type) == (bad.status, "application/problem+json"), said
        problem: dict[str, Any] = json.loads(response.text)
        assert (problem["status"], problem["code"]) == (bad.status, bad.code), said
        assert problem["type"].endswith(bad.code) and problem["title"] == KINDS[bad.code].title, said
        assert problem["retryable"] is KINDS[bad.code].retryable, said
        assert problem["request_id"] == response.headers["X-Request-Id"] == "r-1", said
        assert problem["detail"] and all(error["detail"] for error in problem.get("errors", ())), said
        places = tuple(error.get("pointer") or error["parameter"] for error in problem.get("errors", ()))
        assert places == bad.places, said
        assert all(
            ("pointer" in error) == error.get("pointer", "").startswith("#") for error in problem.get("errors", ())
        )
        for name, value in bad.answered.items():
            given = response.headers[name]
            assert ", ".join(sorted(given.split(", "))) == ", ".join(sorted(value.split(", "))), (name, said)
        assert response.headers["Cache-Control"] == "no-store", said
        assert not re.search("[Dd]ictionary|instance of|after validation|sys[.]", response.text), said  # Python's words
    assert everything(services) == before


def test_every_code_of_a_refusal_is_in_the_table() -> None:
    elsewhere = {
        "internal",
        "unavailable",
        "not_judged",
        "no_room",
        "too_slow",
        "too_many_streams",
        "queue_full",
        "unreadable_secret",
    }  # no mistakes of a request
    # tests/api/test_gunicorn.py: these never get as far as the app.
    elsewhere |= {"uri_too_long", "expectation_failed", "headers_too_large", "unknown_coding"}
    assert {bad.code for bad in BAD} == set(KINDS) - elsewhere
    assert len(BAD) >= 60 and len({bad.what for bad in BAD}) == len(BAD)


def test_a_preference_that_makes_no_sense_is_no_mistake(api: Caller) -> None:
    for prefer in (
        "wait",
        "wait=",
        "wait=-1",
        "wait=1.5",
        "wait=soon",
        "return=minimal",
        ",;=",
        "é",
        "x" * 5000,
        "\x7f",
    ):
        response = api.post("/v1/jobs", data=GOOD, headers=JSON | {"Prefer": prefer})
        assert response.status_code == 202 and "Preference-Applied" not in response.headers, prefer


def test_other_strange_headers_are_no_mistake(api: Caller, job_ids: dict[str, str]) -> None:
    url = f"/v1/jobs/{job_ids['succeeded']}"
    for headers in (
        {"If-None-Match": "nonsense"},
        {"If-None-Match": 'W/"99"'},
        {"Accept": "application/json; charset=utf-8"},
        {"Accept": "text/html;q=0.9, */*;q=0.1"},
        {"Accept": "APPLICATION/*"},
        {"Accept": "*"},
        {"Accept": ""},
        {"Accept-Language": "tlh", "Accept-Encoding": "identity;q=0"},
        {"Idempotency-Key": ""},  # means nothing for a GET
        {"Range": "bytes=0-0"},
    ):
        assert api.get(url, headers=headers).status_code == 200, headers
    for headers in ({"Accept": "image/avif,image/webp,*/*;q=0.8"}, {"Accept": "image/*"}, {"Range": "lines=1"}):
        assert api.get(f"{url}/image", headers=headers).status_code == 200, headers
