"""Figures and names as they stand in a terminal: short, safe to print, and in columns."""

import unicodedata
from collections.abc import Sequence

NONE = "-"


def printable(text: str) -> str:
    """On one line, whatever strangers put into it: what would steer a terminal is spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shortened(text: str, most: int) -> str:
    """Cut in the middle to at most so many columns, so that beginning and ending can be told."""
    if columns_of(text) <= most:
        return text
    half = min(most, -(-len(text) // 2))
    head, tail = text[:half], text[max(half, len(text) - most) :]
    while (head or tail) and columns_of(f"{head}…{tail}") > most:
        if columns_of(head) > columns_of(tail):
            head = head[:-1]
        else:
            tail = tail[1:]
    return f"{head}…{tail}"


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Rows of cells as lines, columns two apart; those of the numbers in `left` begin at the left, others end right."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - columns_of(cell))
            cells.append(cell + space if i in left else space + cell)
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


def short_count(number: float | None) -> str:
    """12_345_678 -> 12.3M."""
    if number is None:
        return NONE
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.0f}"


def short_time(seconds: float | None) -> str:
    """8_000 -> 2.2 h."""
    if seconds is None:
        return NONE
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.{0 if seconds >= 9.95 * size or unit == 'min' else 1}f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
