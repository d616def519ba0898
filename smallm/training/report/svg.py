"""Line charts as SVG inside a page: they take the page's colours, so they are right in the dark and on paper.

Each is as wide as a phone's screen and drawn larger where there is room. What the lines hold goes along as data, from
which `report.js` tells the values under a finger or the mouse.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smallm.html.escape import escape

WIDTH, HEIGHT = 440, 280  # in units of which a letter has about 12
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 10, 42  # room for the labels
MAX_POINTS = 240  # of a line; more are no wider than a pixel


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    x: np.ndarray
    """(n,) rising."""
    y: np.ndarray
    """(n,); where it is NaN the line has a gap."""
    colour: int = 0
    """Number of a colour of the page."""
    kind: str = "strong"
    """strong, with a mark on each of a few points; plain; thin; or faint, which tells no values."""


@dataclass(frozen=True)
class Axis:
    """What stands along one side."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, label: str, values: Sequence[np.ndarray], log: bool = False, zero: bool = False) -> "Axis":
        """An axis that all these values fit on; zero: it begins at 0."""
        known = np.concatenate([value[np.isfinite(value)] for value in values])
        known = known[known > 0] if log else known
        low, high = (float(known.min()), float(known.max())) if len(known) else (1.0, 10.0)
        if zero:
            low = 0.0
        return cls(label, low, high if high > low else low + (abs(low) or 1.0), log)

    def share(self, values: np.ndarray) -> np.ndarray:
        """Where on the axis values lie, from 0 to 1; NaN for what a logarithm has no place for."""
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.log(values / self.low) / math.log(self.high / self.low)
        return np.where(values > 0, found, np.nan)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on the axis, about as many."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for parts in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [p * 10.0**e for e in powers for p in parts if self.low <= p * 10.0**e <= self.high]
                if len(found) <= most:
                    break
            return found[:: len(found) // (most + 1) + 1]
        rough = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * part for part in (1, 2, 2.5, 5, 10) if unit * part >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def chart(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """A figure with its title, the picture and, below it, a place for the values that are pointed at."""
    marks = "".join(_line(x, y, line) for line in lines)
    told = [
        {"name": line.name, "colour": line.colour, "points": _places(x, y, line, told=True)}
        for line in lines
        if line.kind != "faint"
    ]
    data = {"x": x.label, "lines": told}
    w, h = WIDTH - LEFT - RIGHT + 8, HEIGHT - TOP - BOTTOM + 8  # what is beyond the axes is not drawn
    room = f'x="{LEFT - 4}" y="{TOP - 4}" width="{w}" height="{h}" viewBox="{LEFT - 4} {TOP - 4} {w} {h}"'
    frame = f"{_grid(x, y)}<svg {room}>{marks}</svg>{_labels(x, y)}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'tabindex="0" aria-label="{escape(title)}" data-chart="{escape(json.dumps(data))}">{frame}'
        f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        '<p class="values" aria-live="polite"></p></figure>'
    )


def key(items: Sequence[tuple[str, str]]) -> str:
    """What the lines mean: for each kind of line its name and its classes."""
    shown = "".join(f'<li><i class="swatch {kind}"></i>{escape(name)}</li>' for name, kind in items)
    return f'<ul class="key">{shown}</ul>'


def short(value: float) -> str:
    """A figure for an axis or a table: 0.02, 150, 2.5 M."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.4g}"


def thinned(shares: np.ndarray) -> np.ndarray:
    """Which points at these rising shares of the axis, (n,), to draw: MAX_POINTS evenly spread, and the last."""
    known = np.flatnonzero(np.isfinite(shares))
    _, first = np.unique((shares[known] * MAX_POINTS).astype(int), return_index=True)
    return np.union1d(known[first], known[-1:])


def _places(x: Axis, y: Axis, line: Line, told: bool = False) -> list[list[float]]:
    """Points in units of the picture; told: with the two values behind each."""
    chosen = thinned(x.share(line.x))
    xs, ys = line.x[chosen], line.y[chosen]
    across = LEFT + x.share(xs) * (WIDTH - LEFT - RIGHT)
    down = HEIGHT - BOTTOM - y.share(ys) * (HEIGHT - TOP - BOTTOM)
    known = np.isfinite(across) & np.isfinite(down)
    columns = [across.round(1), down.round(1), *([xs, ys] if told else [])]
    return [[float(f"{value:.6g}") for value in row] for row in zip(*(one[known] for one in columns), strict=True)]


def _line(x: Axis, y: Axis, line: Line) -> str:
    places = _places(x, y, line)
    points = " ".join(f"{a:g},{d:g}" for a, d in places)
    shown = places[:: len(places) // 20 + 1] + places[-1:] if line.kind == "strong" else []
    dots = "".join(f'<circle cx="{a:g}" cy="{d:g}" r="2.5"/>' for a, d in shown)
    return f'<g class="{line.kind} c{line.colour % 8}"><polyline points="{points}"/>{dots}</g>'


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for value in x.ticks(6):
        a = LEFT + float(x.share(np.float64(value))) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text class="x" x="{a:.1f}" y="{HEIGHT - BOTTOM + 16}">{short(value)}</text>')
        parts.append(f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for value in y.ticks(5):
        d = HEIGHT - BOTTOM - float(y.share(np.float64(value))) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{d + 4:.1f}">{short(value)}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{d:.1f}" y2="{d:.1f}"/>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _labels(x: Axis, y: Axis) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<g><text class="x" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 6}">{escape(x.label)}</text>'
        f'<text class="x" transform="translate(12 {middle:g}) rotate(-90)">{escape(y.label)}</text></g>'
    )
