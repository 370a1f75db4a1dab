"""`./dev bench backlog`, as small as it gets: every cell has a number."""

import re

import pytest

from bench.backlog import ROWS, main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_every_row_has_its_numbers(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--database", database]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == [title for _, title in ROWS]
    for title, *cells in lines[2:]:
        numbers = [cell for cell in cells if re.fullmatch(r"[\d,.]+", cell)]
        assert len(numbers) == 4, title  # two lengths, and twice with an old snapshot
