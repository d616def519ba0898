"""`smallm compare RUN RUN…`: the settings in which runs differ, and their losses. Reads only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smallm.cli.arguments import ArgumentParser
from smallm.cli.main import plot
from smallm.cli.runs import as_json
from smallm.cli.table import MISSING, duration, shortened, table
from smallm.errors import UserError, command
from smallm.html.escape import printable
from smallm.runs.config_file import flatten
from smallm.runs.summary import Run, check_run, read_run

MAX_VALUE = 32  # columns of a value


def main(argv: Sequence[str]) -> int:
    """Runs `smallm compare` with these arguments."""
    parser = ArgumentParser("compare", description="Shows the settings in which runs differ, and their "
                            "losses.")  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; at least two")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a JSON object")
    output.add_argument("--html", metavar="PAGE", help="write a page with curves and samples too")
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        raise UserError(f"compare needs two runs or more; see one run with: {command('show', options.runs[0])}")
    for path in options.runs:
        check_run(path)
    runs = [read_run(path) for path in options.runs]
    if options.json:
        values = {"runs": [as_json(run) for run in runs], "settings": differing_settings(runs)}
        print(json.dumps(values, ensure_ascii=True, indent=1))
        return 0
    if options.html:  # first, since it needs the extra `train`
        plot([*map(str, options.runs), "--html", options.html], shown="compare --html")
    print(*lines(runs), sep="\n")
    return 0


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings, by `section.field`, that are not the same in all runs, with the value of each run or None."""
    configs = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def lines(runs: Sequence[Run]) -> list[str]:
    """A table with a column for each run: the figures first, then the differing settings."""
    figures = {
        "state": [run.state for run in runs],
        "text": [run.text or MISSING for run in runs],
        "nats per character": [_figure(run.val_loss, ".4f") for run in runs],
        "bits per character": [_figure(run.bits_per_character, ".3f") for run in runs],
        "best step": [_figure(run.best_step, ",") for run in runs],
        "steps": [_figure(run.step, ",") for run in runs],
        "parameters": [_figure(run.parameters, ",") for run in runs],
        "time": [duration(run.seconds) for run in runs],
    }
    settings = {name: [MISSING if value is None else json.dumps(value, ensure_ascii=False) for value in row]
                for name, row in differing_settings(runs).items()}  # fmt: skip
    rows = [["", *(run.path.resolve().name for run in runs)]]
    rows += [[name, *row] for name, row in (figures | settings).items()]
    found = table([[shortened(printable(cell), MAX_VALUE) for cell in row] for row in rows])
    texts = {run.text for run in runs}
    note = ["The runs used different texts, so their losses cannot be compared."] if len(texts) > 1 else []
    return [*found[: len(figures) + 1], "", *(found[len(figures) + 1 :] or ["All runs have the same settings."]), *note]


def _figure(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)
