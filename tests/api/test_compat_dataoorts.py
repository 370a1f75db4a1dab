"""POST /api/v1: the vendor's own door."""

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask_openapi3.openapi import OpenAPI
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from werkzeug.test import EnvironBuilder

from api.app import WAITING_PLACES, build
from api.compat import dataoorts, delivery
from api.services import Services
from shared import jobs as life
from shared.catalogue import MODELS
from shared.database import now
from shared.errors import JobErrorCode
from shared.tables import idempotency_keys, jobs
from tests.api.people import KEY, PICTURE, Caller, Worker, client_with, on_sqlite
from tests.api.stores import stores_are_waited_for  # noqa: F401  a fixture for all tests here
from tests.service import eventually

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = "black-forest-labs/flux-1-schnell"
LCM = "lykon/dreamshaper-8-lcm"

Deed = Callable[[life.Claim], None]


class Hands:
    """A worker that does its deed to each job as it comes, from a thread of its own."""

    def __init__(self, services: Services, worker: Worker) -> None:
        self._services, self._worker = services, worker
        self.deed: Deed = self.paint
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def paint(self, claim: life.Claim) -> None:
        """Each job gets another picture."""
        self._worker.succeed(claim, PICTURE + claim.job_id.encode())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.01):
            with self._services.database.read() as connection:
                waits = connection.scalar(select(jobs.c.id).where(jobs.c.status == "queued").limit(1))
            if waits:
                self.deed(self._worker.claim())


@pytest.fixture
def hands(services: Services, worker: Worker) -> Iterator[Hands]:
    """Idle until `start()`."""
    hands = Hands(services, worker)
    yield hands
    hands.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door waits for nothing."""
    monkeypatch.setattr(dataoorts, "LONGEST_WAIT", 0.0)


def call(client: Caller, model: str = SDXL, headers: Any = None, environ: Any = None, **data: Any) -> Any:
    body = {"model": model, "data": {"prompt": "futuristic spacecraft"} | data}
    return client.post("/api/v1", json=body, headers=headers, environ_overrides=environ or {}, buffered=True)


def picture_of(response: Any) -> bytes:
    """The picture that `Hands` painted for the job of this answer."""
    return PICTURE + str(response.headers["X-Job-Id"]).encode()


def count(services: Services) -> int:
    with services.database.read() as connection:
        return connection.scalar(select(func.count()).select_from(jobs)) or 0


def stored_input(services: Services, response: Any) -> Any:
    with services.database.read() as connection:
        return connection.scalar(select(jobs.c.input).where(jobs.c.id == response.headers["X-Job-Id"]))


def check_error(response: Any, status: int, code: int, said: str = "") -> None:
    assert (response.status_code, response.content_type) == (status, "application/json"), response.text
    body = response.json
    assert (body["success"], body["result"], body["messages"]) == (False, {}, [])
    assert [error["code"] for error in body["errors"]] == [code], body
    assert said in body["errors"][0]["message"], body
    assert response.headers["X-Request-Id"]


# The answer


def test_the_picture_comes_back_as_bytes_of_its_true_type(api: Caller, hands: Hands, worker: Worker) -> None:
    hands.deed = lambda claim: worker.succeed(claim, b"\xff\xd8\xff a JPEG", "image/jpeg")
    hands.start()
    response = call(api)
    assert (response.status_code, response.content_type) == (200, "image/jpeg")
    assert response.data == b"\xff\xd8\xff a JPEG" and response.headers["Content-Length"] == str(len(response.data))
    job = api.get(f"/v1/jobs/{response.headers['X-Job-Id']}").json
    assert job["status"] == "succeeded" and job["input"]["prompt"] == "futuristic spacecraft"
    assert response.headers["X-Request-Id"] and response.headers["Cache-Control"] == "no-store"


@on_sqlite
def test_flux_answers_json_with_base64(api: Caller, hands: Hands) -> None:
    hands.start()
    response = call(api, FLUX, steps=2, seed="12345")
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert response.json["success"] is True and response.json["errors"] == response.json["messages"] == []
    assert base64.b64decode(response.json["result"]["image_base64"]) == picture_of(response)


@on_sqlite
@pytest.mark.usefixtures("impatient")
def test_the_vendors_names_become_ours(api: Caller, services: Services) -> None:
    assert stored_input(services, call(api, FLUX, steps=2, seed="12345")) == {
        "prompt": "futuristic spacecraft",
        "num_steps": 2,
        "seed": 12345,
    }
    given: dict[str, Any] = {
        "negative_prompt": "blurry",
        "width": 256,
        "height": 264,
        "num_steps": 3,
        "guidance": 5.5,
        "seed": 7,
    }
    assert stored_input(services, call(api, **given)) == given | {"prompt": "futuristic spacecraft"}


@on_sqlite
@pytest.mark.usefixtures("impatient")
def test_a_seed_that_is_not_given_is_drawn(api: Caller, services: Services) -> None:
    assert type(stored_input(services, call(api))["seed"]) is int
    assert "seed" not in stored_input(services, call(api, LCM))


def test_every_model_that_is_answered_in_json_is_in_the_catalogue() -> None:
    assert set(MODELS) > dataoorts.ANSWERED_IN_JSON


# Refusals


def test_a_key_is_asked_for(stranger: Caller, services: Services) -> None:
    for authorization in (None, "Bearer dk_unknown_key_of_nobody"):
        response = call(stranger, headers={"Authorization": authorization} if authorization else {})
        check_error(response, 401, 10000)
        assert response.headers["WWW-Authenticate"].startswith("Bearer") and "X-Job-Id" not in response.headers
    assert count(services) == 0


@on_sqlite
@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ("{", 400, 5006, "not JSON"),
        (b"\xff{}", 400, 5006, "not UTF-8"),
        ("[]", 400, 5006, "'/'"),
        ("{}", 400, 5007, "No such model"),
        ({"model": "unknown", "data": {"prompt": "a cat"}}, 400, 5007, "No such model"),
        ({"model": SDXL}, 400, 5006, "'/data'"),
        ({"model": SDXL, "data": {}}, 400, 5006, "'/data/prompt'"),
        ({"model": SDXL, "data": {"prompt": "a"}}, 400, 5006, "'/data/prompt'"),
        ({"model": SDXL, "data": {"prompt": "  "}}, 400, 5006, "'/data/prompt'"),
        ({"model": SDXL, "data": {"prompt": "a cat", "num_steps": 21}}, 400, 5006, "'/data/num_steps'"),
        ({"model": SDXL, "data": {"prompt": "a cat", "steps": 4}}, 400, 5006, "'/data/steps': There is no such field."),
        ({"model": FLUX, "data": {"prompt": "a cat", "num_steps": 4}}, 400, 5006, "'/data/num_steps'"),
        ({"model": SDXL, "data": {"prompt": "a cat", "image_b64": ""}}, 400, 5006, "'/data/image_b64'"),
        ({"model": LCM, "data": {"prompt": "a cat", "seed": 1}}, 400, 5006, "'/data/seed'"),
        ({"model": SDXL, "data": {"prompt": "a cat", "seed": "twelve"}}, 400, 5006, "'/data/seed'"),
        ({"model": SDXL, "data": {"prompt": "a cat", "seed": "-1"}}, 400, 5006, "'/data/seed'"),
        ({"model": SDXL, "data": {"prompt": "a cat", "seed": "4294967296"}}, 400, 5006, "'/data/seed'"),
        ({"model": SDXL, "data": {"prompt": "a cat", "seed": True}}, 400, 5006, "'/data/seed'"),
        ({"model": SDXL, "data": {"prompt": "a cat"}, "stream": False}, 400, 5006, "'/stream'"),
        (b'{"model": "' + b"x" * 1_000_000 + b'"}', 413, 3006, "1,000,000"),
    ],
)
def test_bad_input_is_refused_in_the_vendors_words(
    api: Caller, services: Services, body: Any, status: int, code: int, said: str
) -> None:
    data = json.dumps(body) if isinstance(body, dict) else body
    check_error(api.post("/api/v1", data=data, content_type="application/json"), status, code, said)
    assert count(services) == 0


@on_sqlite
def test_each_of_several_mistakes_is_named(api: Caller) -> None:
    errors = call(api, width=1, height="x").json["errors"]
    assert [error["code"] for error in errors] == [5006, 5006]
    assert "'/data/width'" in errors[0]["message"] and "'/data/height'" in errors[1]["message"]


@on_sqlite
def test_another_method_type_or_query_is_refused_in_the_vendors_words(api: Caller) -> None:
    response = api.get("/api/v1")
    check_error(response, 405, 7001)
    assert response.headers["Allow"] == "POST"
    check_error(api.post("/api/v1", data="prompt=a+cat", content_type="text/plain"), 415, 5006)
    check_error(api.post("/api/v1?dry_run=1", json={"model": SDXL, "data": {"prompt": "a cat"}}), 400, 5006, "dry_run")
    check_error(call(api, headers={"Idempotency-Key": "a b"}), 400, 5006, "Idempotency-Key")


@on_sqlite
def test_the_rest_of_the_api_keeps_its_own_errors(api: Caller) -> None:
    for path in ("/v1/nothing", "/api/v1/", "/api/v2"):
        assert api.get(path).content_type == "application/problem+json"


@on_sqlite
def test_while_the_database_is_away_it_says_so(
    api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(api, seed=-1).status_code == 400  # the key is known from now on

    def away() -> Any:
        raise OperationalError("", {}, Exception())

    monkeypatch.setattr(services.database, "write", away)
    response = call(api)
    check_error(response, 503, 503)
    assert response.headers["Retry-After"] == "5" and "X-Job-Id" not in response.headers


# How a job ends


def test_each_code_of_a_jobs_error_has_its_answer() -> None:
    assert set(dataoorts.ENDS) == set(JobErrorCode)


@on_sqlite
@pytest.mark.parametrize("error", list(JobErrorCode))
def test_a_failed_job_is_an_error_with_the_right_status(
    api: Caller, hands: Hands, worker: Worker, error: JobErrorCode
) -> None:
    hands.deed = lambda claim: worker.fail(claim, error)
    hands.start()
    response = call(api)
    status, code = {
        "rejected": (400, 5006),
        "content_filtered": (400, 3030),
        "out_of_memory": (400, 5006),
        "bad_output": (502, 502),
        "backend_unavailable": (502, 502),
        "gave_up": (504, 3007),
        "expired": (504, 3007),
    }.get(error.value, (500, 500))
    check_error(response, status, code, "The vendor refused it.")
    assert api.get(f"/v1/jobs/{response.headers['X-Job-Id']}").json["error"]["code"] == error.value


def test_a_canceled_job_ends_its_wait_with_409(api: Caller, hands: Hands) -> None:
    hands.deed = lambda claim: api.post(f"/v1/jobs/{claim.job_id}/cancel")
    hands.start()
    response = call(api)
    check_error(response, 409, 3008, "canceled")
    assert response.headers["X-Job-Id"].startswith("job_")


@on_sqlite
def test_a_removed_picture_is_gone(api: Caller, hands: Hands) -> None:
    hands.start()
    keyed = {"Idempotency-Key": "k1"}
    first = call(api, headers=keyed)
    assert api.delete(f"/v1/jobs/{first.headers['X-Job-Id']}").status_code == 204
    check_error(call(api, headers=keyed), 410, 410)


# Waiting


def test_what_takes_too_long_goes_on_and_is_joined_by_the_same_request(
    api: Caller, hands: Hands, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dataoorts, "LONGEST_WAIT", 0.05)
        late = call(api)
        check_error(late, 504, 3007)
        assert late.headers["Retry-After"] == "1" and "Idempotent-Replayed" not in late.headers
    hands.start()
    again = call(api)
    assert again.status_code == 200 and again.data == picture_of(late)
    assert again.headers["Idempotent-Replayed"] == "true" and count(services) == 1


@on_sqlite
def test_without_a_place_nothing_is_bought(api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataoorts, "PLACES", 1)
    monkeypatch.setattr(dataoorts, "LONGEST_WAIT", 60.0)
    full = client_with(build(services), KEY)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, full)
        while not count(services):
            time.sleep(0.01)
        response = call(full, prompt="another picture")
        check_error(response, 429, 3040)
        assert response.headers["Retry-After"] == "5" and "X-Job-Id" not in response.headers
        assert count(services) == 1
        [job] = api.get("/v1/jobs").json["data"]
        api.post(job["urls"]["cancel"])
        assert first.result(50).status_code == 409
    monkeypatch.setattr(dataoorts, "LONGEST_WAIT", 0.0)
    assert call(full, prompt="another picture").status_code == 504 and count(services) == 2  # its place is free again


@on_sqlite
def test_while_everybody_else_waits_nothing_is_bought(api: Caller, services: Services) -> None:
    """Else a job was made for somebody whom nobody can wait for, and who asks for it again."""
    leave = [services.waiting.reserve() for _ in range(WAITING_PLACES)]
    check_error(call(api), 429, 3040)
    assert count(services) == 0
    last = leave.pop()
    assert last is not None
    last()
    services.waiting.close()  # as at SIGTERM
    check_error(call(api), 429, 3040)
    assert count(services) == 0


@on_sqlite
def test_when_the_process_stops_the_wait_ends_and_the_job_goes_on(api: Caller, services: Services) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, api)
        eventually("the wait has begun", lambda: bool(services.waiting._places), 60)
        services.waiting.close()
        check_error(first.result(50), 503, 3008)
        assert first.result().headers["X-Job-Id"] and first.result().headers["Retry-After"]


@on_sqlite
@pytest.mark.parametrize("seed", [None, 7])
def test_an_answer_that_is_being_written_keeps_its_place(
    api: Caller, services: Services, hands: Hands, seed: int | None
) -> None:
    hands.start()
    body = {"model": SDXL, "data": {"prompt": "a cat", "seed": seed}}
    response = api.post("/api/v1", json=body)
    free = services.waiting._free
    assert response.status_code == 200 and free._value == WAITING_PLACES - 1
    response.close()
    assert free._value == WAITING_PLACES
    assert api.post("/api/v1", json=body | {"x": 1}).status_code == 400  # refused before
    assert call(api, FLUX, headers={"Idempotency-Key": "a b"}).status_code == 400  # and after it was taken
    assert free._value == WAITING_PLACES


@on_sqlite
def test_who_has_hung_up_waits_no_more_and_the_job_goes_on(api: Caller, hands: Hands, services: Services) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor() as pool:
        first = pool.submit(call, api, environ={"gunicorn.socket": ours})
        looked = services.waiting._seen  # by the look-out: the job was read before, and the wait goes on
        eventually("the wait has begun", lambda: bool(looked), 60)
        theirs.close()
        assert first.result(50).status_code == 503  # which nobody reads
    hands.start()
    again = call(api)
    assert again.status_code == 200 and again.data == picture_of(first.result()) and count(services) == 1


# A repeat, or a wish for another picture


def test_the_same_request_after_its_answer_wants_another_picture(api: Caller, hands: Hands, services: Services) -> None:
    hands.start()
    answers = [call(api) for _ in range(3)]
    assert len({answer.data for answer in answers}) == 3 and count(services) == 3
    assert not any("Idempotent-Replayed" in answer.headers for answer in answers)


def test_the_same_request_with_a_seed_gets_the_same_picture(api: Caller, hands: Hands, services: Services) -> None:
    hands.start()
    first, again, other = call(api, seed=7), call(api, seed="7", width=512), call(api, seed=8)
    assert first.data == again.data != other.data and count(services) == 2
    assert again.headers["X-Job-Id"] == first.headers["X-Job-Id"]
    assert again.headers["Idempotent-Replayed"] == "true"


@pytest.mark.usefixtures("impatient")
def test_fifty_of_the_same_at_once_make_one_job(api: Caller, services: Services) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: call(api), range(50)))
    assert {answer.status_code for answer in answers} == {504}
    assert len({answer.headers["X-Job-Id"] for answer in answers}) == count(services) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1


def test_fifty_of_the_same_after_a_failure_make_one_new_job(
    api: Caller, services: Services, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataoorts, "LONGEST_WAIT", 0.0)
    first = call(api)
    worker.fail(worker.claim())
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: call(api), range(50)))
    assert {answer.status_code for answer in answers} == {504} and count(services) == 2
    assert first.headers["X-Job-Id"] not in {answer.headers["X-Job-Id"] for answer in answers}


@pytest.mark.usefixtures("impatient")
def test_a_picture_that_reached_nobody_is_given_once_to_who_asks_for_the_same(
    api: Caller, worker: Worker, hands: Hands, services: Services
) -> None:
    late = call(api)
    hands.paint(worker.claim())
    assert call(api).data == picture_of(late) and count(services) == 1
    assert call(api).status_code == 504 and count(services) == 2


@on_sqlite
@pytest.mark.usefixtures("impatient")
def test_a_picture_that_reached_nobody_is_not_offered_for_ever(
    api: Caller, worker: Worker, hands: Hands, services: Services
) -> None:
    late, seeded = call(api), call(api, seed=7)
    for _ in range(2):
        hands.paint(worker.claim())
    with services.database.write() as tx:
        tx.execute(update(jobs).values(completed_at=now(-3601)))
    assert call(api).headers["X-Job-Id"] != late.headers["X-Job-Id"]
    assert call(api, seed=7).data == picture_of(seeded)


def serve(app: OpenAPI, connection: socket.socket | None = None) -> Any:
    """The body of an answer, as the server gets it, before any of it is sent."""
    builder = EnvironBuilder(
        path="/api/v1",
        method="POST",
        json={"model": SDXL, "data": {"prompt": "futuristic spacecraft"}},
        environ_overrides={"HTTP_AUTHORIZATION": f"Bearer {KEY}", "gunicorn.socket": connection},
    )
    return app.wsgi_app(builder.get_environ(), lambda *args: lambda data: None)


@pytest.fixture
def made(api: Caller, worker: Worker, hands: Hands, impatient: None) -> bytes:
    """The picture of a job whose client could not wait for it."""
    late = call(api)
    hands.paint(worker.claim())
    return picture_of(late)


def test_an_answer_whose_end_could_not_be_sent_is_given_to_the_next(
    made: bytes, app: OpenAPI, api: Caller, services: Services
) -> None:
    broken = serve(app)
    chunks = iter(broken)
    assert next(chunks) == made[:-1] and next(chunks) == made[-1:]
    with services.database.read() as connection:
        assert connection.execute(select(idempotency_keys)).all() == []  # taken out before the last byte is sent
    broken.close()  # as a server does whose `send` failed
    assert call(api).data == made and call(api).status_code == 504 and count(services) == 2


@on_sqlite
def test_an_answer_that_its_client_hung_up_on_is_given_to_the_next(
    made: bytes, app: OpenAPI, api: Caller, services: Services
) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        unread = serve(app, ours)
        with pytest.raises(BrokenPipeError):
            list(unread)
        unread.close()
    assert call(api).data == made and count(services) == 1


@on_sqlite
def test_an_answer_that_its_client_does_not_read_is_given_to_the_next(
    made: bytes, app: OpenAPI, api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As urllib3's Retry, which is asleep with its connection open."""
    monkeypatch.setattr(delivery, "PATIENCE", 0.1)
    monkeypatch.setattr(delivery, "UNDER_WAY", 100)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        unread = serve(app, ours)
        chunks = iter(unread)
        ours.sendall(next(chunks))
        with pytest.raises(BrokenPipeError):
            next(chunks)
        unread.close()
    assert call(api).data == made and count(services) == 1


@on_sqlite
def test_an_answer_that_its_client_reads_slowly_counts_as_delivered(
    made: bytes, app: OpenAPI, api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "UNDER_WAY", 0)
    ours, theirs = socket.socketpair()

    def read_slowly() -> bytes:
        time.sleep(0.2)
        return theirs.recv(len(made), socket.MSG_WAITALL)

    with ours, theirs, ThreadPoolExecutor() as pool:
        reading = pool.submit(read_slowly)
        read = serve(app, ours)
        for chunk in read:
            ours.sendall(chunk)
        read.close()
        assert reading.result(60) == made
    assert call(api).status_code == 504 and count(services) == 2


@pytest.mark.parametrize("has_seed", [False, True])
def test_after_a_failure_cancel_or_removal_the_same_request_begins_anew(
    api: Caller, worker: Worker, services: Services, monkeypatch: pytest.MonkeyPatch, hands: Hands, has_seed: bool
) -> None:
    monkeypatch.setattr(dataoorts, "LONGEST_WAIT", 0.0)
    data: dict[str, Any] = {"seed": 7} if has_seed else {}

    def paint_and_remove(claim: life.Claim) -> None:
        hands.paint(claim)
        assert api.delete(f"/v1/jobs/{claim.job_id}").status_code == 204

    ends: list[Deed] = [
        worker.fail,
        lambda claim: api.post(f"/v1/jobs/{claim.job_id}/cancel"),
        paint_and_remove,
    ]
    for made, end in enumerate(ends, start=1):
        assert call(api, **data).status_code == 504 and count(services) == made
        end(worker.claim())
    assert call(api, **data).status_code == 504 and count(services) == len(ends) + 1


@pytest.mark.usefixtures("impatient")
def test_another_projects_same_request_is_another_job(api: Caller, neighbour: Caller, services: Services) -> None:
    bodies: list[dict[str, Any]] = [{}, {"seed": 7}]
    for data in bodies:
        assert call(api, **data).headers["X-Job-Id"] != call(neighbour, **data).headers["X-Job-Id"]
    assert count(services) == 4


@pytest.mark.usefixtures("impatient")
def test_another_body_is_another_job(api: Caller, services: Services) -> None:
    bodies: list[dict[str, Any]] = [{}, {"prompt": "a cat"}, {"width": 256}, {"seed": 1}, {"seed": 2}, {"model": FLUX}]
    assert len({call(api, **body).headers["X-Job-Id"] for body in bodies}) == count(services) == len(bodies)


@pytest.mark.usefixtures("impatient")
def test_a_job_that_was_submitted_by_another_door_is_not_joined(api: Caller, services: Services) -> None:
    job = api.post("/v1/jobs", json={"input": {"prompt": "futuristic spacecraft"}}).json
    assert call(api).headers["X-Job-Id"] != job["id"]


def test_an_idempotency_key_alone_decides(api: Caller, hands: Hands, services: Services) -> None:
    hands.start()
    keys: list[dict[str, str]] = [{"Idempotency-Key": "k1"}, {"Idempotency-Key": "k2"}, {"Idempotency-Key": "k1"}, {}]
    answers = [call(api, headers=key) for key in keys]
    assert answers[0].data == answers[2].data and count(services) == 3
    assert answers[2].headers["Idempotent-Replayed"] == "true"
    check_error(
        call(api, headers={"Idempotency-Key": "k1"}, seed=8), 422, 5006, "Another request was sent with this key"
    )


# The document


@pytest.fixture
def document(stranger: Caller) -> dict[str, Any]:
    return dict(stranger.get("/openapi.json").json)


def matches(document: dict[str, Any], name: str, value: object) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return bool(Draft202012Validator(schema).is_valid(value))


@on_sqlite
@pytest.mark.usefixtures("impatient")
def test_the_document_describes_calls_and_answers(
    document: dict[str, Any], api: Caller, worker: Worker, hands: Hands
) -> None:
    operation = document["paths"]["/api/v1"]["post"]
    assert operation["security"] == [{"key": []}]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/VendorCall"}
    for seed in (7, "12345", None):
        assert matches(document, "VendorCall", {"model": FLUX, "data": {"prompt": "a cat", "steps": 8, "seed": seed}})
    for data in (
        {"prompt": "a cat", "steps": 9},
        {"prompt": "a cat", "num_steps": 2},
        {"prompt": "a cat", "seed": "x"},
    ):
        assert not matches(document, "VendorCall", {"model": FLUX, "data": data})
    assert not matches(document, "VendorCall", {"data": {"prompt": "a cat"}})

    assert set(operation["responses"]["200"]["content"]) == {"image/*", "application/json"}
    late = call(api, FLUX)
    hands.paint(worker.claim())
    assert matches(document, "VendorPicture", call(api, FLUX).json)
    for response in (late, call(api, FLUX, seed=-1), api.post("/api/v1", data="")):
        content = operation["responses"][str(response.status_code)]["content"]["application/json"]
        assert content["schema"] == {"$ref": "#/components/schemas/VendorProblem"}
        assert matches(document, "VendorProblem", response.json)
