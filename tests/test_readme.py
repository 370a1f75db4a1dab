"""What the README says, held against what is there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import settings
from tests.service import API_KEY, ROOT, Service, service

README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """The first cell of each row of the tables in a text, without its backticks."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def code(text: str, language: str) -> str:
    return text.split(f"```{language}\n")[1].split("```", maxsplit=1)[0]


def test_every_setting_stands_in_the_table_and_no_other() -> None:
    assert sorted(first_cells(section("Settings"))) == sorted(map(settings.variable, settings.Settings.model_fields))


def test_the_defaults_in_the_table_are_the_defaults() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", section("Settings"), re.MULTILINE))
    defaults = {settings.variable(name): field.default for name, field in settings.Settings.model_fields.items()}
    for name, said in rows.items():
        default = defaults[name]
        assert said == (",".join(default) if isinstance(default, tuple) else str(default)), name


def test_every_promise_names_what_shows_it() -> None:
    shown_by = re.findall(r"\| (`tests/[^|]*) \|$", section("What it promises"), re.MULTILINE)
    assert len(shown_by) >= 9
    for place in re.findall(r"`(tests/[^`]+)`", " ".join(shown_by)):
        assert (ROOT / place).exists(), place


def test_every_folder_is_on_the_map_and_every_file_that_is_named_exists() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] + "/" for line in tracked.splitlines() if "/" in line and line[0] != "."}
    if folders:  # in a checkout; elsewhere git says nothing
        assert set(first_cells(section("The house"))) == folders
    for place in re.findall(r"`((?:api|worker|shared|local|tests|docs|bench)/[\w/.]*)`", README):
        assert (ROOT / place).exists(), place
    for place in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / place).exists(), place


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("readme")
    database = folder / "darkroom.db"
    database.write_bytes(migrated_sqlite.read_bytes())
    with service(folder, f"sqlite:///{database}") as running:
        running.start()
        yield running


@pytest.mark.slow
def test_the_curl_lines_work(running: Service) -> None:
    lines = code(section("Submit"), "sh").replace("http://127.0.0.1:8000", running.url)
    environ = {"KEY": API_KEY, "PATH": os.defpath}
    done = subprocess.run(["sh", "-ec", lines], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and '"id":"job_' in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_python_lines_work(running: Service, tmp_path: Path) -> None:
    lines = code(section("Submit"), "python").replace("http://127.0.0.1:8000", running.url)
    environ = settings.child_environ({"KEY": API_KEY})
    subprocess.run([sys.executable, "-c", lines], env=environ, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "spacecraft.png").read_bytes().startswith(b"\x89PNG")
