"""POST /v1/jobs/{id}/image/link, and the links that it makes."""

import hashlib
import hmac
import time
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from flask_openapi3.openapi import OpenAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from api.app import build, open_services
from api.services import Services
from shared.image_link import image_link
from shared.settings import Settings
from tests.api.people import KEY, PICTURE, Caller, Submit, Worker, client_with, on_sqlite

SHA256 = hashlib.sha256(PICTURE).hexdigest()
DAY = 86400
NOBODY = "job_" + "0" * 32


@pytest.fixture
def job_id(submit: Submit, worker: Worker) -> str:
    """A job whose image is there."""
    made = submit()["id"]
    worker.succeed(worker.claim())
    return str(made)


@pytest.fixture
def link(api: Caller, job_id: str) -> str:
    return make(api, job_id)


def make(api: Caller, job_id: str, **body: Any) -> str:
    answer = api.post(f"/v1/jobs/{job_id}/image/link", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json["url"])


def made_for(services: Services, job_id: str, seconds: int) -> str:
    """A link with whatever end, in the past too."""
    return image_link("http://localhost", services.settings.secret_key, job_id, seconds)[0]


def changed(link: str, **changes: str | None) -> str:
    parts = urlsplit(link)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()} | changes
    return parts.path + "?" + urlencode({name: value for name, value in query.items() if value is not None})


def test_a_link_opens_the_image_without_a_key(api: Caller, stranger: Caller, job_id: str) -> None:
    answer = api.post(f"/v1/jobs/{job_id}/image/link", json={})
    assert answer.status_code == 200 and set(answer.json) == {"url", "expires_at"}
    assert answer.headers["Cache-Control"] == "no-store"
    url = answer.json["url"]
    assert url.startswith(f"http://localhost/v1/jobs/{job_id}/image?expires=")
    expires = int(parse_qs(urlsplit(url).query)["expires"][0])
    assert datetime.fromisoformat(answer.json["expires_at"]).timestamp() == expires
    picture = stranger.get(url)
    assert picture.status_code == 200 and picture.data == PICTURE and picture.content_type == "image/png"
    assert picture.headers["ETag"] == f'"{SHA256}"' and picture.headers["Referrer-Policy"] == "no-referrer"
    assert picture.headers["X-Content-Type-Options"] == "nosniff"
    assert picture.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    assert picture.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert api.get(url).data == PICTURE  # a key that comes along does no harm


@on_sqlite
def test_nothing_need_be_said_to_have_a_link_made(api: Caller, stranger: Caller, job_id: str) -> None:
    for said in ({}, {"content_type": "application/json"}, {"content_type": "text/plain"}):
        answer = api.post(f"/v1/jobs/{job_id}/image/link", **said)
        assert answer.status_code == 200 and stranger.get(answer.json["url"]).data == PICTURE
    answer = api.post(f"/v1/jobs/{job_id}/image/link", data=b"{}", content_type="text/plain")
    assert answer.status_code == 415 and answer.json["code"] == "unsupported_media_type"


@on_sqlite
def test_it_is_good_for_as_long_as_was_asked(api: Caller, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.5)
    for body, seconds in (({}, 7 * DAY), ({"expires_in": 1}, 1), ({"expires_in": 2_592_000.0}, 30 * DAY)):
        url = make(api, job_id, **body)
        assert parse_qs(urlsplit(url).query)["expires"] == [str(1_000_000 + seconds)]


def test_nobody_keeps_the_image_for_longer_than_the_link_is_good(
    stranger: Caller, api: Caller, job_id: str, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = make(api, job_id, expires_in=3600)
    expires = float(parse_qs(urlsplit(hour).query)["expires"][0])
    monkeypatch.setattr(time, "time", lambda: expires - 1800)
    assert stranger.get(hour).headers["Cache-Control"] == "private, immutable, max-age=1800"
    monkeypatch.setattr(time, "time", lambda: expires - 0.5)
    assert stranger.get(hour).headers["Cache-Control"] == "private, immutable, max-age=1"
    monkeypatch.undo()
    years = made_for(services, job_id, 3000 * DAY)
    assert stranger.get(years).headers["Cache-Control"] == "private, immutable, max-age=31536000"
    assert api.get(f"/v1/jobs/{job_id}/image").headers["Cache-Control"] == "private, immutable, max-age=31536000"


@on_sqlite
def test_parts_lengths_and_etags_are_served_as_with_a_key(stranger: Caller, link: str) -> None:
    part = stranger.get(link, headers={"Range": "bytes=0-9"})
    assert part.status_code == 206 and part.data == PICTURE[:10]
    assert part.headers["Content-Range"] == f"bytes 0-9/{len(PICTURE)}"
    head = stranger.head(link)
    assert head.status_code == 200 and head.data == b"" and head.headers["Content-Length"] == str(len(PICTURE))
    known = stranger.get(link, headers={"If-None-Match": f'"{SHA256}"'})
    assert known.status_code == 304 and known.data == b"" and known.headers["Referrer-Policy"] == "no-referrer"
    beyond = stranger.get(link, headers={"Range": "bytes=99999-"})
    assert beyond.status_code == 416 and beyond.headers["Cache-Control"] == "no-store"
    assert stranger.get(link, headers={"Accept": "application/json"}).status_code == 406


def refusal(answer: Any) -> tuple[int, str]:
    assert answer.content_type == "application/problem+json" and answer.headers["Cache-Control"] == "no-store"
    assert answer.headers.get("Referrer-Policy") == "no-referrer" and "WWW-Authenticate" not in answer.headers
    return answer.status_code, answer.json["code"]


def test_an_expired_link_says_so(
    stranger: Caller, api: Caller, job_id: str, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = stranger.get(made_for(services, job_id, -1))
    assert refusal(answer) == (403, "link_expired") and "image/link" in answer.json["detail"]
    hour = make(api, job_id, expires_in=3600)
    expires = float(parse_qs(urlsplit(hour).query)["expires"][0])
    monkeypatch.setattr(time, "time", lambda: expires)
    assert refusal(stranger.get(hour)) == (403, "link_expired")
    assert stranger.head(hour).status_code == 403


@on_sqlite
def test_what_decides_of_a_signature_takes_as_long_for_any_other(
    stranger: Caller, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hmac, "compare_digest", lambda *_: True)
    assert stranger.get(changed(link, signature="0" * 64)).status_code == 200, "it was another that refused it"


@on_sqlite
def test_a_link_that_was_changed_opens_nothing(
    stranger: Caller, api: Caller, link: str, job_id: str, submit: Submit, worker: Worker
) -> None:
    signature = parse_qs(urlsplit(link).query)["signature"][0]
    expires = parse_qs(urlsplit(link).query)["expires"][0]
    other = submit()["id"]
    worker.succeed(worker.claim())
    for tried in (
        changed(link, signature=signature[:-1]),
        changed(link, signature=signature + "0"),
        changed(link, signature=signature.upper()),
        changed(link, signature=""),
        changed(link, signature="0" * 64),
        changed(link, signature="ü\ud7ff\U0001f600"),
        changed(link, expires=str(int(expires) + 1)),
        changed(link, expires="-1"),
        changed(link, expires="1e9"),
        changed(link, expires="٣" * 10),
        changed(link, expires="9" * 400),
        changed(link, expires=""),
        changed(link, expires=None),
        changed(link, signature=None),
        link.replace(job_id, other),
        link.replace(job_id, NOBODY),
        link.replace(job_id, "x"),
        link.replace(job_id, "job_%00"),
        link.replace(job_id, "job_%ff"),
    ):
        # With a key too: who sends a signature means it.
        for caller in (stranger, api):
            assert refusal(caller.get(tried)) == (403, "link_invalid"), tried


@on_sqlite
def test_a_bad_link_says_the_same_of_jobs_that_are_and_of_jobs_that_are_not(
    stranger: Caller, link: str, job_id: str, submit: Submit
) -> None:
    said = []
    for name in (job_id, submit()["id"], NOBODY):
        answer = stranger.get(changed(link.replace(job_id, name), signature="0" * 64))
        said.append((refusal(answer), answer.json | {"request_id": ""}, sorted(answer.headers.keys())))
    assert said[0] == said[1] == said[2]


@on_sqlite
def test_a_link_of_another_secret_key_opens_nothing(stranger: Caller, job_id: str) -> None:
    assert refusal(stranger.get(image_link("http://localhost", "t" * 32, job_id, DAY)[0])) == (403, "link_invalid")


def test_a_link_dies_with_the_data(stranger: Caller, api: Caller, link: str, job_id: str) -> None:
    assert api.delete(f"/v1/jobs/{job_id}").status_code == 204
    answer = stranger.get(link)
    assert answer.status_code == 410 and answer.json["code"] == "removed"
    answer = api.post(f"/v1/jobs/{job_id}/image/link", json={})
    assert answer.status_code == 410 and answer.json["code"] == "removed"


def test_there_is_no_link_to_an_image_that_is_not_there(api: Caller, submit: Submit, worker: Worker) -> None:
    path = f"/v1/jobs/{submit()['id']}/image/link"
    queued = api.post(path, json={})
    claim = worker.claim()
    for answer, status in ((queued, "queued"), (api.post(path, json={}), "running")):
        assert answer.status_code == 409 and answer.json["code"] == "not_ready" and answer.headers["Retry-After"]
        assert answer.json["detail"] == f"The job is {status}."
    worker.fail(claim)
    answer = api.post(path, json={})
    assert answer.status_code == 409 and answer.json["code"] == "no_image"


@on_sqlite
def test_a_good_link_waits_for_the_image_as_a_key_does(
    stranger: Caller, submit: Submit, worker: Worker, services: Services
) -> None:
    """Webhooks carry links only to images that are there; whoever made one by hand learns no more than a key tells."""
    made = made_for(services, submit()["id"], DAY)
    assert stranger.get(made).status_code == 409
    worker.succeed(worker.claim())
    assert stranger.get(made).data == PICTURE
    assert stranger.get(made_for(services, NOBODY, DAY)).status_code == 404


def test_no_project_makes_links_to_the_images_of_another(neighbour: Caller, link: str, job_id: str) -> None:
    answer = neighbour.post(f"/v1/jobs/{job_id}/image/link", json={})
    unknown = neighbour.post(f"/v1/jobs/{NOBODY}/image/link", json={})
    assert answer.status_code == unknown.status_code == 404
    assert answer.json | {"request_id": ""} == unknown.json | {"request_id": ""}


@on_sqlite
def test_a_link_opens_nothing_but_its_image(stranger: Caller, link: str, job_id: str) -> None:
    query = urlsplit(link).query
    for method, path in (
        ("GET", f"/v1/jobs/{job_id}"),
        ("GET", f"/v1/jobs/{job_id}/attempts"),
        ("GET", f"/v1/jobs/{job_id}/deliveries"),
        ("POST", f"/v1/jobs/{job_id}/image/link"),
        ("POST", f"/v1/jobs/{job_id}/cancel"),
        ("DELETE", f"/v1/jobs/{job_id}"),
        ("GET", "/v1/jobs"),
    ):
        assert stranger.open(f"{path}?{query}", method=method).status_code == 401, path
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert stranger.open(f"/v1/jobs/{job_id}/image?{query}", method=method).status_code == 405


@on_sqlite
def test_without_any_of_it_the_key_is_asked_for(stranger: Caller, api: Caller, link: str) -> None:
    answer = stranger.get(urlsplit(link).path)
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert api.get(urlsplit(link).path).status_code == 200


@on_sqlite
def test_other_parameters_stay_refused(stranger: Caller, link: str) -> None:
    for more, name in (("width=5", "width"), ("download=1", "download"), ("expires=5", "expires")):
        answer = stranger.get(f"{link}&{more}")
        assert answer.status_code == 422 and answer.json["errors"][0]["parameter"] == name


@on_sqlite
def test_links_lead_to_the_public_url(settings: Settings, api: Caller, job_id: str) -> None:
    services = open_services(settings.model_copy(update={"public_url": "https://darkroom.example.com/base/"}))
    app: OpenAPI = build(services)
    link = make(client_with(app, KEY), job_id)
    services.close()
    assert link.startswith(f"https://darkroom.example.com/base/v1/jobs/{job_id}/image?expires=")


@on_sqlite
def test_a_wrong_body_is_refused_and_the_field_named(api: Caller, job_id: str) -> None:
    for body, pointer in (
        ({"expires_in": 0}, "#/expires_in"),
        ({"expires_in": 30 * DAY + 1}, "#/expires_in"),
        ({"expires_in": 1.5}, "#/expires_in"),
        ({"expires_in": "60"}, "#/expires_in"),
        ({"expires_in": True}, "#/expires_in"),
        ({"expires_in": None}, "#/expires_in"),
        ({"expires_in": 10**400}, "#/expires_in"),
        ({"expires": 60}, "#/expires"),
        ([], "#"),
    ):
        answer = api.post(f"/v1/jobs/{job_id}/image/link", json=body)
        assert answer.status_code == 422 and answer.json["errors"][0]["pointer"] == pointer, (body, answer.text)


@on_sqlite
@examples(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None, derandomize=True
)
@given(expires=st.text(max_size=20) | st.integers(0, 10**12).map(str), signature=st.text(max_size=70))
def test_no_guess_opens_anything(stranger: Caller, job_id: str, expires: str, signature: str) -> None:
    answer = stranger.get(f"/v1/jobs/{job_id}/image", query_string={"expires": expires, "signature": signature})
    assert refusal(answer) == (403, "link_invalid")
