"""`smallm runs`: lists the runs in a folder, sorted and filtered. Reads only."""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smallm.cli.arguments import ArgumentParser
from smallm.cli.table import MISSING, columns_of, duration, short_count, shortened, table
from smallm.errors import UserError, command
from smallm.html.escape import printable
from smallm.runs.layout import EXPORT, RUNS
from smallm.runs.summary import BROKEN, FINISHED, INTERRUPTED, RUNNING, Run, find_runs, read_run

MIN_COLUMNS, MAX_COLUMNS = 80, 120  # width of the table
MIN_NAME, MIN_TEXT = 12, 8  # columns left for the names of the run and of its text
HEADS = ("run", "text", "size", "nats", "bits", "steps", "epochs", "time", "age", "state", "export")
WIDE_ONLY = {"epochs", "time"}
LEFT = {"run", "text", "state", "export"}
SORTS: dict[str, Callable[[Run], Any]] = {
    "newest": lambda run: -run.written,
    "name": lambda run: run.path.resolve().name,
    "loss": lambda run: math.inf if run.val_loss is None else run.val_loss,
    "time": lambda run: -(run.seconds or 0),
    "steps": lambda run: -(run.step or 0),
    "size": lambda run: -(run.parameters or 0),
}
"""The keys of --sort: names and losses ascending, everything else descending; unknown values last."""


def main(argv: Sequence[str]) -> int:
    """Runs `smallm runs` with these arguments."""
    parser = ArgumentParser("runs", description="Lists the runs in a folder.")
    parser.add_argument("folder", nargs="?", type=Path, help="folder of runs, or one run; default: runs")
    parser.add_argument("--sort", choices=SORTS, default="newest", help="order: names and losses from the lowest, "
                        "times, steps and sizes from the highest; default: newest")  # fmt: skip
    parser.add_argument("--state", choices=(RUNNING, FINISHED, INTERRUPTED, BROKEN), help="only runs in this state")
    parser.add_argument("--filter", metavar="WORD", default="", help="only runs whose name or text contains WORD")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(argv)
    folder = RUNS if options.folder is None else options.folder
    found = find_runs(folder) if options.folder or folder.is_dir() else []
    runs = sorted((run for run in _readable(found) if _matches(run, options.state, options.filter)),
                  key=SORTS[options.sort])  # fmt: skip
    if options.json:
        print(json.dumps([as_json(run) for run in runs], ensure_ascii=True, indent=1))
    elif runs:
        print(*lines(runs, shutil.get_terminal_size((MAX_COLUMNS, 24)).columns, time.time()), sep="\n")
    elif found:
        print(f"none of the {len(found)} runs in {printable(str(folder))} matches", file=sys.stderr)
    else:
        print(f"no runs in {printable(str(folder))}; train one with: {command('train')}", file=sys.stderr)
    return 0


def _matches(run: Run, state: str | None, word: str) -> bool:
    named = f"{run.path.resolve().name} {run.text or ''}".casefold()
    return run.state == (state or run.state) and word.casefold() in named


def _readable(paths: Sequence[Path]) -> Iterator[Run]:
    """The runs; those that cannot be read are named on stderr."""
    for path in paths:
        try:
            yield read_run(path)
        except UserError as error:
            print(f"smallm: {printable(str(error))}", file=sys.stderr)


def lines(runs: Sequence[Run], columns: int, now: float) -> list[str]:
    """The lines of the table. columns: width of the terminal; now: the time in seconds since 1970."""
    columns = max(MIN_COLUMNS, min(MAX_COLUMNS, columns))
    heads = [head for head in HEADS if columns >= 100 or head not in WIDE_ONLY]
    rows = [heads, *([_cells(run, now)[head] for head in heads] for run in runs)]
    left = [i for i, head in enumerate(heads) if head in LEFT]
    rest = sum(2 + max(columns_of(row[i]) for row in rows) for i in range(2, len(heads)))
    room = max(MIN_NAME + MIN_TEXT, columns - rest - 2)
    name, text = (max(columns_of(row[i]) for row in rows) for i in (0, 1))
    text = min(text, max(MIN_TEXT, room - name, room // 3))
    name = min(name, room - text)
    return table([[shortened(row[0], name), shortened(row[1], text), *row[2:]] for row in rows], left)


def _cells(run: Run, now: float) -> dict[str, str]:
    return {
        "run": printable(run.path.resolve().name),
        "text": printable(run.text or MISSING),
        "size": short_count(run.parameters),
        "nats": _figure(run.val_loss),
        "bits": _figure(run.bits_per_character),
        "steps": MISSING if run.step is None else f"{run.step:,}",
        "epochs": MISSING if run.epoch is None else f"{run.epoch:.1f}",
        "time": duration(run.seconds),
        "age": duration(now - run.written),
        "state": run.state,
        "export": shortened(printable(run.exports.get(EXPORT) or next(iter(run.exports.values()), MISSING)), 8),
    }


def _figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}" if value < 100 else f"{value:.2g}"


def as_json(run: Run) -> dict[str, Any]:
    """The values of `--json`: times in seconds, losses in nats per character."""
    return {
        "name": run.path.resolve().name, "path": str(run.path), "state": run.state, "problem": run.problem,
        "text": run.text, "parameters": run.parameters, "val_loss": run.val_loss,
        "bits_per_character": run.bits_per_character, "best_step": run.best_step, "step": run.step,
        "total_steps": run.total_steps, "epoch": run.epoch, "seconds": run.seconds,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.written)), "exports": run.exports,
    }  # fmt: skip
