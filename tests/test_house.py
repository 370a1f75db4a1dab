"""The rules of the house that a machine can hold."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("api", "worker", "shared", "sandbox", "local", "client", "bench", "migrations")


def modules(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_settings_reads_the_environment() -> None:
    readers = {
        place
        for place, tree in modules(*PRODUCT)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("os", "environ"), ("os", "getenv"), ("os", "environb")}
    }
    assert readers == {"shared/settings.py"}


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
    """Every `update(jobs…)` and `insert(jobs…)` stands in shared/moves.py, which shared/jobs.py alone uses."""
    writers = set()
    for place, tree in modules("api", "worker", "shared", "local", "migrations"):
        names = {"jobs", "table"} if any(name.startswith("shared.tables") for name in imports(tree)) else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"update", "insert"}:
                [target] = node.args[:1]
                if isinstance(target, ast.Name) and target.id in names:
                    writers.add(place)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "UPDATE jobs" in node.value:
                writers.add(place)
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
