"""Figures and the table: medians with their range, both systems side by side."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One line of the table. `better`: which way is better."""

    key: str
    title: str
    unit: str
    better: Literal["up", "down"]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of the values do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * share / 100), 1) - 1] if ordered else math.nan


def number(value: float) -> str:
    """To three digits, never fewer than stand before the point: 1,234 · 12.3 · 0.123."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(digits, 3)}f}"


def cell(values: Sequence[float]) -> str:
    """The median and, of several values, the range; `-` if there is none."""
    if not values:
        return "-"
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} - {number(max(values))})"


def times_better(row: Row, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """By how much ours is better, from the medians: above 1 ahead, below 1 behind; `-` without both."""
    if not ours or not theirs:
        return "-"
    high, low = statistics.median(ours), statistics.median(theirs)
    if row.better == "down":
        high, low = low, high
    return f"{high / low:.2f}x" if low else "-"


def table(rows: Sequence[Row], names: Sequence[str], values: Mapping[tuple[str, str], Sequence[float]]) -> str:
    """The whole table, ours first; each of the others is followed by how far ours is ahead of it.

    `values` by (system's name, row's key); what is missing is shown as `-`.
    """
    ours, *others = names
    heads = [head for other in others for head in (other, "ahead")]
    lines: list[tuple[str, ...]] = [("", "unit", "better", ours, *heads)]
    for row in rows:
        mine = values.get((ours, row.key), ())
        cells = [cell(mine)]
        for other in others:
            theirs = values.get((other, row.key), ())
            cells += [cell(theirs), times_better(row, mine, theirs)]
        lines.append((row.title, row.unit, row.better, *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
