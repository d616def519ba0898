"""Charts of runs, drawn by matplotlib: all of them in one picture, or each as an SVG on a page.

On a page the colours are CSS variables, so that the charts follow a dark screen and paper. The points of the lines go
along as data, from which `report.js` shows the values under the pointer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from smallm.errors import UserError, pip_install
from smallm.html.escape import escape
from smallm.training.report.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072b2", "#d55e00", "#00805d", "#b3478c", "#7a5195", "#8c6d1f", "#3a8cc4", "#4d4d4d")
"""Colours of the runs, which people with few colour receptors tell apart; in report.css --c0 to --c7."""
GRID, EDGE = "#e6e6e6", "#ffffff"
VARIABLES = {GRID: "var(--line)", EDGE: "var(--paper)"} | {hex: f"var(--c{i})" for i, hex in enumerate(COLOURS)}
WIDTH, HEIGHT = 440, 280  # of a chart on a page, in units of which a letter has about 12
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 42  # margins for the labels
MAX_POINTS = 240  # of a line; more would lie closer than a pixel
RAW_FROM = 100  # points from which a training loss is smoothed over a faint line of its raw values


@dataclass(frozen=True)
class Chart:
    """Which columns of the training records, and for the loss of the evaluations too, are drawn over which."""

    title: str
    x: str
    y: str = "loss"
    log: bool = False
    """Both axes are logarithmic; otherwise they begin at 0, but for the loss at `loss_limits`."""


def charts(runs: Sequence[RunHistory]) -> list[Chart]:
    """The charts for which the runs hold figures."""
    found = [Chart("Loss by step", "step")]
    if all(run.record.train_characters for run in runs):
        # From the very first losses, which the other charts leave out: with two logarithmic axes they fall almost
        # along a straight line.
        found.append(Chart("Loss by characters seen", "characters", log=True))
    if len(runs) > 1:
        found.append(Chart("Loss by time", "seconds"))
    if any(np.isfinite(run.train["learning_rate"]).any() for run in runs):
        found.append(Chart("Learning rate", "step", "learning_rate"))
    if len(runs) == 1 and np.isfinite(runs[0].train["characters_per_second"]).any():
        found.append(Chart("Characters per second", "step", "characters_per_second"))
    return found


def picture(runs: Sequence[RunHistory]) -> "Figure":
    """All charts of some runs above a key with their losses. Raises `UserError` if matplotlib is missing."""
    shown = charts(runs)
    figure = _figure(figsize=(12, 7.5), dpi=100, layout="constrained")
    from matplotlib.lines import Line2D

    panels = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).flat
    for chart, axes in zip(shown, panels, strict=False):
        axes.set_title(chart.title)
        _draw(axes, chart, runs)
    for axes in list(panels)[len(shown) :]:
        axes.axis("off")
    lines = [(f"{run.name}: {summary(run)}", colour) for run, (_, colour) in zip(runs, _colours(runs), strict=True)]
    lines += [("training", COLOURS[1])] if len(runs) == 1 else []
    # Placeholders at first: matplotlib would skip a name that begins with "_" and typeset one that holds "$".
    key = figure.legend([Line2D([], [], color=colour, linewidth=3) for _, colour in lines], ["run"] * len(lines),
                        loc="outside lower left", title="Validation loss strong, training loss thin, best loss ★",
                        frameon=False, alignment="left", ncols=-(-len(lines) // 8))  # fmt: skip
    for text, (label, _) in zip(key.get_texts(), lines, strict=True):
        text.set(parse_math=False, text=label)
    return figure


def page_charts(runs: Sequence[RunHistory]) -> str:
    """HTML with a key and all charts of some runs. Raises `UserError` if matplotlib is missing."""
    if len(runs) == 1:
        items = [("validation", "c0"), ("training", "c1 thin")]
    else:
        items = [(run.name, f"c{i % len(COLOURS)}") for i, run in enumerate(runs)]
        items += [("validation", ""), ("training", "thin")]
    key = "".join(f'<li><i class="swatch {kind}"></i>{escape(name)}</li>' for name, kind in items)
    drawn = "".join(_page_chart(chart, runs) for chart in charts(runs))
    return f'<ul class="key">{key}</ul><div class="charts">{drawn}</div>'


def loss_limits(runs: Sequence[RunHistory]) -> tuple[float, float]:
    """The (lowest, highest) loss to show: all losses after the first tenth of the longest run.

    By then the steep fall is over. Spikes, a run that ended earlier and a run that diverged do not squash the rest. In
    an ensemble the steps count from the start of each model.
    """
    lines = [(_member_steps(points), points["loss"]) for run in runs for points in (run.train, run.val)]
    lines = [(step[ok], loss[ok]) for step, loss in lines if (ok := np.isfinite(loss)).any()]
    fallen = max(step.max() for step, _ in lines) / 10
    high = max(np.quantile(loss[step >= fallen], 0.99) for step, loss in lines if step.max() >= fallen)
    high = min(high, max([6.0, *(loss[0] for _, loss in lines)]))  # a loss above that of an untrained model
    low = min(loss.min() for _, loss in lines)
    margin = 0.06 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def _member_steps(points: dict[str, np.ndarray]) -> np.ndarray:
    """The steps since each model of an ensemble began, (n,); the steps of the run where there is one model."""
    step, member = points["step"], np.nan_to_num(points["member"])
    _, first, index = np.unique(member, return_index=True, return_inverse=True)
    return step - np.where(member > 1, step[first][index], 0)


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


def _figure(**options: Any) -> "Figure":
    try:
        from matplotlib.figure import Figure  # not pyplot, which has global state and opens windows
    except ImportError as error:
        raise UserError(f"drawing charts needs matplotlib: {pip_install('smallm[train]')}") from error
    return Figure(**options)


def _colours(runs: Sequence[RunHistory]) -> list[tuple[str, str]]:
    """The colours of training and validation loss: two of one run, one for each of several."""
    if len(runs) == 1:
        return [(COLOURS[1], COLOURS[0])]
    return [(COLOURS[i % len(COLOURS)],) * 2 for i in range(len(runs))]


def _draw(axes: "Axes", chart: Chart, runs: Sequence[RunHistory]) -> dict[str, "Line2D"]:
    """Draws a chart; returns the lines whose values a page shows under the pointer, by their names."""
    lines: dict[str, Line2D] = {}
    for run, colours in zip(runs, _colours(runs), strict=True):
        if chart.y == "loss":
            names = ("training", "validation") if len(runs) == 1 else (f"{run.name}, training", run.name)
            lines |= zip(names, _draw_losses(axes, run, chart, colours), strict=True)
        else:
            name = chart.y.replace("_", " ") if len(runs) == 1 else run.name
            lines[name] = _line(axes, run.train[chart.x], run.train[chart.y], color=colours[1], linewidth=2)
    points = np.concatenate([line.get_xydata() for line in axes.lines])  # (n, 2)
    near = loss_limits(runs) if chart.y == "loss" and not chart.log else None
    axes.set(xlim=_limits(points[:, 0], chart.log), ylim=near or _limits(points[:, 1], chart.log))
    _style(axes, chart)
    return lines


def _draw_losses(
    axes: "Axes", run: RunHistory, chart: Chart, colours: tuple[str, str]
) -> tuple["Line2D", "Line2D"]:
    """The training loss thin, over its faint raw values; the validation loss strong, with a star on the best."""
    train, val, x = _averaged(run.train) if chart.log else run.train, run.val, chart.x
    if len(train["loss"]) >= RAW_FROM:
        _line(axes, train[x], train["loss"], color=colours[0], alpha=0.2, linewidth=0.6)
    thin = _line(axes, train[x], smooth(train["loss"]), marker="o", color=colours[0], alpha=0.7, linewidth=1.2,
                 markersize=3, markevery=[-1])  # fmt: skip
    strong = _line(axes, val[x], val["loss"], marker="o", color=colours[1], linewidth=2, markersize=4,
                   markevery=len(val[x]) // 25 or 1)  # fmt: skip
    if run.best_index is not None:
        axes.plot(val[x][run.best_index], run.best_loss, "*", color=colours[1], markersize=14, markeredgecolor=EDGE)
    return thin, strong


def _line(axes: "Axes", x: np.ndarray, y: np.ndarray, **options: Any) -> "Line2D":
    chosen = spread(len(x), MAX_POINTS)
    return axes.plot(x[chosen], y[chosen], **options)[0]


def _limits(values: np.ndarray, log: bool) -> tuple[float, float]:
    """The ends of an axis for all finite values, with room for the marks at the ends."""
    known = values[np.isfinite(values) & (values > 0)]
    if not log:
        return 0.0, 1.03 * float(known.max(initial=0.0)) or 1.0
    low, high = (float(known.min()), float(known.max())) if len(known) else (1.0, 10.0)
    return low / 1.05, high * 1.05


def _style(axes: "Axes", chart: Chart) -> None:
    """Labels, a grid, and a few round numbers along both axes."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set(xlabel="characters of text" if chart.x == "characters" else chart.x)
    axes.set(ylabel="nats per character" if chart.y == "loss" else "")
    if chart.log:
        axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if chart.log and high >= 10 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        else:
            whole = axis is axes.xaxis and chart.x == "step"
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1))
        axis.set_major_formatter(lambda value, _: short(value))
        axis.minorticks_off()
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False, left=False)


def _averaged(train: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over twentieths of a decade of characters: with a logarithmic axis the single points would crowd."""
    x, loss = train["characters"], train["loss"]
    known = np.isfinite(x) & np.isfinite(loss) & (x > 0)
    x, loss = x[known], loss[known]
    _, group, count = np.unique(np.floor(20 * np.log10(x)), return_inverse=True, return_counts=True)
    return {"characters": np.bincount(group, x) / count, "loss": np.bincount(group, loss) / count}


def _page_chart(chart: Chart, runs: Sequence[RunHistory]) -> str:
    """The figure with its title, the chart, and a paragraph for the values under the pointer."""
    figure = _figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)  # SVG has 72 units to the inch
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, width / WIDTH, height / HEIGHT))
    lines = _draw(axes, chart, runs)
    axes.tick_params(labelsize=12)
    axes.xaxis.set_label_coords(0.5, 12 / HEIGHT, figure.transFigure)
    axes.yaxis.set_label_coords(12 / WIDTH, 0.5, figure.transFigure)
    data = {"x": axes.get_xlabel(), "lines": [_points(axes, name, line) for name, line in lines.items()]}
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(chart.title)}" '
        f'data-chart="{escape(json.dumps(data))}">{_svg(figure, chart.title)}'
        f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        '<p class="values" aria-live="polite"></p></figure>'
    )


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
