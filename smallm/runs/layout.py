"""The layout of a run folder, and how commands find a run."""

import os
import re
from pathlib import Path

from smallm.errors import UserError, command
from smallm.options import as_path

RUNS = Path("runs")
CONFIG = "config.toml"
METRICS = "metrics.jsonl"
RECORD = "report.json"  # what the report shows besides the metrics; written from the first step on
LOCK = ".lock"  # locked while a process trains the run
CHECKPOINTS = "checkpoints"
EXPORT = "export"
VALIDATION = "validation.txt"
OLD_VALIDATION = "old_validation.txt"  # of the run whose weights this run started from


def new_run(out: str | Path | None, name: str) -> Path:
    """The folder of a new run: `out`, or the first of `runs/name`, `runs/name-2`, … that does not exist.

    Raises `UserError` if `out` already holds a run, is a file, is empty or is not valid UTF-8.
    """
    if out is not None:
        path = out_folder(out)
        if is_run(path):
            resume = command("train", "--resume", path)
            raise UserError(f"{path} already holds a run; choose another --out, or go on with: {resume}")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another --out")
        return path
    path, number = RUNS / name, 1
    while path.exists():
        number += 1
        path = RUNS / f"{name}-{number}"
    return path


def out_folder(out: str | os.PathLike[str]) -> Path:
    """The folder that --out names. Raises `UserError` if the name is empty or not valid UTF-8."""
    if out == "":
        raise UserError("--out is empty; name a folder, or leave out --out")
    path = as_path("out", out)
    check_path(path)
    return path


def check_path(path: Path) -> None:
    """Raises `UserError` if a path is not valid UTF-8: the libraries that read and write weights cannot open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the path {path} is not valid UTF-8; rename the folder, or choose another one") from None


def is_run(path: Path) -> bool:
    """Whether a folder is a run."""
    return (path / METRICS).is_file() or (path / CHECKPOINTS).is_dir()


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders of a run that are named as checkpoints, oldest first. Raises `OSError`."""
    folders = (run / CHECKPOINTS).glob("step-*")
    return sorted((folder for folder in folders if re.fullmatch(r"step-\d{6,15}", folder.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written, from the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_run() -> Path:
    """The run in `runs/` whose metrics were written last. Raises `UserError` if there is no run."""
    runs = [path for path in RUNS.glob("*") if (path / METRICS).is_file()]
    if not runs:
        raise UserError(f"no run found in runs/; name a folder, or train one with: {command('train')}")
    return max(runs, key=lambda path: (path / METRICS).stat().st_mtime)


def validation_text(model: Path) -> Path:
    """The validation text of a run, of one of its checkpoints or of its export. Raises `UserError` if it is missing."""
    for folder in (model, *model.resolve().parents[:2]):
        if (folder / VALIDATION).is_file():
            return folder / VALIDATION
    raise UserError(f"{model} comes without its validation text; name a file: --perplexity FILE")
