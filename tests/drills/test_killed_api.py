"""Promise: a request that is repeated with its Idempotency-Key makes one job and one call, whenever the API dies."""

import random
import threading
from typing import Any

import pytest
import requests

from tests.drills.held import held
from tests.service import API_KEY, Service, eventually

pytestmark = pytest.mark.slow

#: Seconds before a client asks again. Sixty that ask in a tight loop leave an API that starts no processor.
PAUSE = 0.5

BODY = {"input": {"prompt": "a red fox", "width": 256, "height": 256, "seed": 7}}


class Client(threading.Thread):
    """Sends one request, with its key, again and again until it has an answer that says the job has ended."""

    def __init__(self, url: str, key: str, prefer: str) -> None:
        super().__init__(daemon=True)
        self.job_ids: set[str] = set()
        self.ended: dict[str, Any] | None = None
        self.was_cut_off = 0
        self.surprises: list[str] = []
        self._url = f"{url}/v1/jobs"
        self._headers = {"Authorization": f"Bearer {API_KEY}", "Idempotency-Key": key, "Prefer": prefer}
        self._pause = threading.Event()

    def run(self) -> None:
        while self.ended is None and not self.surprises:
            try:
                answer = requests.post(self._url, json=BODY, headers=self._headers, timeout=60)
            except requests.RequestException:
                self.was_cut_off += 1
                self._pause.wait(PAUSE)
                continue
            if answer.status_code == 503:
                self._pause.wait(PAUSE)
                continue
            if answer.status_code not in (200, 202):
                self.surprises.append(answer.text)
                return
            self.job_ids.add(answer.json()["id"])
            if answer.status_code == 200:
                self.ended = answer.json()


def test_fifty_clients_with_one_key_and_an_api_that_dies_before_it_answers_make_one_job(running: Service) -> None:
    """Each of them waits for the end of the job, so the kill falls between its commit and its answer."""
    running.start()
    clients = [Client(running.url, "one-key", "wait=60") for _ in range(50)]
    with held(running.sandbox):
        for client in clients:
            client.start()
        eventually("the job is at the vendor", lambda: running.sandbox.calls()["in_flight"] == 1)
        running.kill("api")
    running.start("api")
    for client in clients:
        client.join(180)
    assert [client.surprises for client in clients if client.surprises] == []
    assert [client.ended["status"] for client in clients if client.ended] == ["succeeded"] * 50
    assert len(set().union(*(client.job_ids for client in clients))) == 1
    assert any(client.was_cut_off for client in clients)
    assert running.count() == {"succeeded": 1} and running.outcomes() == {"succeeded": 1}
    assert running.sandbox.calls()["calls"] == 1


def test_an_api_that_is_killed_at_any_moment_makes_one_job_a_key(running: Service) -> None:
    running.start()
    chance = random.Random(1)
    clients = [Client(running.url, f"key-{number}", "wait=5") for number in range(20) for _ in "abc"]
    for client in clients:
        client.start()
    for _ in range(4):
        threading.Event().wait(chance.random() * 0.4)  # any moment: not a wait for anything
        running.kill("api")
        running.start("api")
    for client in clients:
        client.join(180)
    assert [client.surprises for client in clients if client.surprises] == []
    assert all(client.ended and client.ended["status"] == "succeeded" for client in clients)
    assert all(len(client.job_ids) == 1 for client in clients)
    assert running.count() == {"succeeded": 20} and running.outcomes() == {"succeeded": 20}
    assert running.sandbox.calls()["calls"] == 20
