"""A line an event, with what it is about, and without what must not stand in it."""

import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from shared import logs
from shared.settings import Settings
from tests.lines import written
from tests.service import ROOT

log = logging.getLogger("worker.test")
CANARY = "a canary sings"


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    pattern, marks = logs._Hiding.pattern, logs._Hiding.marks
    logs.begin()  # tests of other files run in this thread, too
    yield
    logs._Hiding.pattern, logs._Hiding.marks = pattern, marks
    logs.begin()


def test_a_line_of_json_says_when_who_what_and_about_what() -> None:
    with written() as lines, logs.about(job_id="job_1", attempt=2):
        log.info("it %s", "began", extra={"backend": "dataoorts"})
    [line] = lines.as_json()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert isinstance(line.pop("pid"), int)
    assert line == {
        "level": "info",
        "process": "test",
        "logger": "worker.test",
        "message": "it began",
        "job_id": "job_1",
        "attempt": 2,
        "backend": "dataoorts",
    }


def test_a_line_of_text_says_the_same() -> None:
    with written("text") as lines, logs.about(job_id="job_1"):
        log.warning("it broke off", extra={"seconds": 0.5})
    assert re.fullmatch(
        r"\S+Z WARNING test worker\.test: it broke off job_id=job_1 seconds=0\.5\n", lines.getvalue()
    ), lines.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nobodys_line_break_begins_a_line_of_ours(log_format: str) -> None:
    with written(log_format) as lines:
        log.info("it said %s", "no\r\n2026-11-23 ERROR a lie")
    assert len(lines.getvalue().splitlines()) == 1


def test_what_a_line_is_about_ends_with_its_block_and_is_its_threads_own() -> None:
    def elsewhere() -> None:
        log.info("elsewhere")

    with written() as lines:
        with logs.about(job_id="job_1"), logs.about(attempt=1):
            log.info("within")
            other = threading.Thread(target=elsewhere)
            other.start()
            other.join()
        log.info("after")
    within, elsewhere_line, after = lines.as_json()
    assert (within["job_id"], within["attempt"]) == ("job_1", 1)
    assert "job_id" not in elsewhere_line and "job_id" not in after and "attempt" not in after


def test_a_request_begins_with_nothing_of_the_one_before() -> None:
    with written() as lines:
        logs.begin(request_id="one")
        logs.note(job_id="job_1")
        log.info("first")
        logs.begin(request_id="two")
        log.info("second")
    first, second = lines.as_json()
    assert (first["request_id"], first["job_id"]) == ("one", "job_1")
    assert second["request_id"] == "two" and "job_id" not in second


def test_what_a_library_hangs_on_its_lines_is_not_shown() -> None:
    with written() as lines:
        log.info("task received", extra={"data": {"args": CANARY}, "prompt": CANARY})
    assert CANARY not in lines.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_told_by_its_place_and_type_and_those_of_its_causes(log_format: str) -> None:
    def draw() -> None:
        try:
            raise KeyError(CANARY)
        except KeyError as error:
            raise ValueError(CANARY) from error

    with written(log_format) as lines:
        try:
            draw()
        except ValueError:
            log.exception("it broke off")
    said = lines.getvalue()
    assert "in draw" in said and "KeyError" in said and "ValueError" in said and "test_logs.py" in said
    assert CANARY not in said


def test_what_the_operating_system_says_is_told() -> None:
    with written() as lines:
        try:
            open("/nowhere/at/all")  # noqa: SIM115, PTH123
        except OSError:
            log.exception("it broke off")
    assert lines.as_json()[0]["exception"].endswith("[Errno 2] No such file or directory: '/nowhere/at/all'")


SECRETS = Settings(
    secret_key="the secret key of this one service",
    api_key="dk_" + "bootstrap" * 4,
    dataoorts_api_key='vendor"s\\key',
    database_url="postgresql://darkroom:pass-word@db/darkroom",
    redis_url="redis://:another-word@redis:6379/0",
).secrets


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_secret_of_the_settings_stands_in_no_line_whoever_writes_it(secret: str, log_format: str) -> None:
    logs.hide(SECRETS)
    with written(log_format) as lines:
        logging.getLogger("some.library").warning("connecting with %s and %r", secret, secret)
    assert secret not in lines.getvalue() and json.dumps(secret)[1:-1] not in lines.getvalue()
    assert "connecting with" in lines.getvalue() and (log_format == "text" or lines.as_json())


@pytest.mark.parametrize(
    ("said", "hidden"),
    [
        ("Authorization: Bearer some-body-elses", "some-body-elses"),
        ('{"key": "dk_neighbour12345"}', "dk_neighbour12345"),
        ("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "C2FVsBQIhrscChlQIMV"),
        ("GET /v1/jobs/x/image?expires=1&signature=abcDEF-_1&x=2", "abcDEF-_1"),
        ("postgresql+psycopg://darkroom:hunter2@db/darkroom", "hunter2"),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_looks_like_a_secret_stands_in_no_line(said: str, hidden: str, log_format: str) -> None:
    with written(log_format) as lines:
        log.info("%s", said)
    assert hidden not in lines.getvalue() and "[hidden]" in lines.getvalue()
    assert log_format == "text" or lines.as_json()


def test_a_word_that_serves_as_a_key_stays_a_word() -> None:
    logs.hide(["sandbox"])
    with written() as lines:
        log.info("the sandbox listens")
    assert lines.as_json()[0]["message"] == "the sandbox listens"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Invalid request from ip=10.0.0.1: Invalid HTTP header: 'X: canary'", "Invalid request from ip=10.0.0.1"),
        ("Error handling request GET /v1/jobs?canary=1", "Error handling request"),
    ],
)
def test_gunicorn_repeats_nothing_that_was_sent(line: str, shown: str) -> None:
    with written() as lines:
        logging.getLogger("gunicorn.error").warning(line)
    assert "canary" not in lines.getvalue() and lines.as_json()[0]["message"].startswith(shown)


PROGRAM = """
import threading, warnings, logging
from shared import logs
logs.configure("json", "first")
logs.rename("second")
logging.getLogger("worker.x").info("ours")
logging.getLogger("celery.x").info("theirs")
warnings.warn("old")
def die():
    raise ValueError("canary")
thread = threading.Thread(target=die, name="feed")
thread.start()
thread.join()
die()
"""


def test_what_nobody_caught_and_what_python_warns_of_go_the_same_way() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"].partition(":")[0] for line in lines] == [
        "ours",
        "<string>",
        "thread feed ends",
        "the process ends",
    ]
    assert {line["process"] for line in lines} == {"second"} and "canary" not in done.stderr
    assert all("ValueError" in line["exception"] for line in lines[2:])


def test_warnings_of_the_tests_stay_errors() -> None:
    with pytest.raises(UserWarning):
        warnings.warn("as pyproject.toml says", stacklevel=1)
