"""GET /v1/jobs/{id}/image."""

import hashlib

import pytest

from api.services import Services
from tests.api.people import PICTURE, Caller, Submit, Worker, on_sqlite

SHA256 = hashlib.sha256(PICTURE).hexdigest()


@pytest.fixture
def url(submit: Submit, worker: Worker) -> str:
    """The address of an image that is there."""
    job = submit()
    worker.succeed(worker.claim())
    return str(job["urls"]["image"])


def test_the_image_is_sent_as_it_was_received(api: Caller, url: str) -> None:
    response = api.get(url)
    assert response.status_code == 200 and response.data == PICTURE and response.content_type == "image/png"
    assert response.headers["ETag"] == f'"{SHA256}"'
    assert response.headers["Cache-Control"] == "private, immutable, max-age=31536000"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    name = url.split("/")[-2]
    assert response.headers["Content-Disposition"] == f'inline; filename="{name}.png"'


@on_sqlite
def test_head_tells_the_length_and_sends_nothing(api: Caller, url: str) -> None:
    response = api.head(url)
    assert response.status_code == 200 and response.data == b""
    assert response.headers["Content-Length"] == str(len(PICTURE)) and response.headers["ETag"] == f'"{SHA256}"'


@on_sqlite
def test_an_image_that_the_client_has_is_not_sent_again(api: Caller, url: str) -> None:
    for tag in (f'"{SHA256}"', f'W/"{SHA256}"', f'"x", "{SHA256}"'):
        response = api.get(url, headers={"If-None-Match": tag, "Range": "bytes=0-1"})
        assert response.status_code == 304 and response.data == b"" and response.headers["ETag"] == f'"{SHA256}"'
    assert api.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


@on_sqlite
def test_an_image_that_is_another_one_than_was_asked_for_is_not_sent(api: Caller, url: str) -> None:
    for method in ("GET", "HEAD"):
        for more in ({}, {"Range": "bytes=0-3"}, {"If-None-Match": f'"{SHA256}"'}):
            response = api.open(url, method=method, headers={"If-Match": f'"other", W/"{SHA256}"', **more})
            assert (response.status_code, response.content_type) == (412, "application/problem+json")
            assert response.headers["Cache-Control"] == "no-store"
    assert api.get(url, headers={"If-Match": '"other"'}).json["code"] == "precondition_failed"
    for tags in ("*", f'"{SHA256}"', f'"other", "{SHA256}"'):
        response = api.get(url, headers={"If-Match": tags})
        assert response.status_code == 200 and response.data == PICTURE
        response = api.get(url, headers={"If-Match": tags, "Range": "bytes=0-3"})
        assert response.status_code == 206 and response.data == PICTURE[:4]


@on_sqlite
def test_a_range_of_it_can_be_had(api: Caller, url: str) -> None:
    size = len(PICTURE)
    for asked, start, end in (("0-9", 0, 10), ("1000-", 1000, size), ("-5", size - 5, size), ("5-99999", 5, size)):
        response = api.get(url, headers={"Range": f"bytes={asked}"})
        assert response.status_code == 206 and response.data == PICTURE[start:end], asked
        assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        assert response.headers["Content-Length"] == str(end - start) and response.content_type == "image/png"


@on_sqlite
def test_a_range_beyond_it_is_refused(api: Caller, url: str) -> None:
    response = api.get(url, headers={"Range": f"bytes={len(PICTURE)}-"})
    assert response.status_code == 416 and response.json["code"] == "range_not_satisfiable"
    assert response.headers["Content-Range"] == f"bytes */{len(PICTURE)}"
    assert response.headers["Cache-Control"] == "no-store"


@on_sqlite
def test_a_range_that_is_not_understood_gets_the_whole(api: Caller, url: str) -> None:
    for asked in ("bytes=0-1,5-6", "lines=1-2", "bytes=5-2", "nonsense", "bytes="):
        response = api.get(url, headers={"Range": asked})
        assert response.status_code == 200 and response.data == PICTURE, asked
    response = api.get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    assert response.status_code == 200 and response.data == PICTURE


@on_sqlite
def test_the_file_name_ends_as_the_type_says(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    worker.succeed(worker.claim(), b"\xff\xd8\xff", "image/jpeg")
    response = api.get(job["urls"]["image"])
    assert response.content_type == "image/jpeg" and f'"{job["id"]}.jpg"' in response.headers["Content-Disposition"]


def test_while_the_job_is_open_the_image_is_not_ready(api: Caller, submit: Submit, worker: Worker) -> None:
    url = submit()["urls"]["image"]
    waiting = api.get(url)
    worker.claim()
    for response, status in ((waiting, "queued"), (api.get(url), "running")):
        assert response.status_code == 409 and response.json["code"] == "not_ready" and response.json["retryable"]
        assert response.json["detail"] == f"The job is {status}." and response.headers["Retry-After"] == "1"


@on_sqlite
def test_a_job_that_failed_has_no_image(api: Caller, submit: Submit, worker: Worker) -> None:
    url = submit()["urls"]["image"]
    worker.fail(worker.claim())
    response = api.get(url)
    assert response.status_code == 409 and response.json["code"] == "no_image" and not response.json["retryable"]


@on_sqlite
def test_a_lost_image_is_a_fault_of_ours(api: Caller, url: str, services: Services) -> None:
    services.images.remove(url.split("/")[-2], 1)
    assert api.get(url).status_code == 500
