"""Draw what a run learned: training and validation loss over steps and over epochs, and the learning rate.

    python -m smallm.training.report.plot runs/shakespeare                       writes runs/shakespeare/loss.png
    python -m smallm.training.report.plot runs/decay runs/constant --out lr.png  lays the runs over each other
    python -m smallm.training.report.plot runs/shakespeare --html report.html    writes the report of the run anew
    python -m smallm.training.report.plot runs/decay runs/constant --html c.html the runs side by side on a page

Reads each run's ``metrics.jsonl``. Losses are nats per character.
"""

import json
import warnings
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError
from smallm.training.config import MAX_NUMBER

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d1f", "#56a3d9", "#4d4d4d")


class Curves(NamedTuple):
    """One run's points in the order of the steps: arrays of float, NaN where a value is missing."""

    name: str
    train: dict[str, np.ndarray]  # step, epoch, loss, learning_rate: each (n,)
    val: dict[str, np.ndarray]  # step, epoch, loss: each (m,)
    best: int | None  # index of the lowest validation loss


def read_metrics(run: Path) -> list[dict]:
    """The training and evaluation records of a run folder, in the order they were written.

    A last line that was cut short (by a kill) is left out, and so are records of other kinds.
    Raises UserError when the folder or its metrics.jsonl is missing, another line is broken or there is no loss.
    """
    path, records = Path(run) / "metrics.jsonl", []
    try:
        # Bytes, because a cut can fall inside a character, and a sample may hold other line separators than \n.
        lines = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        what = "has no readable metrics.jsonl" if Path(run).is_dir() else "is not a folder"
        raise UserError(f"{run} {what}: give the folder of a training run, such as runs/NAME") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["kind"] in ("train", "eval"):
                _check(curves("", [record]))  # raises where a number is missing or is none
                records.append(record)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                break
            raise UserError(f"{path}: line {number} is broken; delete that line and draw again") from error
    if not any(np.isfinite(points["loss"]).any() for points in curves("", records)[1:3]):
        raise UserError(f"{path} holds no loss yet: wait for the run's first steps, or train longer")
    return records


def _check(point: Curves) -> None:
    """Raises ValueError unless the one point has a step, and no figure that is too large for a picture."""
    numbers = np.concatenate([value for part in (point.train, point.val) for value in part.values()])
    steps = [*point.train["step"], *point.val["step"]]
    if (np.abs(numbers[np.isfinite(numbers)]) > MAX_NUMBER).any() or not np.isfinite(steps).all():
        raise ValueError("a number is none")


def curves(name: str, records: Sequence[dict]) -> Curves:
    """Records as curves; where a resumed run logged a step again, the later record counts.

    Raises KeyError, TypeError or ValueError for a record without its numbers; all but the step may be null.
    """
    latest = ({float(row["step"]): row for row in records if row["kind"] == kind} for kind in ("train", "eval"))
    trains, evals = ([by_step[step] for step in sorted(by_step)] for by_step in latest)
    if not trains:  # a run shorter than its logging interval still has the mean training loss of its evaluations
        trains = [record | {"loss": record["train_loss"], "learning_rate": None} for record in evals]

    def columns(rows: list[dict], **keys: str) -> dict[str, np.ndarray]:
        return {to: np.array([np.nan if row[k] is None else float(row[k]) for row in rows]) for to, k in keys.items()}

    val = columns(evals, step="step", epoch="epoch", loss="val_loss")
    best = int(np.nanargmin(val["loss"])) if np.isfinite(val["loss"]).any() else None
    train = columns(trains, step="step", epoch="epoch", loss="loss", learning_rate="learning_rate")
    return Curves(name, train, val, best)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean, (n,) -> (n,), over a fiftieth of the points (fewer at the ends), from 100 points on."""
    window = np.ones(2 * (len(values) // 100) + 1)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def loss_limits(runs: Sequence[Curves]) -> tuple[float, float]:
    """The (lowest, highest) loss to show: all after the first tenth of the longest run, when the steep fall is over.

    Spikes, a run that ended before that and a run that blew up do not squash the rest.
    """
    lines = [(points["step"], points["loss"]) for run in runs for points in (run.train, run.val)]
    lines = [(step[ok], loss[ok]) for step, loss in lines if (ok := np.isfinite(loss)).any()]
    fallen = max(step[-1] for step, _ in lines) / 10
    high = max(np.quantile(loss[step >= fallen], 0.99) for step, loss in lines if step[-1] >= fallen)
    high = min(high, max([6.0, *(loss[0] for _, loss in lines)]))  # worse than knowing nothing is not worth the space
    low = min(loss.min() for _, loss in lines)
    margin = 0.06 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def summary(run: Curves) -> str:
    """The run's best and final validation loss, in nats and bits per character, on one line."""
    if run.best is None:
        return f"not measured yet; last training loss {run.train['loss'][-1]:.3f} nats"
    best, final, step = run.val["loss"][run.best], run.val["loss"][-1], run.val["step"][run.best]
    return (f"best {best:.3f} nats ({best / np.log(2):.3f} bits), step {step:,.0f}; "
            f"final {final:.3f} ({final / np.log(2):.3f})")


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """What to call the runs: their folders' names, with those of the folders above where two are the same."""
    paths = [Path(run).resolve() for run in runs]
    names = [path.name for path in paths]
    names = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    return [name if len(name) <= 54 else f"{name[:26]}…{name[-27:]}" for name in names]  # the ends tell runs apart


def plot_runs(runs: Sequence[Path], out: Path) -> Path:
    """Draw the runs over each other into ``out`` (.png, .svg or .pdf; an older one is replaced); returns ``out``.

    Raises UserError as ``read_metrics`` does, and when matplotlib is missing or ``out`` cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"cannot draw into {out}: give a file name that ends in .png, .svg or .pdf")
    names = distinct_names(runs)
    figure = _figure([curves(name, read_metrics(run)) for name, run in zip(names, runs, strict=True)])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
            figure.savefig(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}): choose another file") from error
    return out


def _figure(runs: Sequence[Curves]):
    """Loss over steps above the learning rate on the left; loss over epochs above the key on the right."""
    try:
        from matplotlib import figure, ticker  # not pyplot: no global state, no window; Agg draws the PNG
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install 'smallm[train]'") from error
    picture = figure.Figure(figsize=(12, 7.5), dpi=100, layout="constrained")
    title = " · ".join(run.name for run in runs)
    picture.suptitle(title if len(title) < 90 else f"{len(runs)} runs", fontsize=14, weight="bold", parse_math=False)
    (by_step, by_epoch), (rate, key) = picture.subplots(2, 2, width_ratios=(4, 3), height_ratios=(2, 1))
    rate.sharex(by_step)
    by_epoch.sharey(by_step)
    for run, colour in zip(runs, cycle(COLOURS), strict=False):
        _draw_losses(by_step, run, "step", colour)
        _draw_losses(by_epoch, run, "epoch", colour)
        rate.plot(run.train["step"], run.train["learning_rate"], "-o", color=colour, markersize=3, markevery=[-1])
    by_step.set(xlabel="step", ylabel="loss (nats per character)", ylim=loss_limits(runs))
    by_epoch.set(xlabel="epoch", ylabel="loss (nats per character)")
    rate.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    whole = ticker.MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
    by_step.xaxis.set(major_locator=whole, major_formatter="{x:,.0f}")
    for axes in (by_step, by_epoch, rate):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    _draw_key(key, runs)
    return picture


def _draw_losses(axes, run: Curves, x: str, colour: str) -> None:
    """Training thin over its faint raw values; validation strong with markers, a star on its best."""
    train, val = run.train, run.val
    axes.plot(train[x], train["loss"], color=colour, alpha=0.2, linewidth=0.6)
    axes.plot(train[x], smooth(train["loss"]), "-o", color=colour, alpha=0.6, linewidth=1, markersize=3, markevery=[-1])
    axes.plot(val[x], val["loss"], "-o", color=colour, linewidth=2, markersize=4, markevery=len(val[x]) // 25 or 1)
    if run.best is not None:
        axes.plot(val[x][run.best], val["loss"][run.best], "*", color=colour, markersize=14, markeredgecolor="white")


def _draw_key(axes, runs: Sequence[Curves]) -> None:
    """What the lines mean and each run's losses, in a panel of their own, where they cover no curve."""
    axes.axis("off")
    place = {"loc": "upper left", "frameon": False, "borderpad": 0}
    styles = {"training": ("-", 1, 0), "validation": ("-o", 2, 5), "best": ("*", 0, 11)}
    lines = [axes.plot([], [], style, color="0.3", lw=width, ms=size)[0] for style, width, size in styles.values()]
    axes.add_artist(axes.legend(lines, list(styles), ncols=3, fontsize=9, **place))
    lines = [axes.plot([], [], color=colour, linewidth=4)[0] for _, colour in zip(runs, cycle(COLOURS), strict=False)]
    # Placeholders at first: matplotlib would skip a name that begins with "_" and typeset one that holds "$".
    names = axes.legend(lines, ["run"] * len(runs), title="Validation loss per character", bbox_to_anchor=(0, 0.9),
                        fontsize=9 if len(runs) <= 4 else 7.5, title_fontsize=9, alignment="left", **place)
    for text, run in zip(names.get_texts(), runs, strict=True):
        text.set(parse_math=False, text=f"{run.name}\n{summary(run)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs named on the command line and print where. Raises UserError for a mistake of the user's."""
    parser = ArgumentParser(prog="smallm plot", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a training run")
    parser.add_argument("--out", type=Path, help="picture to write (default: RUN/loss.png; compare.png for several)")
    parser.add_argument("--html", type=Path, help="page to write instead: a run's report, or several runs compared")
    args = parser.parse_args(argv)
    if args.html:
        from smallm.training.report.comparison import write_comparison
        from smallm.training.report.run_page import write_report

        several = len(args.runs) > 1
        print(write_comparison(args.runs, args.html) if several else write_report(args.runs[0], args.html))
    if args.out or not args.html:
        out = args.runs[0] / "loss.png" if len(args.runs) == 1 else Path("compare.png")
        print(plot_runs(args.runs, args.out or out))
    return 0


if __name__ == "__main__":
    from smallm.cli.main import run

    raise SystemExit(run(main))
