"""What is no image to alter, or not altered here: each with its exact answer, and nothing accepted."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from sqlalchemy import func, select

from api.app import build
from api.services import Services
from shared.catalogue import DEFAULT_MODEL
from shared.inspector import Inspector, InspectorAway
from shared.tables import inputs, jobs
from tests.api.altering import DREAMSHAPER, JPEG, MASK, PNG, b64, body, bomb, turned
from tests.api.people import KEY, Caller, Submit, Worker, client_with, on_sqlite
from tests.receiver import Receiver
from tests.shared.pictures import animated, jpeg_of_size, png, webp_of_size, whole

IMAGE, THE_MASK, STRENGTH = "#/input/image", "#/input/mask", "#/input/strength"
NO_BASE64 = "Is not base64 (RFC 4648, section 4, without line breaks)."
NO_PICTURE = "Not a PNG, JPEG or WEBP picture."
NO_URL = "No URL is fetched: send the picture itself, in base64."
DATA_URL = "A data: URL must begin with data:image/TYPE;base64, and nothing between."
NO_JOB = "There is no such job that this key may see."
ONLY_WITH = "Is only taken together with an image."

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/latest"/></svg>'


def wrong_checksum() -> bytes:
    data = bytearray(PNG)
    data[29] ^= 1  # in the checksum of its header
    return bytes(data)


def zip_behind_png_magic() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", b"x" * 1000)
    return b"\x89PNG\r\n\x1a\n" + buffer.getvalue()


def bad_exif() -> bytes:
    return whole("WEBP", 512, 256, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")


def gives(size: str, side: str, pixels: int) -> str:
    says = "give width and height, and it is scaled and cut to them."
    return f"Is {size}, which would give a {side} of {pixels}, and 256 to 2048 are made: {says}"


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    # Texts
    "no text": ({"image": 1}, IMAGE, "Should be a valid string."),
    "empty": ({"image": ""}, IMAGE, "Is empty."),
    "blank": ({"image": " \n"}, IMAGE, NO_BASE64),
    "not base64": ({"image": "a picture of a cat!"}, IMAGE, NO_BASE64),
    "base64 for URLs": ({"image": "_-_-"}, IMAGE, NO_BASE64),
    "base64 in lines": ({"image": b64(PNG)[:76] + "\n" + b64(PNG)[76:]}, IMAGE, NO_BASE64),
    "base64 without its padding": ({"image": b64(PNG).rstrip("=")[:-1]}, IMAGE, NO_BASE64),
    "two pictures in one": ({"image": b64(b"ab") + b64(PNG)}, IMAGE, NO_BASE64),
    "letters of another script": ({"image": "AAAА"}, IMAGE, NO_BASE64),  # noqa: RUF001  the last one is Cyrillic
    "a path": ({"image": "/etc/hosts"}, IMAGE, NO_BASE64),
    "a path that is base64": ({"image": "/etc/hostnam"}, IMAGE, NO_PICTURE),
    # Addresses
    "URL": ({"image": "https://example.com/cat.png"}, IMAGE, NO_URL),
    "URL of a file": ({"image": "file:///etc/passwd"}, IMAGE, NO_URL),
    "URL of a cloud's metadata": ({"image": "http://169.254.169.254/latest/meta-data/"}, IMAGE, NO_URL),
    "data URL of another type": ({"image": "data:text/html;base64," + b64(PNG)}, IMAGE, DATA_URL),
    "data URL of any type": ({"image": "data:;base64," + b64(PNG)}, IMAGE, DATA_URL),
    "data URL that is not base64": ({"image": "data:image/svg+xml,<svg/>"}, IMAGE, DATA_URL),
    "data URL with a parameter": ({"image": "data:image/png;x=y;base64," + b64(PNG)}, IMAGE, DATA_URL),
    "data URL of SVG": ({"image": "data:image/svg+xml;base64," + b64(SVG)}, IMAGE, NO_PICTURE),
    "data URL of nothing": ({"image": "data:image/png;base64,"}, IMAGE, "Is empty."),
    # Pictures
    "GIF": ({"image": b64(whole("GIF"))}, IMAGE, NO_PICTURE),
    "TIFF": ({"image": b64(whole("TIFF"))}, IMAGE, NO_PICTURE),
    "SVG": ({"image": b64(SVG)}, IMAGE, NO_PICTURE),
    "HTML": ({"image": b64(b"<!doctype html><script>alert(1)</script>")}, IMAGE, NO_PICTURE),
    "animated GIF": ({"image": b64(animated("GIF"))}, IMAGE, NO_PICTURE),
    "animated PNG": ({"image": b64(animated("PNG"))}, IMAGE, "The picture is animated or has several frames."),
    "animated WEBP": ({"image": b64(animated("WEBP"))}, IMAGE, "The picture is animated or has several frames."),
    "PNG cut short": ({"image": b64(PNG[:-1000])}, IMAGE, "The PNG picture is cut short."),
    "JPEG of its first bytes": ({"image": b64(JPEG[:3])}, IMAGE, "The JPEG picture has no valid header."),
    "wrong checksum": ({"image": b64(wrong_checksum())}, IMAGE, "The PNG picture is damaged: a checksum is wrong."),
    "pixels that are missing": (
        {"image": b64(png(pixels=zlib.compress(b"\0" * 9)))},
        IMAGE,
        "The PNG picture has too few pixels.",
    ),
    "bomb": (
        {"image": b64(bomb(100_000))},
        IMAGE,
        "The picture has 100000x100000 pixels, more than 16777216 in all.",
    ),
    "bomb as JPEG": (
        {"image": b64(jpeg_of_size(65_000, 65_000))},
        IMAGE,
        "The JPEG picture has too many pixels, more than 16777216 in all.",
    ),
    "a pixel too many": (
        {"image": b64(whole("PNG", 4096, 4097, "1")), "width": 512, "height": 512},
        IMAGE,
        "The picture has 4096x4097 pixels, more than 16777216 in all.",
    ),
    "zip that begins as a PNG": ({"image": b64(zip_behind_png_magic())}, IMAGE, "The PNG picture is cut short."),
    "EXIF that is broken": ({"image": b64(bad_exif())}, IMAGE, "Its EXIF data can't be read: send it without them."),
    # Sizes
    "too small to say the size": (
        {"image": b64(whole("PNG", 512, 250))},
        IMAGE,
        gives("512x250", "height", 248),
    ),
    "too large to say the size": (
        {"image": b64(whole("PNG", 4000, 300, "L"))},
        IMAGE,
        gives("4000x300", "width", 4000),
    ),
    "too narrow for the height": (
        {"image": b64(whole("PNG", 1000, 2000, "L")), "height": 256},
        IMAGE,
        gives("1000x2000", "width", 128),
    ),
    "turned, and too narrow then": (
        {"image": b64(turned(6, width=512, height=240))},
        IMAGE,
        gives("240x512", "width", 240),
    ),
    "a width beyond the limits": (
        {"image": b64(PNG), "width": 4096},
        "#/input/width",
        "Should be less than or equal to 2048.",
    ),
    # Masks
    "mask without image": ({"mask": b64(MASK)}, THE_MASK, ONLY_WITH),
    "mask of another size": (
        {"image": b64(PNG), "mask": b64(whole("PNG", 256, 512, "L"))},
        THE_MASK,
        "Must be as large as the image, which is 512x256; it is 256x512.",
    ),
    "mask as large as the picture before it is turned": (
        {"image": b64(turned(8)), "mask": b64(MASK)},
        THE_MASK,
        "Must be as large as the image, which is 256x512; it is 512x256.",
    ),
    "mask that is no image": ({"image": b64(PNG), "mask": b64(b"white")}, THE_MASK, NO_PICTURE),
    "mask that is no base64": ({"image": b64(PNG), "mask": "white"}, THE_MASK, NO_BASE64),
    "mask by URL": ({"image": b64(PNG), "mask": "http://127.0.0.1/mask.png"}, THE_MASK, NO_URL),
    "mask by a job's id": ({"image": b64(PNG), "mask": f"job_{'0' * 32}"}, THE_MASK, NO_BASE64),
    "mask that is a bomb": (
        {"image": b64(PNG), "mask": b64(webp_of_size(16384, 16384))},
        THE_MASK,
        "The WEBP picture has too many pixels, more than 16777216 in all.",
    ),
    # Strengths
    "strength without image": ({"strength": 0.5}, STRENGTH, ONLY_WITH),
    "strength 0": ({"image": b64(PNG), "strength": 0}, STRENGTH, "Should be greater than 0."),
    "strength 1.1": ({"image": b64(PNG), "strength": 1.1}, STRENGTH, "Should be less than or equal to 1."),
    "strength as text": ({"image": b64(PNG), "strength": "0.5"}, STRENGTH, "Should be a valid number."),
    "strength that is true": ({"image": b64(PNG), "strength": True}, STRENGTH, "Should be a valid number."),
    # Backends and models
    "a backend that can't": (
        {"image": b64(PNG), "backend": "dataoorts"},
        "#/backend",
        "The backend dataoorts can't alter images; diffusers can.",
    ),
    "a model that can't": (
        {"image": b64(PNG), "model": DREAMSHAPER},
        IMAGE,
        f"No image is taken here: no backend alters images with {DREAMSHAPER}; {DEFAULT_MODEL} on diffusers can.",
    ),
    # Ids
    "an id of nothing": ({"image": f"job_{'0' * 32}"}, IMAGE, NO_JOB),
    "an id that is none": ({"image": "job_1"}, IMAGE, NO_JOB),
    "an id in capitals": ({"image": f"job_{'A' * 32}"}, IMAGE, NO_JOB),
    "an id with more behind it": ({"image": f"job_{'0' * 32}/../x"}, IMAGE, NO_JOB),
}


@pytest.fixture
def backends() -> tuple[str, ...]:
    return ("dataoorts", "diffusers")


@pytest.fixture
def refused(app: OpenAPI, services: Services) -> Callable[[dict[str, Any]], tuple[str, str]]:
    """Send a body to an API that must refuse it for one field, and accept nothing; where, and why."""

    def send(body: dict[str, Any]) -> tuple[str, str]:
        before = jobs_and_inputs(services)
        response = client_with(app, KEY).post("/v1/jobs", json=body)
        assert response.status_code == 422 and response.json["code"] == "invalid", response.text[:500]
        assert jobs_and_inputs(services) == before and len(response.text) < 1000
        [error] = response.json["errors"]
        return error["pointer"], error["detail"]

    return send


def jobs_and_inputs(services: Services) -> tuple[Any, Any]:
    with services.database.read() as connection:
        counts = [connection.scalar(select(func.count()).select_from(table)) for table in (jobs, inputs)]
    return counts[0], counts[1]


@on_sqlite
@pytest.mark.parametrize(("given", "pointer", "detail"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_image_to_alter_is_refused_with_the_reason(
    refused: Callable[[dict[str, Any]], tuple[str, str]], given: dict[str, Any], pointer: str, detail: str
) -> None:
    assert refused(body(**given)) == (pointer, detail)


@on_sqlite
def test_a_jpeg_that_is_cut_short_is_refused(refused: Callable[[dict[str, Any]], tuple[str, str]]) -> None:
    pointer, detail = refused(body(image=b64(JPEG[:-500])))
    assert pointer == IMAGE and detail.startswith("The JPEG picture cannot be decoded: OSError: ")  # Pillow's words


@on_sqlite
def test_a_strength_that_is_no_number_is_no_json(api: Caller) -> None:
    for strength in ("NaN", "Infinity"):
        text = json.dumps(body(image=b64(PNG))).replace('"a cat"', f'"a cat", "strength": {strength}')
        response = api.post("/v1/jobs", data=text, content_type="application/json")
        assert response.status_code == 400 and response.json["code"] == "malformed"


def test_only_a_job_of_ones_own_that_has_its_picture_is_altered(
    api: Caller,
    neighbour: Caller,
    submit: Submit,
    worker: Worker,
    refused: Callable[[dict[str, Any]], tuple[str, str]],
) -> None:
    queued = submit(backend="dataoorts")["id"]
    assert refused(body(image=queued)) == (IMAGE, "This job is queued: wait until it has succeeded.")
    claim = worker.claim()
    assert refused(body(image=queued)) == (IMAGE, "This job is running: wait until it has succeeded.")
    worker.fail(claim)
    assert refused(body(image=queued)) == (IMAGE, "This job is failed: it has no image.")
    canceled = submit(backend="dataoorts")["id"]
    api.post(f"/v1/jobs/{canceled}/cancel")
    assert refused(body(image=canceled)) == (IMAGE, "This job is canceled: it has no image.")
    theirs = neighbour.post("/v1/jobs", json=body(backend="dataoorts")).json["id"]
    worker.succeed(worker.claim())
    assert neighbour.get(f"/v1/jobs/{theirs}").json["status"] == "succeeded"
    assert refused(body(image=theirs)) == (IMAGE, NO_JOB)
    removed = submit(backend="dataoorts")["id"]
    worker.succeed(worker.claim())
    assert api.delete(f"/v1/jobs/{removed}").status_code == 204
    assert refused(body(image=removed)) == (IMAGE, "The image of this job was removed.")


@on_sqlite
def test_no_url_is_ever_fetched(refused: Callable[[dict[str, Any]], tuple[str, str]]) -> None:
    receiver = Receiver()
    try:
        for field in ("image", "mask"):
            given = {"image": b64(PNG)} | {field: f"{receiver.url}/cat.png"}
            assert refused(body(**given)) == (f"#/input/{field}", NO_URL)
        assert receiver.letters == []
    finally:
        receiver.close()


@on_sqlite
def test_where_no_backend_can_the_one_is_named_that_could(services: Services) -> None:
    only_vendor = services.settings.model_copy(update={"backends": ("dataoorts",)})
    api = client_with(build(replace(services, settings=only_vendor)), KEY)
    response = api.post("/v1/jobs", json=body(image=b64(PNG)))
    who = "diffusers or automatic1111"
    needs = f"No image is taken here: for {DEFAULT_MODEL} it needs the backend {who}, which is not enabled."
    assert response.json["errors"] == [{"pointer": IMAGE, "detail": needs}]


@on_sqlite
def test_several_mistakes_are_told_at_once_and_a_wrong_image_blames_no_mask(api: Caller) -> None:
    response = api.post("/v1/jobs", json=body(image=7, mask=b64(MASK), strength=2, width=1))
    assert {error["pointer"] for error in response.json["errors"]} == {IMAGE, STRENGTH, "#/input/width"}


@on_sqlite
def test_no_picture_and_no_word_of_one_stands_in_an_answer(api: Caller) -> None:
    for text in (
        "k4n4ry" * 50,
        b64(b"\x89PNG\r\n\x1a\n" + b"k4n4ry" * 50),
        "http://k4n4ry/",
        "data:k4n4ry",
        "job_k4n4ry",
    ):
        for field in ("image", "mask"):
            response = api.post("/v1/jobs", json=body(**({"image": b64(PNG)} | {field: text})))
            assert response.status_code == 422 and "k4n4ry" not in response.text


@on_sqlite
def test_while_nobody_can_judge_nothing_is_accepted(
    api: Caller, services: Services, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(data: bytes) -> None:
        raise InspectorAway("no process to judge pictures could be started")

    monkeypatch.setattr(inspector, "inspect", away)
    response = api.post("/v1/jobs", json=body(image=b64(PNG)), headers={"Idempotency-Key": "k"})
    assert response.status_code == 503 and response.json["code"] == "not_judged" and response.json["retryable"]
    assert response.headers["Retry-After"] == "5" and jobs_and_inputs(services) == (0, 0)
    monkeypatch.undo()
    accepted = api.post("/v1/jobs", json=body(image=b64(PNG)), headers={"Idempotency-Key": "k"})
    assert accepted.status_code == 202 and "Idempotent-Replayed" not in accepted.headers


@on_sqlite
def test_a_body_has_room_for_images_where_they_are_taken(api: Caller, services: Services) -> None:
    def ask(path: str, size: int, client: Caller = api) -> Any:
        response = client.post(path, data=b" " * size, content_type="application/json")
        return response.status_code, response.json["detail"]

    most = "A body may have at most 24,000,000 bytes."
    assert ask("/v1/jobs", 24_000_001) == (413, most)
    assert ask("/v1/jobs", 24_000_000)[0] == 400
    usual = "A body may have at most 1,000,000 bytes."
    assert ask("/v1/endpoints", 1_000_001) == (413, usual)
    assert ask(f"/v1/jobs/job_{'0' * 32}/retry", 1_000_001) == (413, usual)
    assert api.post("/api/v1", data=b" " * 1_000_001, content_type="application/json").status_code == 413
    assert ask("/v1/jobs", 24_000_001, client_with(build(services), None))[0] == 401
    only_vendor = services.settings.model_copy(update={"backends": ("dataoorts",)})
    without = client_with(build(replace(services, settings=only_vendor)), KEY)
    assert ask("/v1/jobs", 1_000_001, without) == (413, usual)


@on_sqlite
def test_too_many_bytes_of_image_are_refused_by_the_body(api: Caller) -> None:
    response = api.post("/v1/jobs", json=body(image=b64(PNG + b"\0" * 18_000_000)))
    assert response.status_code == 413 and response.json["code"] == "too_large"
