"""The control routes: rules and books over HTTP, and hundreds of calls at once."""

import threading

import pytest
import requests

from sandbox.server import Connection, Sandbox
from tests.sandbox.calling import KEY, SDXL, SMALL, call


def route(sandbox: Sandbox, path: str) -> str:
    return sandbox.url.removesuffix("/api/v1") + path


def test_rules_are_added_listed_and_cleared(sandbox: Sandbox) -> None:
    troubles = route(sandbox, "/sandbox/troubles")
    rule = {"troubles": {"status": 503, "hang": True}, "calls": 2, "match": "boat"}
    assert requests.put(troubles, json=rule, timeout=60).status_code == 200
    assert requests.get(troubles, timeout=60).json() == {"rules": [rule]}
    assert requests.delete(troubles, timeout=60).status_code == 200
    assert requests.get(troubles, timeout=60).json() == {"rules": []}


def test_a_rule_put_by_http_is_obeyed(sandbox: Sandbox) -> None:
    rule = {"troubles": {"status": 503}, "calls": 1}
    requests.put(route(sandbox, "/sandbox/troubles"), json=rule, timeout=60).raise_for_status()
    assert [call(sandbox).status_code for _ in range(2)] == [503, 200]


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"troubles": {"explode": 1}}, "explode"),
        ({"troubles": {"delay": "x"}}, "delay"),
        ({"troubles": {"delay": 1}, "calls": 0}, "calls"),
        ({"troubles": {"delay": 1}, "match": 5}, "match"),
        ({"troubles": {"delay": 1}, "when": "now"}, "when"),
        ({"delay": 1}, "troubles"),
    ],
)
def test_a_bad_rule_is_refused_and_named(sandbox: Sandbox, rule: dict[str, object], named: str) -> None:
    answer = requests.put(route(sandbox, "/sandbox/troubles"), json=rule, timeout=60)
    assert (answer.status_code, named in answer.json()["error"]) == (400, True)
    assert requests.get(route(sandbox, "/sandbox/troubles"), timeout=60).json() == {"rules": []}


def test_the_books_count_calls_and_pictures(sandbox: Sandbox) -> None:
    call(sandbox, prompt="a lake")
    call(sandbox, prompt="a lake")
    call(sandbox, prompt="a boat [sandbox:status=500]")
    call(sandbox, prompt="a boat [sandbox:truncate_clean=0.5]")
    call(sandbox, width=1)
    books = requests.get(route(sandbox, "/sandbox/calls"), timeout=60).json()
    assert books == {
        "calls": 5,
        "in_flight": 0,
        "most_in_flight": 1,
        "pictures": 2,
        "by_prompt": {"a lake": 2, "a boat [sandbox:status=500]": 1, "a boat [sandbox:truncate_clean=0.5]": 1},
    }


def test_a_picture_that_breaks_off_is_not_counted(sandbox: Sandbox) -> None:
    for trouble in ("truncate=0.9", "reset=body", "reset=before"):
        with pytest.raises(requests.exceptions.RequestException):
            call(sandbox, prompt=f"a lake [sandbox:{trouble}]")
    books = sandbox.wait_until(lambda calls: calls["in_flight"] == 0, 60)
    assert (books["calls"], books["pictures"]) == (3, 0)


def test_the_books_can_be_reset(sandbox: Sandbox) -> None:
    call(sandbox)
    requests.delete(route(sandbox, "/sandbox/calls"), timeout=60).raise_for_status()
    assert sandbox.calls() == {"calls": 0, "in_flight": 0, "most_in_flight": 0, "pictures": 0, "by_prompt": {}}


def test_a_client_that_has_its_answer_finds_itself_counted(sandbox: Sandbox) -> None:
    with requests.Session() as session:
        for number in range(1, 51):
            session.post(sandbox.url, json={"model": SDXL, "data": SMALL}, headers=KEY, timeout=60)
            books = sandbox.calls()
            assert (books["in_flight"], books["pictures"]) == (0, number)


@pytest.mark.slow
def test_two_hundred_calls_are_in_flight_at_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    call(sandbox)  # painted before, so that only the waiting takes time
    sandbox.reset_calls()
    all_are_here = threading.Event()
    monkeypatch.setattr(Connection, "_wait", lambda connection, troubles: all_are_here.wait(60))
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(call(sandbox).status_code), daemon=True) for _ in range(200)
    ]
    for thread in threads:
        thread.start()
    sandbox.wait_until(lambda calls: calls["in_flight"] == 200, 60)
    all_are_here.set()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 200
    books = sandbox.calls()
    assert (books["calls"], books["pictures"], books["in_flight"]) == (200, 200, 0)
    assert books["most_in_flight"] == 200


def test_healthz_answers(sandbox: Sandbox) -> None:
    assert requests.get(route(sandbox, "/healthz"), timeout=60).json() == {"status": "ok"}


def test_other_methods_on_control_routes_are_refused(sandbox: Sandbox) -> None:
    answer = requests.post(route(sandbox, "/sandbox/calls"), timeout=60)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, DELETE")


def test_a_large_hostile_image_can_be_put_as_a_rule(sandbox: Sandbox) -> None:
    """More than curl or a proxy would send without asking first (Expect: 100-continue)."""
    image = b"A" * 4_000_000
    rule = {"troubles": {"image": image.decode()}}
    headers = {"Expect": "100-continue"}
    requests.put(route(sandbox, "/sandbox/troubles"), json=rule, headers=headers, timeout=60).raise_for_status()
    assert len(call(sandbox).content) == 3_000_000
