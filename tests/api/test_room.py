"""Large bodies take room of the process, and who finds none is told so."""

import threading
import time
from typing import Any

import pytest

from api import room
from api.room import Room
from api.services import Services
from tests.api.altering import PNG, b64
from tests.api.people import Caller
from tests.service import eventually


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here."""
    return sqlite_url


@pytest.fixture
def backends() -> tuple[str, ...]:
    return ("diffusers",)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.1)


def large(api: Caller, size: int = 2_000_000, **more: Any) -> Any:
    return api.post("/v1/jobs", data=b" " * size, content_type="application/json", **more)


def taken(api: Caller) -> int:
    free: int = api.application.extensions["darkroom.room"]._free
    return room.MOST - free


def fill(api: Caller, but_for: int = 0) -> None:
    """Others take all the room of this process, but for so many bytes."""
    api.application.extensions["darkroom.room"]._free = but_for


def test_without_room_a_large_body_is_refused_and_what_is_small_is_not(api: Caller) -> None:
    fill(api, but_for=4 * 2_000_000 - 1)
    answer = large(api)
    assert (answer.status_code, answer.json["code"], answer.json["retryable"]) == (503, "no_room", True)
    assert int(answer.headers["Retry-After"]) >= 1
    assert large(api, 1_999_999).json["code"] == "malformed", "it was read"
    assert large(api, 1_000_000).json["code"] == "malformed", "what every route reads takes no room"
    assert api.post("/v1/jobs", json={"input": {"prompt": "a cat"}}).status_code == 202


def test_of_what_comes_in_chunks_the_most_is_thought_once_it_is_more_than_every_route_reads(api: Caller) -> None:
    chunks = {"headers": {"Transfer-Encoding": "chunked"}, "environ_overrides": {"wsgi.input_terminated": True}}
    fill(api, but_for=4 * 23_999_999)
    assert large(api, 1_000_001, **chunks).json["code"] == "no_room"
    assert large(api, 1_000_000, **chunks).json["code"] == "malformed", "it was read"
    assert api.post("/v1/endpoints", data=b" ", content_type="application/json", **chunks).json["code"] == "malformed"
    fill(api, but_for=4 * 24_000_000)
    assert large(api, 1_000_001, **chunks).json["code"] == "malformed"


def test_what_is_too_large_or_without_a_key_is_refused_before_room_is_asked_for(api: Caller, stranger: Caller) -> None:
    fill(api)
    assert large(api, 24_000_001).json["code"] == "too_large"
    assert large(stranger).json["code"] == "unauthenticated"


def test_whatever_becomes_of_it_the_room_is_given_back(api: Caller) -> None:
    asked = {"input": {"prompt": "a cat", "image": b64(PNG)}}
    spaces = " " * 1_000_001
    for body, status in ((spaces, 400), (f'{{"a": 1}}{spaces}', 422), (f"{{{spaces}}}", 422)):
        assert api.post("/v1/jobs", data=body, content_type="application/json").status_code == status
        assert taken(api) == 0
    for json, status in ((asked | {"metadata": {"k": "v" * 1_000_000}}, 422), (asked, 202)):
        assert api.post("/v1/jobs", json=json).status_code == status
        assert taken(api) == 0


def test_it_is_given_back_before_the_wait_for_the_job_begins(
    api: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    until = services.waiting.until

    def noted(*args: Any, **rest: Any) -> Any:
        found.append(taken(api))
        return until(*args, **rest)

    monkeypatch.setattr(services.waiting, "until", noted)
    body = b'{"input": {"prompt": "a cat"}}' + b" " * 1_000_000
    headers = {"Prefer": "wait=0", "Content-Type": "application/json"}
    assert api.post("/v1/jobs", data=body, headers=headers).status_code == 202
    assert found == [0]


def test_who_waits_for_room_gets_it_as_soon_as_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 60.0)
    shared = Room()
    first = shared.take(room.MOST // room.TIMES)
    assert first == room.MOST
    got: list[int | None] = []
    waiting = threading.Thread(target=lambda: got.append(shared.take(10)))
    waiting.start()
    eventually("it waits", lambda: shared._changed._waiters)  # type: ignore[attr-defined]
    shared.give_back(first)
    waiting.join(60)
    assert got == [40]


def test_with_many_at_once_no_more_is_taken_than_there_is_and_in_the_end_all_is_free() -> None:
    shared, most = Room(), 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal most
        for _ in range(20):
            if (amount := shared.take(room.MOST // room.TIMES // 3)) is not None:
                with lock:
                    most = max(most, room.MOST - shared._free)
                time.sleep(0)
                shared.give_back(amount)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most <= room.MOST and shared._free == room.MOST
