"""`./dev up`: the whole service as a newcomer starts it, and everything that may stand in its way."""

import json
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from local import up as command
from local import web
from tests.local.programs import PATIENCE, ROOT, Program, eventually, having, lives, living_with, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

HOUSE = "tests.local.small_house"
STUB = ROOT / "tests" / "local" / "stub_server.py"
NOTHING_GIVEN = dict.fromkeys(
    [
        *("DARKROOM_DATA_DIR", "DARKROOM_DATABASE_URL", "DARKROOM_REDIS_URL", "DARKROOM_API_KEY"),
        *("DARKROOM_SECRET_KEY", "DARKROOM_SANDBOX", "DATAOORTS_API_KEY", "DATAOORTS_URL", "DARKROOM_BACKENDS"),
        *("DARKROOM_AUTOMATIC1111_URL", "DARKROOM_AUTOMATIC1111_SANDBOX"),
    ],
    "",
)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A house whose API is a stub, and whose worker says what it was given."""
    names = "$DATAOORTS_URL $DATAOORTS_API_KEY $DARKROOM_SANDBOX $DARKROOM_REDIS_URL $DARKROOM_DATABASE_URL"
    (tmp_path / "Procfile").write_text(
        f"api: python {STUB} ${{PORT:-8000}}\n"
        f"worker: sh -c 'echo given: {names} and ${{DARKROOM_API_KEY}} end; sleep 1000'\n"
    )
    return tmp_path


def up(
    house: Path,
    *arguments: object,
    migrations: str = "true",
    port: int = 0,
    patience: float = PATIENCE,
    **environ: str,
) -> Program:
    arguments = ("--data", house / "data", "--port", port or web.free_port(), *arguments)
    return Program(HOUSE, "up", house, migrations, patience, *arguments, environ=NOTHING_GIVEN | environ)


def refuses(house: Path, *, migrations: str = "true", port: int = 0, patience: float = PATIENCE, **environ: str) -> str:
    """Everything that it says before it ends with exit code 1."""
    program = up(house, migrations=migrations, port=port, patience=patience, **environ)
    try:
        assert program.end() == 1
        assert not any("Traceback" in line for line in program.seen)
        return "\n".join(program.seen)
    finally:
        program.close()


def test_the_real_service_comes_up_and_its_curl_lines_work(tmp_path: Path) -> None:
    port = web.free_port()
    with running("local.up", "--data", "data", "--caller", tmp_path, "--port", port, environ=NOTHING_GIVEN) as program:
        program.until("SANDBOX: no DATAOORTS_API_KEY is set")
        key = program.until(r"^Key +(dk_[0-9a-f]{48})$")[1]
        submit, look, fetch = (program.until(r"^curl .*/v1/jobs.*$")[0] for _ in range(3))
        assert key in submit and key in look and key in fetch
        job = json.loads(subprocess.check_output(submit, shell=True))  # noqa: S602  (to paste is the point)
        look, fetch = look.replace("JOB_ID", job["id"]), fetch.replace("JOB_ID", job["id"])

        def has_ended() -> bool:
            job.update(json.loads(subprocess.check_output(look, shell=True)))  # noqa: S602
            return job["status"] not in ("queued", "running")

        eventually("the job has ended", has_ended)
        assert job["status"] == "succeeded" and job["sandbox"] is True
        subprocess.run(fetch, shell=True, cwd=tmp_path, check=True)  # noqa: S602
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        assert web.ask(port, "GET", "/docs", timeout=PATIENCE).status in (200, 301, 302, 308)

        family = program.family()
        program.signal(signal.SIGKILL)
        eventually("all its processes are dead", lambda: not any(map(lives, family)))
    assert len(family) >= 8  # redis, sandbox, gunicorn and its two, worker, sweep, guard


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_worker_that_was_stopped_is_killed_and_started_again(tmp_path: Path) -> None:
    """SIGSTOP: it is there, and can't see itself that it does nothing."""
    arguments = ("--data", tmp_path / "data", "--port", web.free_port())
    with running("local.up", *arguments, environ=NOTHING_GIVEN) as program:
        program.until("^Ready on")
        [worker] = having("generate.dataoorts", program.family())
        worker.suspend()
        began = time.monotonic()
        program.until(r"worker-dataoorts stands still: killing it \(dataoorts .*: not seen for \d+ s")
        seconds = time.monotonic() - began
        program.until(r"worker-dataoorts ended \(SIGKILL\); starting it again")
        sys.stdout.write(f"killed after {seconds:.0f} s\n")
        assert not lives(worker)


def test_keys_are_made_once_and_nobody_else_may_read_them(house: Path) -> None:
    keys = []
    for _ in range(2):
        program = up(house)
        keys.append(program.until(r"^Key +(\S+)$")[1])
        program.signal(signal.SIGTERM)
        assert program.end() == 0
        program.close()
    assert keys[0] == keys[1]
    assert stat.S_IMODE((house / "data").stat().st_mode) == 0o700
    for name in ("api_key", "secret_key"):
        assert stat.S_IMODE((house / "data" / name).stat().st_mode) == 0o600


@pytest.fixture
def service(house: Path) -> Iterator[Program]:
    program = up(house)
    program.until("^Ready on")
    yield program
    program.close()


def test_without_a_vendor_key_the_sandbox_is_its_vendor(service: Program, house: Path) -> None:
    redis = f"unix://{house}/data/redis/redis.sock?db=0"
    url, key, sandbox, redis_url = service.said("given: (.*)")[1].split()[:4]
    assert url.startswith("http://127.0.0.1:") and url.endswith("/api/v1")
    assert (key, sandbox) == ("sandbox", "1")
    assert redis_url == redis or redis_url.startswith("unix:///tmp/")


@pytest.mark.parametrize(
    ("given", "url", "says"),
    [
        ("", "http://127.0.0.1:", "SANDBOX: at http://127.0.0.1:"),
        ("http://box:7860", "http://box:7860", "drawn by the server at http://box:7860"),
    ],
    ids=["nowhere", "somewhere"],
)
def test_a_server_on_another_machine_is_used_where_it_is_and_else_the_sandbox(
    house: Path, given: str, url: str, says: str
) -> None:
    words = "$DARKROOM_AUTOMATIC1111_URL $DARKROOM_AUTOMATIC1111_SANDBOX. $DARKROOM_SANDBOX."
    procfile = (house / "Procfile").read_text().splitlines()[0]
    (house / "Procfile").write_text(f"{procfile}\nworker: sh -c 'echo given: {words} end; sleep 1000'\n")
    program = up(house, DARKROOM_BACKENDS="automatic1111", DARKROOM_AUTOMATIC1111_URL=given)
    program.until("^Ready on")
    line = program.said("given: (.*)")[1]
    assert line.startswith(url) and line.split()[1:3] == ["." if given else "1.", "."]
    assert any(says in line for line in program.seen) and not any("DATAOORTS" in line for line in program.seen)
    program.close()


def test_a_second_one_on_the_same_data_folder_refuses(service: Program, house: Path) -> None:
    said = refuses(house)
    assert f"another Darkroom (process {service.pid}) is using {house / 'data'}" in said and "--data" in said


def test_a_killed_one_gives_the_data_folder_free_when_its_processes_are_dead(service: Program, house: Path) -> None:
    family = service.family()
    service.signal(signal.SIGKILL)

    def comes_up() -> bool:
        program = up(house)
        try:
            program.until("^Ready on")
        except AssertionError:
            return False
        else:
            assert not any(map(lives, family))
            return True
        finally:
            program.close()

    eventually("the next one comes up", comes_up)


def test_redis_is_started_again_and_serves_on_the_same_socket(service: Program) -> None:
    [redis] = [process for process in service.family() if "valkey" in process.name() or "redis" in process.name()]
    redis.kill()
    service.until(r"redis ended \(SIGKILL\); starting it again in 0\.5 s")
    eventually(
        "a new Redis", lambda: any("valkey" in child.name() or "redis" in child.name() for child in service.family())
    )


def test_a_port_in_use_refuses_and_names_the_option(house: Path) -> None:
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        port = somebody.getsockname()[1]
        said = refuses(house, port=port)
    assert f"port {port} can't be used" in said and "--port" in said


def test_stores_that_are_given_are_used_and_no_redis_is_started(house: Path) -> None:
    program = up(
        house,
        DARKROOM_REDIS_URL="redis://127.0.0.1:1/0",
        DARKROOM_DATABASE_URL="postgresql://db/darkroom",
        DARKROOM_API_KEY="dk_" + "a" * 32,
        DATAOORTS_API_KEY="key",
    )
    try:
        program.until("cost money")
        program.until("^Ready on")
        line = program.said("given: (.*)")[1]
        names = {process.name() for process in program.family()}
    finally:
        program.close()
    assert "key redis://127.0.0.1:1/0 postgresql://db/darkroom and dk_aaaa" in " ".join(line.split())
    assert not any("valkey" in name or "redis" in name for name in names)
    assert not any("sandbox |" in line for line in program.seen)


def test_settings_that_are_wrong_refuse_with_a_line_each_and_no_traceback(house: Path) -> None:
    program = up(house, DARKROOM_LEASE_SECONDS="1", DARKROOM_SANDBOKS="1")
    try:
        assert program.end() == 2
    finally:
        program.close()
    assert program.seen[0] == "darkroom can't start:"
    assert {line.split(":")[0] for line in program.seen[1:]} == {"DARKROOM_SANDBOKS", "DARKROOM_LEASE_SECONDS"}


def test_a_migration_that_fails_ends_the_start_and_leaves_nothing(house: Path) -> None:
    said = refuses(house, migrations="sh -c 'echo no such table; exit 1'")
    assert "| no such table" in said and "the database could not be migrated" in said
    assert not living_with(str(house))


def test_an_api_that_never_answers_ends_the_start_and_is_named(house: Path) -> None:
    (house / "Procfile").write_text(f"api: sh -c 'sleep 1000; : {house}'\n")
    # Nothing but the API is waited for: a Redis or a sandbox that is slow to answer would be named in its place.
    said = refuses(house, patience=2, DARKROOM_REDIS_URL="redis://127.0.0.1:1/0", DATAOORTS_API_KEY="key")
    assert "after 2 s: the API does not answer at http://127.0.0.1:" in said
    assert not living_with(str(house))


def test_a_process_that_does_not_stay_alive_ends_the_start_and_is_named(house: Path) -> None:
    (house / "Procfile").write_text("api: sh -c 'echo broken; exit 7'\n")
    said = refuses(house)
    assert "| broken" in said and "api ended (exit code 7); starting it again" in said


def test_a_data_folder_with_a_long_name_gets_a_short_socket_elsewhere(house: Path) -> None:
    data = house / ("long" * 30)
    program = up(house, "--data", data)
    try:
        program.until("^Ready on")
        socket_path = Path(program.said(r"unix://(\S+)\?db=0")[1])
        assert len(str(socket_path)) <= 100 and socket_path.is_socket()
        assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700
        program.signal(signal.SIGKILL)
        eventually("the socket's folder is gone", lambda: not socket_path.parent.exists())
    finally:
        program.close()


@pytest.mark.parametrize("text", ["0", "-1", "65536", "99999", "http", "", "٣", "8000.0"])
def test_what_is_no_port_is_refused_in_a_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([f"--port={text}"])
    assert f"argument --port: {text} is not a port: a number from 1 to 65535" in capsys.readouterr().err
