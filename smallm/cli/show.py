"""`smallm show RUN`: all about one run. Reads only, and needs no more than the base install."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from smallm.cli.arguments import ArgumentParser
from smallm.cli.runs import as_json
from smallm.cli.table import MISSING, duration, short_count, shortened, table
from smallm.html.escape import printable
from smallm.runs.baselines_file import read_baselines
from smallm.runs.config_file import flatten
from smallm.runs.layout import CHECKPOINTS, LOCK, newest_run, step_of
from smallm.runs.next_commands import next_commands
from smallm.runs.summary import FINISHED, INTERRUPTED, WEIGHTS, Run, check_run, read_run

TAIL_BYTES = 1 << 20  # of metrics.jsonl
MAX_EVALUATIONS = 8
MAX_SAMPLE, MAX_VALUE = 600, 100  # characters shown
COLUMNS = {"step": 0, "epoch": 2, "train_loss": 4, "val_loss": 4}  # of an evaluation, and the decimals shown
LABEL = 13  # columns of the labels


def main(argv: Sequence[str]) -> int:
    """Runs `smallm show` with these arguments."""
    parser = ArgumentParser("show", description="Shows all about one run.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run; default: the newest one")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(argv)
    path = options.run or newest_run()
    check_run(path)
    run = read_run(path, TAIL_BYTES)
    if options.json:
        print(json.dumps(details(run), ensure_ascii=True, indent=1))
    else:
        print(*lines(run), sep="\n")
    return 0


def details(run: Run) -> dict[str, Any]:
    """The values of `--json`: those of `smallm runs --json` and more; sizes in bytes."""
    evaluations = [line for line in run.metrics if line.get("kind") == "eval"][-MAX_EVALUATIONS:]
    samples = [line["sample"] for line in run.metrics if isinstance(line.get("sample"), str)]
    files = sorted(file for file in run.path.iterdir() if file.is_file() and file.name != LOCK)
    return as_json(run) | {
        "settings": run.changed_settings,
        "evaluations": [{key: line.get(key) if isinstance(line.get(key), int | float) else None for key in COLUMNS}
                        for line in evaluations],
        "old_text": next((line for line in reversed(run.metrics) if line.get("kind") == "old_text"), None),
        "baselines": {one.name: one.bits_per_char for one in read_baselines(run.path)},
        "checkpoints": [{"name": folder.name, "step": step_of(folder), "bytes": _bytes_in(folder),
                         "best": folder == run.best_checkpoint} for folder in run.checkpoints],
        "export_bytes": {name: _bytes_in(run.path / name) for name in run.exports},
        "files": {file.name: file.stat().st_size for file in files},
        "sample": samples[-1][:MAX_SAMPLE] if samples else "",
        "next": what_next(run),
    }  # fmt: skip


def what_next(run: Run) -> list[str]:
    """The commands that are useful now."""
    early = run.step is not None and run.total_steps is not None and run.step < run.total_steps
    state = "out of patience" if run.state == FINISHED and early else run.state
    commands = next_commands(run.path, flatten(run.config), state, run.total_steps)
    purposes = {INTERRUPTED: ["resume"], FINISHED: ["train for longer", "fine-tune"]}.get(run.state, [])
    if any((folder / WEIGHTS).is_file() for folder in run.checkpoints):
        purposes = [*purposes, "export"]
    if run.exports:
        purposes = [*purposes, "generate"]
    return [commands[purpose] for purpose in purposes]


def lines(run: Run) -> Iterator[str]:
    """The lines for people."""
    values = details(run)
    yield _line("run", f"{run.path}: {run.state}" + (f"; {run.problem}" if run.problem else ""))
    yield _line("text", run.text or MISSING)
    size = "" if run.parameters is None else f"{short_count(run.parameters)} parameters, "
    steps = MISSING if run.step is None else f"{run.step:,}"
    of = f" of {run.total_steps:,}" if run.total_steps and run.state != FINISHED else ""
    epochs = "" if run.epoch is None else f" ({run.epoch:.2f} epochs)"
    yield _line("length", f"{size}{steps}{of} steps{epochs}, {duration(run.seconds)}")
    yield _line("written", time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written)))
    if run.val_loss is not None:
        yield _line("best loss", f"{run.val_loss:.4f} nats per character, {run.bits_per_character:.3f} bits, at step "
                    f"{run.best_step:,}")  # fmt: skip
    if values["baselines"]:
        yield _line("bits per char", ", ".join(f"{name} {bits:.3f}" for name, bits in values["baselines"].items()))
    if (old := values["old_text"]) and all(isinstance(old.get(key), float) for key in ("before", "after")):
        yield _line("old text", f"{old['before']:.4f} nats per character before, {old['after']:.4f} after, of "
                    f"{old.get('name')}")  # fmt: skip
    for i, (key, value) in enumerate(values["settings"].items()):
        shown = shortened(json.dumps(value, ensure_ascii=False, default=str), MAX_VALUE)
        yield _line("" if i else "settings", f"{key} = {shown}")
    rows = [[MISSING if one[key] is None else f"{one[key]:,.{digits}f}" for key, digits in COLUMNS.items()]
            for one in values["evaluations"]]  # fmt: skip
    yield from _block("evaluations", table([["step", "epoch", "train", "validation"], *rows], left=()) if rows else [])
    stored = [(f"{CHECKPOINTS}/{one['name']}", one["bytes"], "best" if one["best"] else "")
              for one in values["checkpoints"]]  # fmt: skip
    stored += [(name, size, run.exports[name]) for name, size in values["export_bytes"].items()]
    stored += [(name, size, "") for name, size in values["files"].items()]
    yield from _block("files", table([[printable(name), f"{short_count(size)}B", printable(what)]
                                      for name, size, what in stored], left=(0, 2)) if stored else [])  # fmt: skip
    sample = values["sample"].strip("\n").split("\n") if values["sample"] else []
    yield from _block("sample", list(map(printable, sample)))
    yield from _block("next", [printable(command) for command in values["next"]])


def _bytes_in(folder: Path) -> int:
    """The total size of all files in a folder and its subfolders."""
    total = 0
    with suppress(OSError):
        for file in folder.rglob("*"):
            total += file.lstat().st_size if file.is_file() and not file.is_symlink() else 0
    return total


def _line(label: str, value: str) -> str:
    return f"{label:<{LABEL}}  {printable(value)}"


def _block(label: str, found: list[str]) -> Iterator[str]:
    for i, line in enumerate(found):
        yield f"{label if i == 0 else '':<{LABEL}}  {line}".rstrip()
