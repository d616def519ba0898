"""`smallm runs`: what is in `runs/`, newest first. Starts at once, changes nothing."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smallm.cli.table import NONE, columns_of, printable, short_count, short_time, shortened, table
from smallm.errors import UserError
from smallm.runs.layout import EXPORT, RUNS
from smallm.runs.summary import RunFacts, find_runs, read_run

NARROW, WIDE = 80, 120  # columns of a terminal that are made use of
MIN_NAME, MIN_TEXT = 12, 8  # columns of what is cut
HEADS = ("run", "text", "size", "nats", "bits", "steps", "epochs", "time", "age", "state", "export")
WIDE_ONLY = {"epochs", "time"}
LEFT = {"run", "text", "state", "export"}


def main(argv: Sequence[str]) -> int:
    """Runs `smallm runs` with these arguments."""
    options = _parser().parse_args(argv)
    folder = RUNS if options.folder is None else options.folder
    found = find_runs(folder) if options.folder or folder.is_dir() else []
    runs = sorted(map(read_run, found), key=lambda run: run.written, reverse=True)
    if options.json:
        print(json.dumps([as_json(run) for run in runs], ensure_ascii=True, indent=1))
    elif runs:
        print(*lines(runs, shutil.get_terminal_size((WIDE, 24)).columns, time.time()), sep="\n")
    else:
        print(f"no runs in {printable(str(folder))}; train one with: python train.py", file=sys.stderr)
    return 0


def lines(runs: Sequence[RunFacts], columns: int, now: float) -> list[str]:
    """The table, in as many columns of a terminal; now: seconds since 1970."""
    columns = max(NARROW, min(WIDE, columns))
    heads = [head for head in HEADS if columns >= 100 or head not in WIDE_ONLY]
    rows = [heads, *([_cells(run, now)[head] for head in heads] for run in runs)]
    left = [i for i, head in enumerate(heads) if head in LEFT]
    rest = sum(2 + max(columns_of(row[i]) for row in rows) for i in range(2, len(heads)))
    room = max(MIN_NAME + MIN_TEXT, columns - rest - 2)
    name, text = (max(columns_of(row[i]) for row in rows) for i in (0, 1))
    text = min(text, max(MIN_TEXT, room - name, room // 3))
    name = min(name, room - text)
    return table([[shortened(row[0], name), shortened(row[1], text), *row[2:]] for row in rows], left)


def _cells(run: RunFacts, now: float) -> dict[str, str]:
    return {
        "run": printable(run.path.resolve().name),
        "text": printable(run.text or NONE),
        "size": short_count(run.parameters),
        "nats": _figure(run.val_loss),
        "bits": _figure(run.bits_per_character),
        "steps": NONE if run.step is None else f"{run.step:,}",
        "epochs": NONE if run.epoch is None else f"{run.epoch:.1f}",
        "time": short_time(run.seconds),
        "age": short_time(now - run.written),
        "state": run.state,
        "export": shortened(printable(run.exports.get(EXPORT) or next(iter(run.exports.values()), NONE)), 8),
    }


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}" if value < 100 else f"{value:.2g}"


def as_json(run: RunFacts) -> dict[str, Any]:
    """What a program may want to know of a run; times in seconds, losses per character."""
    return {
        "name": run.path.resolve().name, "path": str(run.path), "state": run.state, "problem": run.problem,
        "text": run.text, "parameters": run.parameters, "val_loss": run.val_loss,
        "bits_per_character": run.bits_per_character, "best_step": run.best_step, "step": run.step,
        "total_steps": run.total_steps, "epoch": run.epoch, "seconds": run.seconds,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.written)), "exports": run.exports,
    }  # fmt: skip


class Parser(argparse.ArgumentParser):
    """One whose complaints are a `UserError`."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="smallm runs", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="where to look; default: runs")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return parser
