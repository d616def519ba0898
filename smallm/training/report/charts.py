"""The charts of a report, of one run or several: losses by step, by characters seen and by time; learning rates."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from smallm.training.report.outcome import Outcome, column
from smallm.training.report.plot import Curves, loss_limits, smooth
from smallm.training.report.svg import Axis, Line, chart, key

Across = Callable[[Outcome, str], np.ndarray]  # a run, and `train` or `val` -> where its points lie, (n,)


def pictures(outcomes: Sequence[Outcome]) -> str:
    """All of them, with the key to their lines. Of one run training and validation have two colours."""
    if len(outcomes) == 1:
        names = key([("validation", "c0"), ("training", "c1 thin")])
    else:
        kinds = [("validation", "stroke"), ("training", "stroke thin")]
        names = key([*((one.name, f"c{number % 8}") for number, one in enumerate(outcomes)), *kinds])
    return f'{names}<div class="charts">{"".join(_charts(outcomes))}</div>'


def _charts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    low, high = loss_limits([one.curves for one in outcomes])
    near = Axis("nats per character", low, high)
    yield _losses("Loss by step", "step", near, outcomes, lambda one, part: _points(one.curves, part)["step"])
    if all(one.record.train_characters for one in outcomes):
        # From the very first figures, which the other pictures leave out: the fall is near a straight line here.
        losses = [_points(one.curves, part)["loss"] for one in outcomes for part in ("train", "val")]
        whole = Axis.over("nats per character", losses, log=True)
        yield _losses("Loss by characters seen", "characters of text", whole, outcomes, _seen, log=True)
    if len(outcomes) > 1:
        yield _losses("Loss by time", "seconds", near, outcomes, _seconds)
    rates = [one.curves.train["learning_rate"] for one in outcomes]
    if any(np.isfinite(rate).any() for rate in rates):
        lines = [Line(one.name, one.curves.train["step"], rate, number, "plain")
                 for number, (one, rate) in enumerate(zip(outcomes, rates, strict=True))]  # fmt: skip
        x = Axis.over("step", [line.x for line in lines], zero=True)
        yield chart("Learning rate", x, Axis.over("", rates, zero=True), lines)
    if len(outcomes) == 1 and outcomes[0].steps:
        x, speeds = (column(outcomes[0].steps, key) for key in ("step", "characters_per_second"))
        axes = Axis.over("step", [x], zero=True), Axis.over("", [speeds], zero=True)
        yield chart("Characters per second", *axes, [Line("speed", x, speeds, 0, "plain")])


def _losses(title: str, label: str, y: Axis, outcomes: Sequence[Outcome], across: Across, log: bool = False) -> str:
    """Training thin over its faint raw values, validation strong; log: over a logarithm of what the axis shows."""
    lines = []
    for number, one in enumerate(outcomes):
        alone = len(outcomes) == 1
        names = ("training", "validation") if alone else (f"{one.name}, training", one.name)
        colour = 1 if alone else number
        x, loss = across(one, "train"), one.curves.train["loss"]
        if log:
            lines.append(Line(names[0], *_averaged(x, loss), colour, "thin"))
        else:
            lines += [Line(names[0], x, loss, colour, "faint")] if len(loss) >= 100 else []
            lines.append(Line(names[0], x, smooth(loss), colour, "thin"))
        lines.append(Line(names[1], across(one, "val"), one.curves.val["loss"], number, "strong"))
    lines.sort(key=lambda line: line.kind == "strong")  # over the others
    return chart(title, Axis.over(label, [line.x for line in lines], log=log, zero=not log), y, lines)


def _averaged(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (n,) -> means over twentieths of a decade of x, (m,) each: where a logarithm crowds the points."""
    known = np.isfinite(x) & np.isfinite(y) & (x > 0)
    x, y = x[known], y[known]
    _, place, count = np.unique(np.floor(20 * np.log10(x)), return_inverse=True, return_counts=True)
    return np.bincount(place, x) / count, np.bincount(place, y) / count


def _points(curves: Curves, part: str) -> dict[str, np.ndarray]:
    return curves.train if part == "train" else curves.val


def _seen(outcome: Outcome, part: str) -> np.ndarray:
    return _points(outcome.curves, part)["epoch"] * outcome.record.train_characters


def _seconds(outcome: Outcome, part: str) -> np.ndarray:
    """Of the whole run, evaluations included."""
    rows = outcome.steps if part == "train" and outcome.steps else outcome.evaluations
    return column(rows, "seconds")
