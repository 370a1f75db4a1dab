"""POST /v1/jobs with an image to alter: what is kept, copied, handed on and removed, and what is said of it."""

import hashlib
import json
import threading
import tracemalloc
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import validate
from sqlalchemy import select

from api import altering
from api.app import build, open_services
from api.services import Services
from shared import inputs
from shared.catalogue import DEFAULT_MODEL
from shared.inspector import Inspector
from shared.job_object import job_object
from shared.picture import Facts
from shared.settings import Settings
from shared.tables import Status, events
from shared.tables import inputs as table
from tests.api.altering import DREAMSHAPER, JPEG, MASK, PNG, b64, body, turned
from tests.api.people import KEY, PICTURE, Caller, Submit, Worker, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.api.test_altering_refused import REFUSED
from tests.lines import written
from tests.lives import job_row
from tests.shared.pictures import whole


@pytest.fixture
def backends() -> tuple[str, ...]:
    return ("dataoorts", "diffusers")


#: Of what is refused: what needs no look at the picture, at the job or at the sizes of both.
TOLD_BY_THE_SCHEMA = (
    *("no text", "empty", "blank", "not base64", "base64 for URLs", "base64 in lines", "letters of another script"),
    *("URL", "URL of a file", "URL of a cloud's metadata", "mask by URL", "mask by a job's id"),
    *("data URL of another type", "data URL of any type", "data URL that is not base64", "data URL with a parameter"),
    *("data URL of nothing", "an id that is none", "an id in capitals", "an id with more behind it"),
    *("mask without image", "strength without image", "strength 0", "strength 1.1", "strength as text"),
    *("strength that is true", "a width beyond the limits", "a backend that can't", "a model that can't"),
)


def kept(services: Services, job_id: str) -> dict[str, bytes]:
    with services.database.read() as connection:
        return inputs.read(connection, job_id)


def described(data: bytes, content_type: str, width: int, height: int) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    return {"content_type": content_type, "width": width, "height": height, "bytes": len(data), "sha256": sha256}


def altered(api: Caller, **given: Any) -> dict[str, Any]:
    response = api.post("/v1/jobs", json=body(**given))
    assert response.status_code == 202, response.text
    return dict(response.json)


def test_image_and_mask_are_kept_as_they_came_and_only_described(api: Caller, services: Services) -> None:
    job = altered(api, image=b64(JPEG), mask=b64(MASK), strength=0.3, seed=7)
    assert job["input"] == {
        "prompt": "a cat",
        "negative_prompt": None,
        "num_steps": 20,
        "guidance": 7.5,
        "seed": 7,
        "image": described(JPEG, "image/jpeg", 512, 256),
        "strength": 0.3,
        "width": 512,
        "height": 256,
        "mask": described(MASK, "image/png", 512, 256),
    }
    assert kept(services, job["id"]) == {"image": JPEG, "mask": MASK}
    row = job_row(services.database, job["id"])
    assert row.input == job["input"] and (row.backend_asked, row.backend) == ("auto", "diffusers")
    assert api.get(job["urls"]["self"]).json["input"] == job["input"]
    with services.database.read() as connection:
        told = repr(connection.execute(select(events)).all())
    told += repr(row) + job_object(row, 0, None, "http://x").model_dump_json()  # what a webhook carries
    assert b64(JPEG)[:40] not in told and "JFIF" not in told


@on_sqlite
def test_a_strength_is_filled_in_and_a_mask_is_not(api: Caller, services: Services) -> None:
    given = altered(api, image=b64(PNG), mask=None, strength=None, backend="diffusers")["input"]
    assert given["strength"] == 0.75 and "mask" not in given
    assert altered(api, image=b64(PNG), strength=1)["input"]["strength"] == 1


@on_sqlite
@pytest.mark.parametrize("none", [{}, {"image": None, "mask": None, "strength": None}])
def test_a_job_without_an_image_is_as_it_always_was(api: Caller, services: Services, none: dict[str, Any]) -> None:
    job = altered(api, backend="dataoorts", **none)
    assert set(job["input"]) == {"prompt", "negative_prompt", "width", "height", "num_steps", "guidance", "seed"}
    assert job["input"]["width"] == 512 and kept(services, job["id"]) == {}
    assert job_row(services.database, job["id"]).backend == "dataoorts"


@on_sqlite
def test_a_data_url_is_the_picture_in_it_whatever_it_is_announced_as(api: Caller, services: Services) -> None:
    for announced in ("image/png", "image/jpeg", "image/x-my.own+type"):
        job = altered(api, image=f"data:{announced};base64,{b64(PNG)}", mask=f"data:{announced};base64,{b64(MASK)}")
        assert job["input"]["image"]["content_type"] == "image/png"
        assert kept(services, job["id"]) == {"image": PNG, "mask": MASK}


@on_sqlite
@pytest.mark.parametrize(
    ("image", "given", "size"),
    [
        (whole("PNG", 512, 256), {}, (512, 256)),
        (whole("WEBP", 1023, 769), {}, (1024, 768)),
        (whole("PNG", 2051, 253, "L"), {}, (2048, 256)),
        (turned(1), {}, (512, 256)),
        (turned(3), {}, (512, 256)),
        (turned(6), {}, (256, 512)),
        (turned(8, "PNG"), {}, (256, 512)),
        (turned(5, "WEBP"), {}, (256, 512)),
        (whole("PNG", 3, 5), {"width": 256, "height": 2048}, (256, 2048)),
        (whole("PNG", 4096, 4096, "1"), {"width": 512, "height": 512}, (512, 512)),
        (whole("PNG", 1024, 768), {"width": 512}, (512, 384)),
        (whole("PNG", 1024, 768), {"height": 384}, (512, 384)),
        (turned(6), {"width": 512}, (512, 1024)),
    ],
)
def test_the_picture_is_as_large_as_asked_for_else_as_the_image_is_seen(
    api: Caller, image: bytes, given: dict[str, int], size: tuple[int, int]
) -> None:
    job = altered(api, image=b64(image), **given)
    assert (job["input"]["width"], job["input"]["height"]) == size


@on_sqlite
def test_a_mask_fits_what_is_seen_of_the_image(api: Caller) -> None:
    seen = {"width": 256, "height": 512}
    for mask in (whole("PNG", 256, 512, "L"), whole("WEBP", 256, 512, "RGBA"), turned(6, "PNG")):
        job = altered(api, image=b64(turned(6)), mask=b64(mask), width=512, height=512)
        assert seen.items() <= job["input"]["mask"].items() and seen.items() <= job["input"]["image"].items()


def test_the_picture_of_an_earlier_job_is_copied_with_what_is_known_of_it(
    api: Caller,
    services: Services,
    submit: Submit,
    worker: Worker,
    inspector: Inspector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = submit(backend="dataoorts")
    worker.succeed(worker.claim())

    def judge(data: bytes) -> None:
        raise AssertionError("it was judged when it came")

    monkeypatch.setattr(inspector, "inspect", judge)
    job = altered(api, image=first["id"])
    assert job["input"]["image"] == described(PICTURE, "image/png", 640, 480) | {"job": first["id"]}
    assert (job["input"]["width"], job["input"]["height"]) == (640, 480)
    assert api.delete(first["urls"]["self"]).status_code == 204
    assert kept(services, job["id"]) == {"image": PICTURE}


@on_sqlite
def test_the_picture_of_an_earlier_job_takes_a_mask_of_its_size(api: Caller, submit: Submit, worker: Worker) -> None:
    first = submit(backend="dataoorts")
    worker.succeed(worker.claim())
    assert altered(api, image=first["id"], mask=b64(whole("PNG", 640, 480, "L")))["input"]["mask"]["width"] == 640


def test_they_are_removed_with_the_job(api: Caller, services: Services) -> None:
    job, other = altered(api, image=b64(PNG), mask=b64(MASK)), altered(api, image=b64(PNG))
    assert api.delete(job["urls"]["self"]).status_code == 409
    api.post(job["urls"]["cancel"])
    assert api.delete(job["urls"]["self"]).status_code == 204
    assert kept(services, job["id"]) == {} and kept(services, other["id"]) == {"image": PNG}
    assert api.get(job["urls"]["self"]).json["input"] == {}


def test_a_job_that_is_submitted_again_has_its_own(api: Caller, services: Services) -> None:
    job = altered(api, image=b64(PNG), mask=b64(MASK))
    api.post(job["urls"]["cancel"])
    again = api.post(f"{job['urls']['self']}/retry").json
    assert again["input"] == job["input"] and job_row(services.database, again["id"]).backend == "diffusers"
    api.delete(job["urls"]["self"])
    assert kept(services, again["id"]) == {"image": PNG, "mask": MASK}


@on_sqlite
def test_a_job_is_not_submitted_again_where_no_backend_alters_any_more(api: Caller, services: Services) -> None:
    job = altered(api, image=b64(PNG))
    api.post(job["urls"]["cancel"])
    with closing(open_services(services.settings.model_copy(update={"backends": ("dataoorts",)}))) as there:
        response = client_with(build(there), KEY).post(f"{job['urls']['self']}/retry")
    assert response.status_code == 409 and response.json["code"] == "not_retryable"


def test_the_same_request_gets_the_same_job_without_another_look_at_its_image(
    api: Caller,
    services: Services,
    submit: Submit,
    worker: Worker,
    inspector: Inspector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = submit(backend="dataoorts")
    worker.succeed(worker.claim())
    judged: list[bytes] = []
    inspect = inspector.inspect

    def judge(data: bytes) -> Facts:
        judged.append(data)
        return inspect(data)

    monkeypatch.setattr(inspector, "inspect", judge)

    def send(key: str, **given: Any) -> Any:
        return api.post("/v1/jobs", json=body(**given), headers={"Idempotency-Key": key})

    of_job, of_bytes = send("a", image=first["id"]), send("b", image=b64(PNG))
    assert api.delete(first["urls"]["self"]).status_code == 204
    for made, again in (
        (of_job, send("a", image=first["id"])),
        (of_bytes, send("b", image=b64(PNG), strength=0.75, mask=None)),
    ):
        assert made.status_code == again.status_code == 202 and made.json["id"] == again.json["id"]
        assert again.headers["Idempotent-Replayed"] == "true" and "Idempotent-Replayed" not in made.headers
    assert judged == [PNG]
    for other in (
        {"image": b64(JPEG)},
        {"image": b64(PNG), "strength": 0.7},
        {"image": b64(PNG), "mask": b64(MASK)},
        {"image": b64(PNG), "width": 512},
        {},
    ):
        assert send("b", **other).json["code"] == "idempotency_key_reused", other
    assert len(judged) == 1 and kept(services, of_bytes.json["id"]) == {"image": PNG}


def test_twins_at_once_make_one_job_with_one_image(app: OpenAPI, services: Services) -> None:
    answers: list[Any] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait(30)
        sent = client_with(app, KEY).post("/v1/jobs", json=body(image=b64(PNG)), headers={"Idempotency-Key": "k"})
        answers.append(sent)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [202] * 8
    assert len({answer.json["id"] for answer in answers}) == 1
    with services.database.read() as connection:
        assert connection.scalars(select(table.c.name)).all() == ["image"]


def test_nothing_is_held_of_the_database_while_an_image_is_judged(
    api: Caller, services: Services, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    inspect = inspector.inspect

    def judge(data: bytes) -> Facts:
        held.append(services.database.engine.pool.checkedout())  # type: ignore[attr-defined]
        with services.database.write():  # would wait for an open transaction on SQLite
            return inspect(data)

    monkeypatch.setattr(inspector, "inspect", judge)
    altered(api, image=b64(PNG), mask=b64(MASK))
    assert held == [0, 0]


@on_sqlite
def test_who_waits_for_a_job_keeps_no_image_in_memory(
    api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.dumps(body(image=b64(PNG + b"\0" * 3_000_000)))
    held: list[int] = []
    until = services.waiting.until

    def look(*given: Any, **more: Any) -> Any:
        held.append(tracemalloc.get_traced_memory()[0])
        return until(*given, **more)

    monkeypatch.setattr(services.waiting, "until", look)
    send = {"data": data.encode(), "content_type": "application/json", "headers": {"Prefer": "wait=0"}}
    tracemalloc.start()
    try:
        assert api.post("/v1/jobs", **send).status_code == 202
    finally:
        tracemalloc.stop()
    assert held[0] < 1_000_000, "4 MB were sent"


@on_sqlite
def test_nothing_of_an_image_is_logged(api: Caller) -> None:
    with written() as lines:
        altered(api, image=b64(PNG), mask=b64(MASK))
        api.post("/v1/jobs", json=body(image=b64(PNG)[:-100]))
    said = lines.getvalue()
    assert (
        "POST /v1/jobs 202" in said and "POST /v1/jobs 422" in said and b64(PNG)[:40] not in said and "IHDR" not in said
    )


@on_sqlite
def test_the_models_say_who_alters_images(api: Caller) -> None:
    models = {model["id"]: model for model in api.get("/v1/models").json["data"]}
    assert models[DEFAULT_MODEL]["image_to_image"] == ["diffusers"]
    assert models[DREAMSHAPER]["image_to_image"] == []


@on_sqlite
def test_the_document_describes_what_is_taken(stranger: Caller) -> None:
    document = stranger.get("/openapi.json").json
    validate(document)
    schema = {"$ref": "#/components/schemas/SubmitJob", "components": document["components"]}
    is_taken = Draft202012Validator(schema).is_valid
    for given in (
        {"image": b64(PNG)},
        {"image": "data:image/png;base64," + b64(PNG), "mask": b64(MASK), "strength": 0.5, "backend": "diffusers"},
        {"image": f"job_{'0' * 32}", "mask": None, "backend": "auto"},
        {"image": None, "mask": None, "strength": None, "backend": "dataoorts"},
        {"backend": "dataoorts"},
        {"model": DREAMSHAPER, "backend": "dataoorts"},
    ):
        assert is_taken(body(**given)), given
    for name in TOLD_BY_THE_SCHEMA:
        given, *_ = REFUSED[name]
        assert not is_taken(body(**given)), name


@on_sqlite
def test_where_no_backend_alters_images_nothing_is_said_of_them(services: Services) -> None:
    only_vendor = services.settings.model_copy(update={"backends": ("dataoorts",)})
    app = build(replace(services, settings=only_vendor))
    document = client_with(app, None).get("/openapi.json").json
    fields = document["components"]["schemas"]["Input_stabilityai_stable_diffusion_xl_base_1_0"]["properties"]
    assert not set(fields) & set(altering.FIELDS) and "width" in fields
    [sdxl, *_] = client_with(app, KEY).get("/v1/models").json["data"]
    assert sdxl["image_to_image"] == []


@on_sqlite
def test_the_vendors_door_takes_no_image(api: Caller) -> None:
    call = {"model": DEFAULT_MODEL, "data": {"prompt": "a cat", "image": b64(PNG)}}
    assert api.post("/api/v1", json=call).status_code == 400  # as the vendor says it


@on_sqlite
def test_the_processes_that_judge_are_started_by_the_first_image_and_end_with_the_service(settings: Settings) -> None:
    services = open_services(settings)
    try:
        api = client_with(build(services), KEY)
        altered(api)
        assert not services.inspector._running
        altered(api, image=b64(PNG))
        [child] = services.inspector._running
        assert child.alive
    finally:
        services.close()
    assert child.process.poll() is not None


def test_a_worker_claims_it_like_every_other(api: Caller, worker: Worker) -> None:
    job = altered(api, image=b64(PNG))
    claim = worker.claim(backend="diffusers")
    assert claim.job_id == job["id"] and claim.input == job["input"]
    worker.succeed(claim)
    assert api.get(job["urls"]["self"]).json["status"] == Status.succeeded
