"""GET /v1/provenance."""

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sqlalchemy import insert, text, update

from api.provenance import MADE
from api.services import Services
from shared.database import Database
from shared.tables import Billed, Outcome, attempts, jobs
from tests.api.people import PICTURE, Caller, Submit, Worker, on_sqlite
from tests.lives import many, plan
from worker.backends import provenance
from worker.backends.base import Request

SHA256 = hashlib.sha256(PICTURE).hexdigest()
UNKNOWN = {"made": False, "data": [], "has_more": False}


def asked(api: Caller, sha256: str = SHA256) -> dict[str, Any]:
    response = api.get("/v1/provenance", query_string={"sha256": sha256})
    assert response.status_code == 200, response.text
    return dict(response.json)


def png_that_says(keyword: str, said: str) -> bytes:
    texts = PngInfo()
    texts.add_text(keyword, said)
    with io.BytesIO() as file:
        Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=texts)
        return file.getvalue()


def test_a_picture_that_was_made_here_is_known_with_all_that_it_was_made_with(
    api: Caller, submit: Submit, worker: Worker
) -> None:
    job = submit(input={"prompt": "a cat", "seed": 7})
    worker.succeed(worker.claim())
    ended = api.get(job["urls"]["self"]).json
    assert hashlib.sha256(api.get(job["urls"]["image"]).data).hexdigest() == SHA256
    assert asked(api) == {
        "sha256": SHA256,
        "made": True,
        "data": [
            {
                "job_id": job["id"],
                "created_at": ended["created_at"],
                "completed_at": ended["completed_at"],
                "model": job["model"],
                "revision": None,
                "backend": "dataoorts",
                "input": job["input"],
                "image": {"content_type": "image/png", "width": 640, "height": 480, "bytes": len(PICTURE)},
                "data_removed": False,
                "url": job["urls"]["self"],
            }
        ],
        "has_more": False,
    }


@on_sqlite
def test_the_hash_may_be_written_in_capitals(api: Caller, submit: Submit, worker: Worker) -> None:
    submit()
    worker.succeed(worker.claim())
    assert asked(api, SHA256.upper()) == asked(api) and asked(api)["made"] is True


def test_what_nobody_made_and_what_a_neighbour_made_are_answered_alike(
    api: Caller, neighbour: Caller, submit: Submit, worker: Worker
) -> None:
    submit()
    before = asked(neighbour)
    worker.succeed(worker.claim())
    assert asked(neighbour) == before == {"sha256": SHA256} | UNKNOWN
    assert asked(api, "0" * 64) == {"sha256": "0" * 64} | UNKNOWN


@on_sqlite
@pytest.mark.parametrize(
    "query",
    ["", "sha256=", f"sha256={SHA256[1:]}", f"sha256={SHA256}0", f"sha256=g{SHA256[1:]}", f"sha256={SHA256}%0a"],
)
def test_what_is_no_hash_is_refused(api: Caller, query: str) -> None:
    response = api.get(f"/v1/provenance?{query}")
    assert response.status_code == 422 and response.json["errors"][0]["parameter"] == "sha256"


@on_sqlite
def test_it_asks_for_a_key_and_takes_no_other_parameter(api: Caller, stranger: Caller) -> None:
    assert stranger.get(f"/v1/provenance?sha256={SHA256}").status_code == 401
    response = api.get(f"/v1/provenance?sha256={SHA256}&limit=5")
    assert response.status_code == 422 and response.json["errors"][0]["parameter"] == "limit"


def test_jobs_that_made_the_same_file_are_told_newest_first_and_at_most_a_hundred(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    first, second = submit(), submit()
    worker.succeed(worker.claim())
    worker.succeed(worker.claim())
    assert [made["job_id"] for made in asked(api)["data"]] == [second["id"], first["id"]]
    with services.database.read() as connection:
        row = connection.execute(jobs.select().where(jobs.c.id == first["id"])).one()._mapping
    older = [{**row, "id": f"job_{number:032x}", "image_attempt": None} for number in range(98)]
    with services.database.write() as tx:
        tx.execute(insert(jobs), older)
    assert len(asked(api)["data"]) == 100 and asked(api)["has_more"] is False
    with services.database.write() as tx:
        tx.execute(insert(jobs), [{**older[0], "id": f"job_{'f' * 32}"}])
    found = asked(api)
    assert len(found["data"]) == 100 and found["has_more"] is True
    assert [made["job_id"] for made in found["data"][:2]] == [f"job_{'f' * 32}", second["id"]]


def test_once_the_data_are_removed_it_is_known_that_it_was_made_and_not_from_what(
    api: Caller, submit: Submit, worker: Worker
) -> None:
    job = submit(input={"prompt": "a secret plan"})
    worker.succeed(worker.claim())
    [before] = asked(api)["data"]
    for _ in range(2):
        assert api.delete(job["urls"]["self"]).status_code == 204
        found = asked(api)
        assert found["made"] is True
        assert found["data"] == [before | {"input": {}, "image": None, "data_removed": True}]
    assert api.get(job["urls"]["self"]).json["image"] is None
    assert api.get(job["urls"]["image"]).status_code == 410


def test_the_backend_is_the_one_whose_picture_it_is(
    api: Caller, services: Services, submit: Submit, worker: Worker
) -> None:
    """A late picture of an earlier attempt, elsewhere, was paid for and dropped."""
    job = submit()
    lost = worker.claim()
    worker.requeue(lost)
    worker.close_attempt(lost, Outcome.succeeded, Billed.yes)
    with services.database.write() as tx:
        tx.execute(update(attempts).values(backend="diffusers"))
    worker.succeed(worker.claim())
    assert asked(api)["data"][0]["backend"] == "dataoorts"
    api.delete(job["urls"]["self"])
    assert asked(api)["data"][0]["backend"] is None, "nobody knows any more which of the two it was"


def test_the_models_revision_is_read_from_the_picture_itself(api: Caller, submit: Submit, worker: Worker) -> None:
    job = submit()
    claim = worker.claim()
    request = Request(job["id"], job["model"], job["input"])
    data = provenance.png(np.zeros((8, 8, 3), np.uint8), request, "diffusers", "0123abcd")
    worker.succeed(claim, data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert asked(api, sha256)["data"][0]["revision"] == "0123abcd"
    api.delete(job["urls"]["self"])
    assert asked(api, sha256)["data"][0]["revision"] is None


@on_sqlite
@pytest.mark.parametrize(
    "data",
    [
        png_that_says("darkroom", '{"job_id": "job_of_somebody_else", "revision": "evil"}'),
        png_that_says("darkroom", '["revision"]'),
        png_that_says("darkroom", "{" * 100_000),
        png_that_says("parameters", "a cat"),
        b"\xff\xd8\xff no PNG",
        PICTURE,
    ],
    ids=["another job's", "no object", "no JSON", "another text", "a JPEG", "no picture"],
)
def test_what_a_vendor_wrote_into_a_picture_is_not_believed(
    api: Caller, submit: Submit, worker: Worker, data: bytes
) -> None:
    submit()
    worker.succeed(worker.claim(), data)
    [made] = asked(api, hashlib.sha256(data).hexdigest())["data"]
    assert made["revision"] is None


def test_it_is_found_by_its_index_however_many_jobs_there_are(database: Database) -> None:
    many(database, 3000)
    with database.write() as tx:
        tx.execute(text("UPDATE jobs SET image_sha256 = substr(id, 5) || substr(id, 5)"))
        tx.execute(text("ANALYZE"))
    assert "ix_jobs_image_sha256" in plan(database, MADE.params(project="prj_a", sha256=SHA256))
