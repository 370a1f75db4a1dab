"""The statistics and the table."""

import math

import pytest

from bench.figures import Row, cell, number, percentile, table, times_better

UP = Row("speed", "speed", "1/s", "up")
DOWN = Row("wait", "wait", "ms", "down")


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (50, 99, 100)
    assert percentile([7.0], 99) == 7
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (8, "8"), (0, "0")],
)
def test_number_has_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown
    assert number(math.nan) == "-"


def test_cell_shows_the_median_and_the_range() -> None:
    assert cell([3, 1, 200]) == "3 (1 - 200)"
    assert cell([5]) == "5"
    assert cell([]) == "-"


def test_ahead_means_above_one_whichever_way_is_better() -> None:
    assert times_better(UP, [200], [100]) == "2.00x"
    assert times_better(DOWN, [200], [100]) == "0.50x"
    assert times_better(UP, [], [100]) == times_better(DOWN, [0], [100]) == "-"


def test_table_shows_every_row_and_a_dash_for_what_is_missing() -> None:
    lines = table([UP, DOWN], ("Ours", "Theirs"), {("Ours", "speed"): [2.5], ("Theirs", "speed"): [1, 2]}).splitlines()
    assert lines[0].split() == ["unit", "better", "Ours", "Theirs", "ahead"]
    assert lines[2].split() == ["speed", "1/s", "up", "2.50", "1.50", "(1", "-", "2)", "1.67x"]
    assert lines[3].split() == ["wait", "ms", "down", "-", "-", "-"]
    assert len({line.index("up") if "up" in line else line.index("down") for line in lines[2:]}) == 1
