"""docker-compose.yml, Dockerfile and Procfile say the same; no engine is needed to see that."""

import re
import shlex
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from local import procfile
from shared import settings
from shared.present import GONE_SECONDS
from shared.settings import Settings
from tests.local.programs import ROOT
from worker import watchdog
from worker.backends.automatic1111 import Automatic1111
from worker.backends.base import Backend
from worker.backends.dataoorts import Dataoorts
from worker.backends.diffusers import Diffusers
from worker.leases import Leases

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
TEXT = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("darkroom:")}
COMMANDS = procfile.read(ROOT / "Procfile")
PROCESSES = {command.name: command.line for command in COMMANDS}
KNOWN = {settings.variable(field) for field in Settings.model_fields}
#: It ends at once.
WITHOUT_HEALTH_CHECK = {"migrate"}
WORKERS = [name for name in PROCESSES if name.startswith("worker-")]
#: A statement, with all its waiting for a lock.
DATABASE_SECONDS = 23


SECRETS = {"DARKROOM_SECRET_KEY": "0" * 32, "POSTGRES_PASSWORD": "0" * 32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here (a package of Debian)")
@pytest.mark.parametrize("missing", [None, *SECRETS])
def test_compose_itself_takes_the_file_with_its_secrets_and_not_without(tmp_path: Path, missing: str | None) -> None:
    """By its own schema. It needs no engine for that."""
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)  # away from a file .env, which it would read
    given = {name: value for name, value in SECRETS.items() if name != missing}
    done = subprocess.run(
        ["docker-compose", "config", "-q"],
        cwd=tmp_path,
        env={"PATH": str(Path(str(shutil.which("docker-compose"))).parent), **given},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode == 0) == (missing is None), done.stderr
    assert missing is None or "must be set" in done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_whom_a_service_waits_for_is_there_and_what_it_mounts_or_joins_is_declared(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("depends_on", {})) <= set(SERVICES)
    for other, how in service.get("depends_on", {}).items():
        assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    named = {volume.split(":")[0] for volume in service.get("volumes", []) if re.match(r"\w", volume)}
    assert named <= set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_of_the_procfile_is_a_service_with_the_same_command(name: str) -> None:
    assert SERVICES[name]["command"] == ["sh", "-c", "exec " + PROCESSES[name].replace("$", "$$")]


def test_every_service_of_our_image_is_a_process_or_a_module_that_exists() -> None:
    modules = {name: service["command"][:3] for name, service in OURS.items() if name not in PROCESSES}
    assert modules == {
        "migrate": ["python", "-m", "migrations"],
        "sandbox": ["python", "-m", "sandbox"],
    }


def test_the_images_own_command_is_the_api() -> None:
    [line] = re.findall(r'^CMD \["sh", "-c", "exec (.*)"\]$', DOCKERFILE, re.MULTILINE)
    assert line.replace('\\"', '"') == PROCESSES["api"]


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting(name: str) -> None:
    assert set(OURS[name].get("environment", {})) <= KNOWN


def test_every_setting_can_be_given() -> None:
    """All but the folders, whose places in the container are the image's to say."""
    assert set(SERVICES["api"]["environment"]) == KNOWN - {"DARKROOM_DATA_DIR", "DARKROOM_SPOOL"}


def test_every_variable_that_is_asked_for_is_a_setting_or_the_files_own() -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", TEXT))
    assert asked - KNOWN == {"POSTGRES_PASSWORD", "PUBLISH", "MODELS"}


def test_no_secret_has_a_default_and_what_is_needed_says_how_to_make_it() -> None:
    for name in ("DARKROOM_SECRET_KEY", "POSTGRES_PASSWORD"):
        ways = set(re.findall(rf"(?<!\$)\$\{{{name}(.*?)\}}", TEXT))
        assert len(ways) == 1 and re.fullmatch(r":\?must be set; `openssl rand -hex \d+` makes one", ways.pop())
    for name in ("DARKROOM_API_KEY", "DATAOORTS_API_KEY", "DARKROOM_AUTOMATIC1111_AUTH"):
        assert set(re.findall(rf"(?<!\$)\$\{{{name}(.*?)\}}", TEXT)) == {":-"}


def test_what_compose_passes_on_when_nothing_is_given_are_good_settings() -> None:
    passed = {
        name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", re.sub(r"\$\{\w+:\?.*?\}", "0123456789abcdef" * 2, value))
        for name, value in SERVICES["api"]["environment"].items()
    }
    loaded = settings.load(passed)
    assert loaded.database_url.startswith("postgresql+psycopg://darkroom:")
    assert loaded.dataoorts_api_key is None and loaded.sandbox is False


def test_the_line_for_the_sandbox_names_where_it_listens() -> None:
    command = SERVICES["sandbox"]["command"]
    port = command[command.index("--port") + 1]
    assert f"DATAOORTS_URL=http://sandbox:{port}/api/v1" in TEXT and "DARKROOM_SANDBOX=1" in TEXT
    assert SERVICES["sandbox"]["profiles"] == ["sandbox"]
    environ = {"DARKROOM_SECRET_KEY": "0" * 32, "DARKROOM_SANDBOX": "1", "DATAOORTS_API_KEY": "sandbox"}
    assert settings.load(environ | {"DATAOORTS_URL": f"http://sandbox:{port}/api/v1"}).sandbox is True


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service and "cap_add" not in service
    assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")
    if name not in OURS:
        assert service["user"] == name


@pytest.mark.parametrize(
    "image", [service["image"] for service in SERVICES.values()] + re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
)
def test_every_image_is_pinned_by_a_tag_that_says_its_version(image: str) -> None:
    assert re.search(r":\d[\w.-]*$", image)


def test_our_image_does_not_run_as_root_and_installs_what_is_locked() -> None:
    assert re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)[-1] != "0"
    assert "pip install --require-hashes $(printf -- '-r %s ' $LOCKS)" in DOCKERFILE
    assert "\nARG LOCKS=requirements.lock\n" in DOCKERFILE and "PYTHONUNBUFFERED=1" in DOCKERFILE
    assert DOCKERFILE.index("\nUSER ") > DOCKERFILE.index("\nCOPY . .")


def test_what_the_processes_need_is_in_the_image() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    locks = {"requirements.lock", *SERVICES["worker-gpu"]["build"]["args"]["LOCKS"].split()}
    assert kept >= {"api", "worker", "shared", "migrations", "sandbox", *locks}
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.parametrize("name", SERVICES)
def test_what_can_be_asked_for_its_health_is_asked(name: str) -> None:
    assert ("healthcheck" in SERVICES[name]) == (name not in WITHOUT_HEALTH_CHECK)


@pytest.mark.parametrize("name", ["api", "sandbox"])
def test_health_checks_in_python_compile_and_ask_the_right_port(name: str) -> None:
    kind, program, option, code = SERVICES[name]["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python", "-c")
    compile(code, name, "exec")
    assert f"'127.0.0.1', {8000 if name == 'api' else 9000}" in code and "'/healthz'" in code


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_asked_for_its_progress_often_enough_for_the_promise(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"] == ["CMD", "python", "-m", "worker.health"]
    seconds = {key: int(str(check[key]).removesuffix("s")) for key in ("interval", "timeout", "retries")}
    beat = Leases.LONGEST_BEAT_SECONDS
    stuck = max(watchdog.QUIET_SECONDS, watchdog.UNTOLD_SECONDS) + watchdog.TICK_SECONDS + beat
    assert max(stuck, GONE_SECONDS) + seconds["interval"] * seconds["retries"] < 60
    assert SERVICES[name]["restart"] == "unless-stopped"  # what ends is started again, and a stuck one ends itself


def test_redis_keeps_every_ticket_and_never_evicts() -> None:
    command = shlex.join(SERVICES["redis"]["command"])
    for flag in ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction"):
        assert flag in command


def test_stores_have_volumes_and_no_way_out() -> None:
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    for name in ("redis", "postgres"):
        assert SERVICES[name]["networks"] == ["inside"] and "ports" not in SERVICES[name]
        assert SERVICES[name]["volumes"][0].split(":")[0] in COMPOSE["volumes"]


def test_the_spool_is_a_volume_of_its_own_that_the_worker_may_write() -> None:
    [place] = re.findall(r"^\s*DARKROOM_SPOOL=(\S+)", DOCKERFILE, re.MULTILINE)
    volumes = dict(volume.split(":")[::-1] for volume in SERVICES["worker-dataoorts"]["volumes"])
    assert volumes[place] in COMPOSE["volumes"] and list(volumes.values()).count(volumes[place]) == 1
    drawing = {"worker-dataoorts", "worker-gpu", "worker-automatic1111"}
    assert {name for name, service in OURS.items() if place in str(service.get("volumes"))} == drawing
    # A new volume takes its owner from the image's folder; without one it is root's.
    [made] = re.findall(r"install -d -m 0700 -o 10001 -g 10001 (.*)$", DOCKERFILE, re.MULTILINE)
    assert place in made.split() and "\nUSER 10001:10001\n" in DOCKERFILE


def test_processes_start_when_the_database_is_migrated() -> None:
    for name in PROCESSES:
        assert SERVICES[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert SERVICES["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"


def backend_of(name: str) -> str | None:
    return procfile.backend_of(next(command for command in COMMANDS if command.name == name))


@pytest.mark.parametrize("name", [name for name in WORKERS if backend_of(name)])
def test_a_worker_that_stops_may_finish_its_longest_attempt(name: str) -> None:
    grace = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    backends: dict[str | None, Backend] = {
        "dataoorts": Dataoorts("http://127.0.0.1:9000/api/v1", "a-key"),
        "diffusers": Diffusers("a-model"),
        "automatic1111": Automatic1111("http://gpu-box:7860"),
    }
    with closing(backends[backend_of(name)]) as backend:
        assert grace == Settings(secret_key="s" * 32).grace_seconds(backend.name)
        assert grace > backend.attempt_seconds + DATABASE_SECONDS


@pytest.mark.parametrize("name", [name for name in WORKERS if not backend_of(name)])
def test_a_worker_that_draws_nothing_has_half_a_minute(name: str) -> None:
    assert SERVICES[name]["stop_grace_period"] == "30s"
