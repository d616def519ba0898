"""Charts of runs, drawn by matplotlib: one picture of a file's size, and small charts inside a page.

On a page the charts are SVG whose colours are CSS variables, so that the charts follow a dark screen and paper. The
points of the lines go along as data, from which `report.js` shows the values under the pointer.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from smallm.errors import UserError
from smallm.html.escape import escape
from smallm.training.report.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072b2", "#d55e00", "#00805d", "#b3478c", "#7a5195", "#8c6d1f", "#3a8cc4", "#4d4d4d")
"""Colours of the runs, which people with few colour receptors tell apart; in report.css --c0 to --c7."""
GRID, EDGE, KEY = "#e6e6e6", "#ffffff", "#4c4c4c"
VARIABLES = {GRID: "var(--line)", EDGE: "var(--paper)"} | {hex: f"var(--c{i})" for i, hex in enumerate(COLOURS)}
WIDTH, HEIGHT = 440, 280  # of a chart on a page, in units of which a letter has about 12
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 42  # margins for the labels
MAX_POINTS = 240  # of a line on a page; more would lie closer than a pixel
RAW_FROM = 100  # points from which a training loss is smoothed over a faint line of its raw values
NATS = "nats per character"


def loss_figure(runs: Sequence[RunHistory]) -> "Figure":
    """The picture of some runs: loss by step above the learning rate, loss by epoch above a key with the best losses.

    Raises `UserError` if matplotlib is missing.
    """
    figure = _figure(figsize=(12, 7.5), dpi=100, layout="constrained")
    title = " · ".join(run.name for run in runs)
    figure.suptitle(title if len(title) < 90 else f"{len(runs)} runs", fontsize=14, weight="bold", parse_math=False)
    (by_step, by_epoch), (rate, key) = figure.subplots(2, 2, width_ratios=(4, 3), height_ratios=(2, 1))
    rate.sharex(by_step)
    by_epoch.sharey(by_step)
    for run, colours in zip(runs, _colours(runs), strict=True):
        _draw_losses(by_step, run, "step", colours)
        _draw_losses(by_epoch, run, "epoch", colours)
        rate.plot(run.train["step"], run.train["learning_rate"], "-o", color=colours[1], markersize=3, markevery=[-1])
    for axes, x in ((by_step, "step"), (by_epoch, "epoch")):
        _style(axes, x, f"loss ({NATS})")
    _style(rate, "step", "learning rate")
    by_step.set(ylim=loss_limits(runs))
    rate.set(ylim=(0, None))
    _draw_key(key, runs)
    return figure


def page_charts(runs: Sequence[RunHistory]) -> str:
    """HTML with a key and the charts of some runs: losses by step, characters and time; learning rate; speed.

    Raises `UserError` if matplotlib is missing.
    """
    if len(runs) == 1:
        items = [("validation", "c0"), ("training", "c1 thin")]
    else:
        items = [(run.name, f"c{i % len(COLOURS)}") for i, run in enumerate(runs)]
        items += [("validation", ""), ("training", "thin")]
    key = "".join(f'<li><i class="swatch {kind}"></i>{escape(name)}</li>' for name, kind in items)
    return f'<ul class="key">{key}</ul><div class="charts">{"".join(_charts(runs))}</div>'


def loss_limits(runs: Sequence[RunHistory]) -> tuple[float, float]:
    """The (lowest, highest) loss to show: all losses after the first tenth of the longest run.

    By then the steep fall is over. Spikes, a run that ended earlier and a run that diverged do not squash the rest.
    """
    lines = [(points["step"], points["loss"]) for run in runs for points in (run.train, run.val)]
    lines = [(step[ok], loss[ok]) for step, loss in lines if (ok := np.isfinite(loss)).any()]
    fallen = max(step[-1] for step, _ in lines) / 10
    high = max(np.quantile(loss[step >= fallen], 0.99) for step, loss in lines if step[-1] >= fallen)
    high = min(high, max([6.0, *(loss[0] for _, loss in lines)]))  # a loss above that of an untrained model
    low = min(loss.min() for _, loss in lines)
    margin = 0.06 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean, (n,) -> (n,), over a fiftieth of the points (fewer at the ends), from `RAW_FROM` points."""
    if len(values) < RAW_FROM:
        return values
    window = np.ones(2 * (len(values) // RAW_FROM) + 1)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def summary(run: RunHistory) -> str:
    """The run's best and last validation loss, in nats and bits per character, on one line."""
    if run.best_index is None:
        return f"not measured yet; last training loss {run.train['loss'][-1]:.3f} nats"
    best, last = run.best_loss, run.val["loss"][-1]
    return f"best {best:.3f} nats ({best / np.log(2):.3f} bits), step {run.best_step:,}; " \
           f"final {last:.3f} ({last / np.log(2):.3f})"  # fmt: skip


def short(value: float) -> str:
    """A number for an axis or a table: 0.02, 150, 2.5 M."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.4g}"


def spread(count: int, max_count: int) -> np.ndarray:
    """At most `max_count` of the indices 0 to count - 1, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, max_count)).round().astype(int))


# Parts of both kinds of charts.


def _figure(**options: Any) -> "Figure":
    try:
        from matplotlib.figure import Figure  # not pyplot, which has global state and opens windows
    except ImportError as error:
        raise UserError("drawing charts needs matplotlib: pip install 'smallm[train]'") from error
    return Figure(**options)


def _colours(runs: Sequence[RunHistory]) -> list[tuple[str, str]]:
    """The colours of training and validation loss: two of one run, one for each of several."""
    if len(runs) == 1:
        return [(COLOURS[1], COLOURS[0])]
    return [(COLOURS[i % len(COLOURS)],) * 2 for i in range(len(runs))]


def _style(axes: "Axes", x_label: str, y_label: str, max_ticks: tuple[int, int] = (8, 7)) -> None:
    """Labels, a grid, and at most about `max_ticks` round numbers along x and y."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set(xlabel=x_label, ylabel=y_label)
    for axis, count in zip((axes.xaxis, axes.yaxis), max_ticks, strict=True):
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and high >= 10 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        else:
            whole = axis is axes.xaxis and x_label == "step"
            axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1))
        axis.set_major_formatter(lambda value, _: short(value))
        axis.minorticks_off()
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_losses(
    axes: "Axes", run: RunHistory, x: str, colours: tuple[str, str], max_points: int | None = None
) -> tuple["Line2D", "Line2D"]:
    """The training loss thin, over its faint raw values; the validation loss strong, with a star on the best.

    x: the column to draw over. max_points: of a line. Returns the lines of the training and the validation loss.
    """
    train, val, colour = run.train, run.val, {"train": colours[0], "val": colours[1]}

    def line(xs: np.ndarray, ys: np.ndarray, *style: Any, **options: Any) -> "Line2D":
        chosen = spread(len(xs), max_points or len(xs))
        return axes.plot(xs[chosen], ys[chosen], *style, **options)[0]

    if len(train["loss"]) >= RAW_FROM:
        line(train[x], train["loss"], color=colour["train"], alpha=0.2, linewidth=0.6)
    thin = line(train[x], smooth(train["loss"]), "-o", color=colour["train"], alpha=0.7, linewidth=1.2, markersize=3,
                markevery=[-1])  # fmt: skip
    strong = line(val[x], val["loss"], "-o", color=colour["val"], linewidth=2, markersize=4,
                  markevery=len(val[x]) // 25 or 1)  # fmt: skip
    if run.best_index is not None:
        best = slice(run.best_index, run.best_index + 1)
        axes.plot(val[x][best], val["loss"][best], "*", color=colour["val"], markersize=14, markeredgecolor=EDGE)
    return thin, strong


# The picture.


def _draw_key(axes: "Axes", runs: Sequence[RunHistory]) -> None:
    """Explains the lines and gives each run's losses, in a panel that covers no curve."""
    axes.axis("off")
    place: dict[str, Any] = {"loc": "upper left", "frameon": False, "borderpad": 0}
    colours = _colours(runs)
    train, val = colours[0] if len(runs) == 1 else (KEY, KEY)
    styles = {"training": ("-", train, 1, 0), "validation": ("-o", val, 2, 5), "best": ("*", val, 0, 11)}
    lines = [axes.plot([], [], style, color=colour, lw=width, ms=size)[0]
             for style, colour, width, size in styles.values()]  # fmt: skip
    axes.add_artist(axes.legend(lines, list(styles), ncols=3, fontsize=9, **place))
    lines = [axes.plot([], [], color=colour, linewidth=4)[0] for _, colour in colours]
    # Placeholders at first: matplotlib would skip a name that begins with "_" and typeset one that holds "$".
    names = axes.legend(lines, ["run"] * len(runs), title="Validation loss per character", bbox_to_anchor=(0, 0.9),
                        fontsize=9 if len(runs) <= 4 else 7.5, title_fontsize=9, alignment="left", **place)  # fmt: skip
    for text, run in zip(names.get_texts(), runs, strict=True):
        text.set(parse_math=False, text=f"{run.name}\n{summary(run)}")


# The charts of a page.


def _charts(runs: Sequence[RunHistory]) -> Iterator[str]:
    near = loss_limits(runs)
    yield _PageChart("Loss by step", "step", NATS).losses(runs, "step").html(near)
    if all(run.record.train_characters for run in runs):
        # From the very first losses, which the other charts leave out: with two logarithmic axes they fall almost
        # along a straight line.
        averaged = [replace(run, train=_averaged(run.train)) for run in runs]
        yield _PageChart("Loss by characters seen", "characters of text", NATS, log=True).losses(
            averaged, "characters").html()  # fmt: skip
    if len(runs) > 1:
        yield _PageChart("Loss by time", "seconds", NATS).losses(runs, "seconds").html(near)
    if any(np.isfinite(run.train["learning_rate"]).any() for run in runs):
        yield _PageChart("Learning rate", "step").column(runs, "learning_rate").html()
    if len(runs) == 1 and np.isfinite(runs[0].train["characters_per_second"]).any():
        yield _PageChart("Characters per second", "step").column(runs, "characters_per_second").html()


class _PageChart:
    """One chart of a page, and the lines whose values the page shows under the pointer."""

    def __init__(self, title: str, x_label: str, y_label: str = "", log: bool = False):
        """log: both axes are logarithmic; otherwise they begin at 0."""
        self._title, self._x_label, self._y_label = title, x_label, y_label
        self._figure = _figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)  # SVG has 72 units to the inch
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        self._axes = self._figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, width / WIDTH, height / HEIGHT))
        self._scale = "log" if log else "linear"
        self._lines: dict[str, Line2D] = {}

    def losses(self, runs: Sequence[RunHistory], x: str) -> "_PageChart":
        """Draws training and validation losses over the column `x`."""
        for run, colours in zip(runs, _colours(runs), strict=True):
            names = ("training", "validation") if len(runs) == 1 else (f"{run.name}, training", run.name)
            self._lines |= zip(names, _draw_losses(self._axes, run, x, colours, MAX_POINTS), strict=True)
        return self

    def column(self, runs: Sequence[RunHistory], key: str) -> "_PageChart":
        """Draws a column of the training records over the step."""
        for run, (_, colour) in zip(runs, _colours(runs), strict=True):
            chosen = spread(len(run.train["step"]), MAX_POINTS)
            line = self._axes.plot(run.train["step"][chosen], run.train[key][chosen], color=colour, linewidth=2)[0]
            self._lines[run.name if len(runs) > 1 else key.replace("_", " ")] = line
        return self

    def html(self, y_limits: tuple[float, float] | None = None) -> str:
        """The figure with its title, the chart, and a paragraph for the values under the pointer."""
        axes = self._axes
        points = np.concatenate([line.get_xydata() for line in axes.lines])  # (n, 2)
        axes.set(xlim=self._limits(points[:, 0]), ylim=y_limits or self._limits(points[:, 1]))
        axes.set(xscale=self._scale, yscale=self._scale)
        _style(axes, self._x_label, self._y_label, (6, 8 if self._scale == "log" else 6))
        axes.spines[:].set_visible(False)
        axes.tick_params(bottom=False, left=False, labelsize=12)
        axes.xaxis.set_label_coords(0.5, 12 / HEIGHT, self._figure.transFigure)
        axes.yaxis.set_label_coords(12 / WIDTH, 0.5, self._figure.transFigure)
        data = {"x": self._x_label, "lines": [_points(axes, name, line) for name, line in self._lines.items()]}
        return (
            f'<figure class="chart"><figcaption>{escape(self._title)}</figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(self._title)}" '
            f'data-chart="{escape(json.dumps(data))}">{_svg(self._figure, self._title)}'
            f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
            '<p class="values" aria-live="polite"></p></figure>'
        )

    def _limits(self, values: np.ndarray) -> tuple[float, float]:
        """The ends of an axis for all finite values, with room for the marks at the ends."""
        known = values[np.isfinite(values) & (values > 0)]
        if self._scale == "linear":
            return 0.0, 1.03 * float(known.max(initial=0.0)) or 1.0
        low, high = (float(known.min()), float(known.max())) if len(known) else (1.0, 10.0)
        return low / 1.05, high * 1.05


def _averaged(train: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over twentieths of a decade of characters: with a logarithmic axis the single points would crowd."""
    x, loss = train["characters"], train["loss"]
    known = np.isfinite(x) & np.isfinite(loss) & (x > 0)
    x, loss = x[known], loss[known]
    _, group, count = np.unique(np.floor(20 * np.log10(x)), return_inverse=True, return_counts=True)
    return {"characters": np.bincount(group, x) / count, "loss": np.bincount(group, loss) / count}


def _points(axes: "Axes", name: str, line: "Line2D") -> dict[str, Any]:
    """What report.js needs of a line: for each point its position in the SVG and its two values."""
    values = line.get_xydata()
    places = axes.transData.transform(values)
    known = np.isfinite(values).all(1) & np.isfinite(places).all(1)
    points = np.column_stack([places[:, 0], HEIGHT - places[:, 1], values])[known]
    rounded = [[round(x, 1), round(y, 1), float(f"{a:.6g}"), float(f"{b:.6g}")] for x, y, a, b in points.tolist()]
    return {"name": name, "colour": COLOURS.index(line.get_color()), "points": rounded}


def _svg(figure: "Figure", salt: str) -> str:
    """The content of the SVG element that matplotlib draws, in the fonts and colours of the page.

    salt: makes the ids of the clip paths and marks differ from those of other charts of the page.
    """
    from matplotlib import rc_context

    file, none = StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    whole = file.getvalue()
    content = whole[whole.index("<g ") : whole.rindex("</svg>")]
    content = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", content)  # ids that other charts have too
    content = re.sub(r"font[a-z-]*: [^;\"]*;? ?", "", content)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: VARIABLES.get(colour[0], colour[0]), content)
