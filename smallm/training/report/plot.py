"""Draws what runs learned: training and validation loss by step and by epoch, and the learning rate.

    smallm plot runs/shakespeare                        writes the picture runs/shakespeare/loss.png
    smallm plot runs/decay runs/constant --out lr.png   draws several runs over each other
    smallm plot runs/shakespeare --html report.html     writes the report of the run again, as a page
    smallm plot runs/decay runs/constant --html c.html  compares runs on a page

Reads the metrics.jsonl of each run. Losses are in nats per character.
"""

import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError
from smallm.runs.summary import check_run
from smallm.training.report.charts import picture
from smallm.training.report.history import read_histories
from smallm.training.report.pages import write_report


def plot_runs(runs: Sequence[Path], out: Path) -> Path:
    """Draws the losses and learning rates of runs over each other into the file `out`, and returns `out`.

    out: ends in .png, .svg or .pdf; an older file is replaced, and missing folders are created.
    Raises `UserError` for a folder without losses, if matplotlib is missing and if `out` cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"cannot draw into {out}: give a file name that ends in .png, .svg or .pdf")
    figure = picture(read_histories(runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
            figure.savefig(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}): choose another file") from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `smallm plot` with these arguments and prints the files written. Raises `UserError`."""
    parser = ArgumentParser("plot", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a training run")
    parser.add_argument("--out", type=Path, help="picture to write: .png, .svg or .pdf (default: loss.png in the "
                        "folder of one run, compare.png for several runs, no picture with --html)")  # fmt: skip
    parser.add_argument("--html", type=Path, help="page to write: the report of one run, a comparison of several runs")
    args = parser.parse_args(argv)
    for run in args.runs:
        check_run(run)
    alone = len(args.runs) == 1
    if args.html:
        print(write_report(args.runs, args.html))
    if args.out or not args.html:
        print(plot_runs(args.runs, args.out or (args.runs[0] / "loss.png" if alone else Path("compare.png"))))
    return 0
