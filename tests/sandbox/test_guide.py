"""docs/sandbox.md says what the sandbox does: its troubles, their limits, its routes, and what becomes of jobs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import requests

from sandbox.server import Sandbox
from sandbox.troubles import NAMES, NUMBERS, read_troubles, split_prompt
from shared.catalogue import DEFAULT_MODEL
from shared.inspector import Inspector
from worker.backends.base import Failure, Picture, Request
from worker.backends.dataoorts import Dataoorts
from worker.retry import Fail, decide

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "sandbox.md").read_text()


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first column is called so."""
    [rows] = re.findall(rf"^\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


TROUBLES = {name.strip("`"): values for name, values, _ in table("trouble")}
RECIPES = {what: re.findall(r"`(.*?)`", prompt)[0] for what, prompt in table("to see")}
OUTCOMES: dict[str, str] = {what: re.findall(r"`(.*?)`", what)[0] for what in RECIPES if "`" in what}


def test_every_trouble_is_listed_and_nothing_else() -> None:
    assert sorted(TROUBLES) == sorted(NAMES) and len(table("trouble")) == len(NAMES)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_limits_of_a_number_are_listed(name: str) -> None:
    _, lowest, highest = NUMBERS[name]
    assert TROUBLES[name].startswith(f"{lowest:.16g} to {highest:.16g}")


@pytest.mark.parametrize("name", [name for name, values in TROUBLES.items() if values.endswith("none")])
def test_what_needs_no_value_is_taken_without_one(name: str) -> None:
    assert split_prompt(f"a red fox [sandbox:{name}]")[1].keys() == {name}


@pytest.mark.parametrize("name", [name for name, values in TROUBLES.items() if not values.endswith("none")])
def test_what_needs_a_value_is_refused_without_one(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        split_prompt(f"a red fox [sandbox:{name}]")


def test_the_routes_are_those_that_there_are(sandbox: Sandbox) -> None:
    listed: dict[str, set[str]] = {}
    for (route,) in (re.findall(r"`(.*?)`", row[0]) for row in table("route")):
        method, path = route.split()
        listed.setdefault(path, set()).add(method)
    for path, methods in listed.items():
        refused = requests.request("PATCH", sandbox.box_url + path, timeout=60)
        assert refused.status_code == 405 and set(refused.headers["Allow"].split(", ")) == methods, path


def test_the_rule_that_is_shown_is_taken() -> None:
    [rule] = re.findall(r"-d '(.*)'", GUIDE)
    assert read_troubles(json.loads(rule)["troubles"]) and json.loads(rule).keys() == {"troubles", "calls", "match"}


@pytest.mark.slow
def test_a_job_with_a_prompt_of_the_guide_becomes_what_it_says(sandbox: Sandbox) -> None:
    with_everything: dict[str, Any] = {"width": 256, "height": 256, "seed": 1}
    backend = Dataoorts(sandbox.url, "sandbox", inspector=Inspector(1))
    try:
        for what, prompt in RECIPES.items():
            request = Request("job_1", DEFAULT_MODEL, {"prompt": f"a red fox {prompt}", **with_everything})
            if "delay" in prompt:
                continue
            [outcome] = backend.generate([request], lambda *_: None, lambda _: False)
            if isinstance(outcome, Picture):
                assert [warning.code for warning in outcome.warnings] == [OUTCOMES[what]]
                continue
            assert isinstance(outcome, Failure)
            last = decide(outcome.kind, 3 if "three times" in what else 0, 3, 0, None, 0.5)
            assert isinstance(last, Fail) and last.code == OUTCOMES[what], what
    finally:
        backend.close()
