"""The rules of the house that a machine can hold."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("api", "worker", "shared", "sandbox", "local", "client", "bench", "migrations")


def modules(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    for room in rooms:
        yield from modules_of(room)


@cache
def modules_of(room: str) -> tuple[tuple[str, ast.Module], ...]:
    paths = sorted((ROOT / room).rglob("*.py"))
    return tuple((str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths)


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


class Names:
    """What the names of a module stand for: `rows` for `shared.tables.jobs`, however it was imported or called."""

    def __init__(self, tree: ast.Module) -> None:
        self._known: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._known[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self._known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and (meaning := self.meaning(node.value)):
                self._known |= {name.id: meaning for name in node.targets if isinstance(name, ast.Name)}

    def meaning(self, node: ast.AST) -> str:
        """The dotted name that an expression is; empty if it is something else."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id, "")
        if isinstance(node, ast.Attribute) and (of := self.meaning(node.value)):
            return f"{of}.{node.attr}"
        return ""


def reads_the_environment(tree: ast.Module) -> bool:
    names = Names(tree)
    everything = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.*"}
    imported = {name for name in imports(tree) if name.startswith("os.")}
    return bool(everything & (imported | {names.meaning(node) for node in ast.walk(tree)}))


_WRITES = re.compile(r"\b(UPDATE|INSERT\s+INTO)\s+\"?jobs\b", re.IGNORECASE)


def writes_jobs(tree: ast.Module) -> bool:
    """Whether it holds an UPDATE or INSERT of the table of jobs, as a statement of SQLAlchemy or as text."""
    names = Names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            means = names.meaning(node.func)
            if means in {"shared.tables.jobs.update", "shared.tables.jobs.insert"}:
                return True
            if means.startswith("sqlalchemy.") and means.rpartition(".")[2] in {"update", "insert"}:
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                if "shared.tables.jobs" in map(names.meaning, given):
                    return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _WRITES.search(node.value):
            return True
    return False


ENVIRONMENT = {
    "os.environ": "import os\nos.environ['A']",
    "os by another name": "import os as system\nsystem.getenv('A')",
    "from os": "from os import environ\nenviron.get('A')",
    "from os, by another name": "from os import getenv as ask\nask('A')",
    "all of os": "from os import *\ngetenv('A')",
    "bytes": "import os\nos.environb[b'A']",
    "within a function": "def f():\n    import os\n    return os.getenv('A')",
    "by a name of its own": "import os\nhere = os\nhere.environ['A']",
}

WRITES = {
    "update": "from sqlalchemy import update\nfrom shared.tables import jobs\nupdate(jobs)",
    "insert": "from sqlalchemy import insert\nfrom shared.tables import jobs\ninsert(jobs)",
    "the table's own": "from shared.tables import jobs\njobs.update()",
    "the module's": "import sqlalchemy as sa\nfrom shared.tables import jobs\nsa.update(jobs)",
    "another name": "from sqlalchemy import update\nfrom shared.tables import jobs as rows\nupdate(rows)",
    "both": "from sqlalchemy import update as change\nfrom shared.tables import jobs as rows\nchange(rows)",
    "the room's": "from sqlalchemy import update\nfrom shared import tables\nupdate(tables.jobs)",
    "the whole path": "import sqlalchemy\nimport shared.tables\nsqlalchemy.update(shared.tables.jobs)",
    "a database's": "from sqlalchemy.dialects.postgresql import insert\nfrom shared.tables import jobs\ninsert(jobs)",
    "by keyword": "from sqlalchemy import update\nfrom shared.tables import jobs\nupdate(table=jobs)",
    "assigned": "from sqlalchemy import update\nfrom shared.tables import jobs\nrows = jobs\nupdate(rows)",
    "text": "from sqlalchemy import text\ntext('update jobs set status = 1')",
    "text in parts": "rows = 1\nf'INSERT INTO jobs ({rows})'",
}


@pytest.mark.parametrize("text", ENVIRONMENT.values(), ids=ENVIRONMENT.keys())
def test_whoever_reads_the_environment_is_found(text: str) -> None:
    assert reads_the_environment(ast.parse(text))


@pytest.mark.parametrize("text", WRITES.values(), ids=WRITES.keys())
def test_whoever_writes_jobs_is_found(text: str) -> None:
    assert writes_jobs(ast.parse(text))


def test_who_does_neither_is_not_found() -> None:
    other = ast.parse("import os\nfrom sqlalchemy import update\nfrom shared.tables import events as jobs\n")
    other.body += ast.parse("update(jobs), os.getpid(), {}.update(jobs), 'update jobsite'").body
    assert not reads_the_environment(other) and not writes_jobs(other)


def test_only_settings_reads_the_environment() -> None:
    assert {place for place, tree in modules(*PRODUCT) if reads_the_environment(tree)} == {"shared/settings.py"}


def test_nobody_draws_from_the_dice_that_all_share() -> None:
    """Threads that did, for jitter, would come between those who rely on their state: Hypothesis fails a test then."""
    drawn = {
        f"{place}: random.{node.attr}"
        for place, tree in modules("api", "worker", "shared", "sandbox", "local")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random"
    }
    names = {name for _, tree in modules("api", "worker", "shared", "sandbox", "local") for name in imports(tree)}
    assert {each for each in drawn if not each.endswith(": random.Random")} == set()
    assert not any(name.startswith("random.") for name in names)


def test_only_jobs_writes_a_status() -> None:
    """Every UPDATE and INSERT of jobs stands in shared/moves.py, which shared/jobs.py alone uses."""
    writers = {place for place, tree in modules("api", "worker", "shared", "local", "migrations") if writes_jobs(tree)}
    assert writers == {"shared/moves.py"}
    users = {place for place, tree in modules(*PRODUCT) if "shared.moves" in imports(tree)}
    assert users == {"shared/jobs.py"}


def test_what_is_in_shared_is_used_on_both_sides() -> None:
    """The rule of two tenants: what only one side reaches lives with that side."""
    reached: dict[str, set[str]] = {"api": set(), "worker": set()}
    graph = {place: imports(tree) for place, tree in modules("shared")}

    def follow(names: set[str], found: set[str]) -> None:
        for place, imported in graph.items():
            module = place.removesuffix(".py").replace("/", ".")
            if module in names and place not in found:
                found.add(place)
                follow(imported, found)

    for side, found in reached.items():
        for _, tree in modules(side):
            follow(imports(tree), found)
    alone = {place for place in graph if place != "shared/__init__.py"} - (reached["api"] & reached["worker"])
    assert alone == set()


def test_the_doors_between_the_rooms_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_called_by_what_it_is_not() -> None:
    vague = {"utils", "helpers", "manager", "common", "misc"}
    assert {place for place, _ in modules(*PRODUCT) if Path(place).stem in vague} == set()
