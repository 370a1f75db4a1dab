"""Secrets and prompts that are told from everything else go through every path of the real service; then they are
looked for where they must not be: in any process's log, in any error's answer, and the secrets in the database.
"""

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from sqlalchemy import select

from shared.tables import delivery_tries
from tests.receiver import Receiver, says
from tests.service import Service, eventually, service
from tests.shared.pictures import chunk, png

pytestmark = pytest.mark.slow

#: In each secret and each prompt, and nowhere else: not even in the name of a folder.
CANARY = "k4n4ry"
API_KEY = f"dk_{CANARY}-api-key-{'a' * 32}"
VENDOR_KEY = f"{CANARY}-vendor-key"
SECRET_KEY = f"{CANARY}-secret-key-{'s' * 32}"
#: A picture that is found by a text in it, and by its base64: one of three places falls together with base64's steps.
IMAGE = base64.b64encode(
    png(
        chunk(b"tEXt", b"a\0" + CANARY.encode() + b"x".join([base64.b64decode(f"AA{CANARY}")] * 3)),
        width=256,
        height=256,
    )
).decode()
assert CANARY in IMAGE
PROMPT = f'{CANARY} "sings" in a café, <b>loud</b>\n'


@pytest.fixture
def running(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    environ = {
        "DARKROOM_API_KEY": API_KEY,
        "DARKROOM_SECRET_KEY": SECRET_KEY,
        "DATAOORTS_API_KEY": VENDOR_KEY,
        "DARKROOM_LOG_FORMAT": "json",
        "DARKROOM_MAX_ATTEMPTS": "1",
        "DARKROOM_MAX_CRASHES": "100",  # one job breaks off again and again: it is to be open however late one looks
        "DARKROOM_BACKENDS": "dataoorts,diffusers",
        "PYTHONPATH": "",
    }
    with service(tmp_path, sqlite_url, **environ) as running:
        del running._lines["worker-gpu"]  # it needs torch; here images are only taken
        for name in ("worker-dataoorts", "worker-webhooks"):
            running._lines[name] = running._lines[name].replace("worker.app", "tests.faulty_worker")
        running.http.headers["Authorization"] = f"Bearer {API_KEY}"
        running.start()
        yield running


class Paths:
    """Every way through the service. Keeps what problems said, and the secrets that the service made."""

    def __init__(self, running: Service, receiver: Receiver) -> None:
        self.running = running
        self.receiver = receiver
        self.problems: list[str] = []
        self.made: list[str] = []

    def ask(self, method: str, path: str, status: int, **given: Any) -> requests.Response:
        answer = self.running.http.request(method, self.running.url + path, timeout=60, **given)
        assert answer.status_code == status, answer.text
        if answer.headers["Content-Type"] == "application/problem+json":
            self.problems.append(answer.text + str(answer.headers))
        return answer

    def submit(self, marks: str = "", **more: Any) -> str:
        body = {"input": {"prompt": PROMPT + marks, "width": 256, "height": 256, "negative_prompt": PROMPT}, **more}
        return str(self.ask("POST", "/v1/jobs", 202, json=body).json()["id"])

    def ended(self, job_id: str, status: str) -> dict[str, Any]:
        ends = ("succeeded", "failed", "canceled", "expired")
        eventually(f"{job_id} ends", lambda: self.running.job(job_id)["status"] in ends)
        job = self.running.job(job_id)
        assert job["status"] == status, job
        return job

    def submissions(self) -> None:
        key = {"Idempotency-Key": f"{CANARY}-once"}
        body = {"input": {"prompt": PROMPT, "width": 256, "height": 256}}
        first = self.ask("POST", "/v1/jobs", 202, json=body, headers=key)
        self.ended(first.json()["id"], "succeeded")  # before it is sent again: the status of the answer is its status
        again = self.ask("POST", "/v1/jobs?", 200, json=body, headers=key | {"Prefer": "wait=0"})
        assert again.json()["id"] == first.json()["id"]
        self.ask("POST", "/v1/jobs", 422, json={"input": {"prompt": "another"}}, headers=key)

    def bad_input(self) -> None:
        self.ask("POST", "/v1/jobs", 422, json={"input": {"prompt": PROMPT, "width": CANARY}, "x": PROMPT})
        self.ask("POST", "/v1/jobs", 400, data=f'{{"input": {{"prompt": "{CANARY}', headers=JSON)
        self.ask("POST", "/v1/jobs", 415, data=PROMPT.encode())
        self.ask("GET", f"/v1/jobs/{CANARY}", 404)
        self.ask("GET", f"/{CANARY}?prompt={CANARY}", 404)

    def images(self) -> None:
        """The image of a job stands in the database alone; what is wrong with one is told without it."""
        for image in (IMAGE, f"data:image/png;base64,{IMAGE}"):
            body = {"input": {"prompt": PROMPT, "image": image, "mask": IMAGE}}
            job = self.ask("POST", "/v1/jobs", 202, json=body).json()
            assert CANARY not in json.dumps(job["input"]["image"])
            self.ask("POST", f"/v1/jobs/{job['id']}/cancel", 200)
            self.ask("POST", f"/v1/jobs/{job['id']}/retry", 202)
        for wrong in (CANARY, IMAGE[:-20], f"http://{CANARY}.example/", f"data:{CANARY}", f"job_{CANARY}"):
            self.ask("POST", "/v1/jobs", 422, json={"input": {"prompt": PROMPT, "image": wrong}})

    def strangers(self) -> None:
        for header in (f"Bearer dk_{CANARY}-guessed-key", f"Basic {CANARY}", ""):
            stranger = {"Authorization": header}
            self.ask("POST", "/v1/jobs", 401, json={"input": {"prompt": PROMPT}}, headers=stranger)
            answer = requests.post(f"{self.running.url}/api/v1", json={"prompt": PROMPT}, headers=stranger, timeout=60)
            assert answer.status_code == 401 and CANARY not in answer.text

    def what_gunicorn_cannot_read(self) -> None:
        for line in (f"GET /v1/jobs?signature={CANARY}\x01 HTTP/1.1", f"{CANARY}", f"GET / HTTP/1.1\r\n {CANARY}: x"):
            with socket.create_connection(("127.0.0.1", self.running.port), timeout=30) as connection:
                connection.sendall(f"{line}\r\nAuthorization: Bearer {API_KEY}\x00\r\n\r\n".encode())
                assert CANARY not in connection.recv(65536).decode()

    def links(self) -> None:
        job = self.submit()
        self.ended(job, "succeeded")
        url = self.ask("POST", f"/v1/jobs/{job}/image/link", 200, json={}).json()["url"]
        parts = urlsplit(url)
        self.made.append(parse_qs(parts.query)["signature"][0])
        path = f"{parts.path}?{parts.query}"
        self.ask("GET", path, 200)
        self.ask("GET", path.replace("expires=", "expires=1"), 403)

    def the_vendors_door(self) -> None:
        data = {"prompt": PROMPT, "width": 256, "height": 256}
        body = {"model": "stabilityai/stable-diffusion-xl-base-1.0", "data": data}
        assert self.running.http.post(f"{self.running.url}/api/v1", json=body, timeout=60).status_code == 200
        refused = self.running.http.post(f"{self.running.url}/api/v1", json=body | {"x": PROMPT}, timeout=60)
        assert refused.status_code == 400

    def troubles(self) -> None:
        """The vendor repeats what it was sent; a fault of ours, in the backend and after it."""
        words = f"the key {VENDOR_KEY} may not draw {PROMPT.strip()}"
        self.running.sandbox.trouble(match="echo", status=500, message=words)
        self.running.sandbox.trouble(match="beyond", status=400, message=words)
        echo, backend, beyond = (self.submit(mark) for mark in (" echo", " [fault:backend]", " [fault:beyond]"))
        # Alone it would wait, as in an outage: that it is this job's own failure shows when others succeed.
        while self.running.job(echo)["status"] in ("queued", "running"):
            self.ended(self.submit(), "succeeded")
        for job in (echo, backend):
            answer = json.dumps(self.ended(job, "failed")["error"])
            assert CANARY not in answer, answer
        eventually("the worker tells of the fault", lambda: "broke off" in self.running.log("worker-dataoorts"))
        eventually("a ticket breaks off", lambda: "for a ticket broke off" in self.running.log("worker-dataoorts"))
        assert self.running.job(beyond)["status"] in ("queued", "running")

    def deliveries(self) -> None:
        self.made.append(self.ask("GET", "/v1/webhook-secret", 200).json()["secret"])
        self.receiver.behaviours["/hook"] = says(500, b"no")
        for path in ("/hook", "/fault"):
            self.submit(webhook=f"{self.receiver.url}{path}?token=x")

        def tries() -> int:
            with self.running.database.read() as connection:
                ends = connection.scalars(select(delivery_tries.c.outcome))
                return sum(outcome != "running" for outcome in ends)

        eventually("two deliveries fail", lambda: tries() >= 2)

    def the_vendor_is_down(self) -> None:
        self.running.sandbox.stop()
        before = self.running.outcomes()["failed"]
        self.submit()
        eventually("an attempt is refused", lambda: self.running.outcomes()["failed"] > before)


JSON = {"Content-Type": "application/json"}


def without_celerys_farewell(log: str) -> list[dict[str, Any]]:
    """The lines, each read as JSON; but for the one that Celery's signal handler writes past all logging."""
    return [json.loads(line) for line in log.splitlines() if line not in ("", "worker: Warm shutdown (MainProcess)")]


def test_no_secret_and_no_prompt_gets_where_it_must_not_be(running: Service) -> None:
    receiver = Receiver()
    try:
        paths = Paths(running, receiver)
        for path in (
            paths.submissions,
            paths.bad_input,
            paths.images,
            paths.strangers,
            paths.what_gunicorn_cannot_read,
            paths.links,
            paths.the_vendors_door,
            paths.troubles,
            paths.deliveries,
            paths.the_vendor_is_down,
        ):
            path()
        names = list(running.processes)
        for name in names:
            running.terminate(name)
    finally:
        receiver.close()
    secrets = [CANARY, *paths.made]
    logs = {name: running.log(name) for name in names}
    said = set()
    for name, log in logs.items():
        assert log, name
        for line in log.splitlines():
            assert not [secret for secret in secrets if secret.lower() in line.lower()], line
        for told in without_celerys_farewell(log):
            # Each line, whoever wrote it. A Celery worker has its name once it knows what it does.
            assert told["process"] == name or (told["process"] == "worker" and "SecurityWarning" in told["message"])
            said.add(told["message"])
    assert {"POST /v1/jobs 202", "POST /api/v1 200", "the attempt ended", "the try ended"} <= said
    for problem in paths.problems:
        assert CANARY not in problem, problem
    assert len(paths.problems) > 5
    running.database.close()
    for file in running.folder.glob("darkroom.db*"):
        stored = file.read_bytes()
        for secret in (API_KEY, VENDOR_KEY, SECRET_KEY, *paths.made):
            assert secret.encode() not in stored, f"{secret} in {file.name}"
    assert CANARY.encode() in (running.folder / "darkroom.db").read_bytes()  # prompts are there: the search does find


def test_the_passwords_of_stores_that_are_away_stand_in_no_log(running: Service) -> None:
    """Every process says that it can't reach them, for a while, and never by which password."""
    for name in list(running.processes):
        running.terminate(name)
    marks = {name: len(running.log(name)) for name in running._lines}
    running._settings["DARKROOM_DATABASE_URL"] = f"postgresql://darkroom:{CANARY}-database@127.0.0.1:1/darkroom"
    running._settings["DARKROOM_REDIS_URL"] = f"redis://:{CANARY}-redis@127.0.0.1:1/0"
    running._is_ready = lambda: True  # type: ignore[method-assign]  # it never is
    running.start()

    def asked() -> bool:
        try:
            return running.http.get(f"{running.url}/v1/jobs", timeout=30).status_code == 503
        except requests.RequestException:
            return False

    eventually("the API says that the database is away", asked)
    expected = ("api", "worker-dataoorts", "worker-sweep")
    for name in expected:
        eventually(f"{name} tells of it", lambda name=name: "the database" in running.log(name)[marks[name] :])  # type: ignore[misc]
    for name in running._lines:
        assert CANARY not in running.log(name), name
