"""The checkpoints of a run: which there are, which of them are intact, which is the best and which may go."""

import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import tomli_w

from smallm.atomic_write import atomic_write
from smallm.errors import UserError
from smallm.runs.config_file import read_toml
from smallm.runs.layout import CHECKPOINTS, CONFIG, VALIDATION, is_run
from smallm.training.checkpoint.format import checkpoint_folder, read_state, verify
from smallm.training.config import Config

_NAME = re.compile(r"step-\d{6,}")
_DAMAGED = ".damaged"  # the ending of the name of a checkpoint that was put aside


def write_run_files(run: Path, config: Config, val_pieces: Iterable[str]) -> None:
    """Puts into a run what is to stand there before its first checkpoint. Raises `UserError`."""
    try:
        with (run / VALIDATION).open("w", encoding="utf-8", newline="") as file:
            file.writelines(val_pieces)
        atomic_write(run / CONFIG, tomli_w.dumps(config.to_dict()))
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}; choose another --out") from None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; whether their files are intact is for `verify` to say."""
    if not is_run(run):
        raise UserError(f"{run} is not a run folder; train one with `python train.py --out {run}`")
    found = [folder for folder in (run / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def newest_checkpoint(run: Path, on_damaged: Callable[[Path, str], None]) -> Path | None:
    """The newest intact checkpoint; None if training did not come to one. Raises `UserError` if all are damaged.

    on_damaged: is told of each newer one that is damaged, and of what is wrong with it.
    """
    found, problem = checkpoints(run), ""
    for folder in reversed(found):
        if not (problem := verify(folder)):
            return folder
        on_damaged(folder, problem)
    if found:
        raise UserError(f"all checkpoints of {run} are damaged ({found[0].name}: {problem}); train it anew")
    return None


def quarantine(folder: Path) -> None:
    """Takes a damaged checkpoint out of the way; `prune` removes it once there is a newer one."""
    aside = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def best_checkpoint(run: Path) -> Path:
    """The intact checkpoint with the lowest validation loss; the newest, if none was evaluated.

    Raises `UserError` if there is none; a damaged one is passed over with a line on stderr.
    """
    found = checkpoints(run)
    problems = {folder: verify(folder) for folder in found}
    intact = [folder for folder in found if not problems[folder]]
    if not found:
        raise UserError(f"{run} has no checkpoint yet; go on with `python train.py --resume {run}`")
    if not intact:
        newest, problem = found[-1].name, problems[found[-1]]
        raise UserError(f"all checkpoints of {run} are damaged ({newest}: {problem}); train it anew")
    for folder in found:
        if problems[folder]:
            print(f"warning: {folder} is damaged ({problems[folder]}); using another checkpoint", file=sys.stderr)
    scored = [(loss, folder) for folder in intact if (loss := read_state(folder)[0].val_loss) is not None]
    return min(scored)[1] if scored else intact[-1]


def saved_config(run: Path) -> Config:
    """The resolved config of a run, from its newest checkpoint; before there is one, from what it began with."""
    folder = newest_checkpoint(run, on_damaged=lambda folder, problem: None)
    if folder is not None:
        return read_state(folder)[1]
    try:
        return Config.from_dict(read_toml(run / CONFIG))
    except (TypeError, UserError):
        raise UserError(f"{run} has no checkpoint yet, nor a whole {CONFIG}; remove it and train anew") from None


def prune(run: Path, best_step: int, keep_last: int) -> None:
    """Removes all checkpoints but the newest `keep_last` and the best."""
    for folder in checkpoints(run)[:-keep_last]:
        if folder != checkpoint_folder(run, best_step):
            shutil.rmtree(folder)
    halves = (run / CHECKPOINTS).glob(".step-*")  # left behind by a kill in the middle of a save
    for left in (*halves, *(run / CHECKPOINTS).glob(f"step-*{_DAMAGED}")):
        shutil.rmtree(left)
