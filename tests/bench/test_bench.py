"""The whole bench, as small as it gets: every row has a number. How large it is, nobody asks here."""

import re

import psutil
import pytest

from bench.__main__ import report
from bench.measurements import MEASUREMENTS, SMALLEST, rows

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

#: What the baseline does not offer.
OURS_ALONE = {"news_places", *(row.key for name in ("streams", "webhooks", "feed") for row in MEASUREMENTS[name].rows)}


def cells_of(output: str, title: str) -> list[str]:
    """Unit, better, ours, theirs, ahead; and theirs with as many slots as ours, ahead."""
    [line] = [line for line in output.splitlines() if line.startswith(f"{title}  ")]
    return re.split(r"  +", line.removeprefix(title).strip())


def test_the_table_has_a_number_in_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(psutil.Process().children())
    code = report(SMALLEST, list(MEASUREMENTS), "sqlite")
    output = capsys.readouterr()
    assert code == 0, output.err
    assert re.match(r"On \d+ cores .*Python 3.*SQLite 3", output.out)
    for row in rows(MEASUREMENTS, SMALLEST):
        if row.title.startswith("  the same, "):  # there are several; they come with the lines before them
            continue
        unit, better, ours, theirs, _, threaded, _ = cells_of(output.out, row.title)
        assert (unit, better) == (row.unit, row.better)
        assert (re.match(r"\d", theirs) and re.match(r"\d", threaded)) or row.key in OURS_ALONE, row
        assert re.match(r"\d", ours), row
    assert set(psutil.Process().children()) <= before  # nothing is left running


def test_darkroom_is_measured_on_postgresql_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(SMALLEST, ["polls"], "postgresql") == 0
    assert "PostgreSQL 18" in capsys.readouterr().out
