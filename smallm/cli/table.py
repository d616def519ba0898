"""Figures and names for a terminal: short, and in aligned columns."""

import math
import unicodedata
from collections.abc import Sequence

MISSING = "-"
"""Printed where a value is unknown."""


def columns_of(text: str) -> int:
    """The number of terminal columns that a text occupies: 2 for a wide character, 0 for a combining one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shortened(text: str, max_columns: int) -> str:
    """The text cut in the middle to at most `max_columns` columns, so that beginning and end can be recognised."""
    if columns_of(text) <= max_columns:
        return text
    for kept in range(max_columns - 1, 0, -1):
        cut = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        if columns_of(cut) <= max_columns:
            return cut
    return "…"


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows of cells as lines with two spaces between columns.

    rows: the first may be a heading; all have the same number of cells.
    left: indices of the columns aligned to the left; the others, usually numbers, are aligned to the right.
    """
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]

    def padded(i: int, cell: str) -> str:
        space = " " * (widths[i] - columns_of(cell))
        return cell + space if i in left else space + cell

    return ["  ".join(padded(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]


def short_count(number: float | None) -> str:
    """12_345_678 -> 12.3M."""
    if number is None:
        return MISSING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds in the largest fitting unit with two digits: 42 s, 3.3 min, 2.2 h, 12 d; `MISSING` for None and NaN."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:,.{0 if seconds >= 9.95 * size else 1}f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
