"""The checkpoints of a run: listing, newest and best intact checkpoint, quarantine of damaged ones, pruning."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from smallm.atomic_write import atomic_write, rename
from smallm.errors import UserError, command
from smallm.runs.config_file import read_toml
from smallm.runs.layout import CHECKPOINTS, CONFIG, VALIDATION, checkpoint_folders, is_run
from smallm.runs.state_file import STATE_FILE
from smallm.training.checkpoint.format import REPLACED, checkpoint_folder, read_state, verify
from smallm.training.config import Config
from smallm.training.output import Output

_DAMAGED = ".damaged"  # suffix of quarantined checkpoints


def write_run_files(run: Path, config: Config, val_pieces: Iterable[str]) -> None:
    """Writes config.toml and the validation text into a run folder. Raises `UserError` if that fails."""
    try:
        with (run / VALIDATION).open("w", encoding="utf-8", newline="") as file:
            file.writelines(val_pieces)
        atomic_write(run / CONFIG, tomli_w.dumps(config.to_dict()))
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}; choose another --out") from None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, damaged ones included.

    Raises `UserError` if `run` is not a run folder.
    """
    if not is_run(run):
        raise UserError(f"{run} is not a run folder; train one with: {command('train', '--out', run)}")
    return checkpoint_folders(run)


def newest_checkpoint(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint, None if the run has no checkpoint; and newer, damaged ones with their problems.

    Raises `UserError` if all are damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoints(run)):
        if not (problem := verify(folder)):
            return folder, damaged
        damaged[folder] = problem
    if damaged:
        raise _all_damaged(run, *damaged.popitem())
    return None, {}


def restore_interrupted(run: Path) -> None:
    """Renames a checkpoint back whose process was killed while it replaced the checkpoint by one of the same step.

    The caller must hold the lock of the run.
    """
    for old in (run / CHECKPOINTS).glob(f".step-*{REPLACED}"):
        folder = old.with_name(old.name.split(".")[1])
        if not folder.exists():
            old.rename(folder)


def quarantine(folder: Path) -> None:
    """Renames a checkpoint, so that it no longer counts; `prune` deletes it after the next save."""
    target = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(target, ignore_errors=True)
    rename(folder, target)


def best_checkpoint(run: Path) -> Path:
    """The intact checkpoint with the lowest validation loss; the newest one if none was evaluated.

    Prints a warning to stderr for each damaged checkpoint. Raises `UserError` if no checkpoint is intact.
    """
    found = checkpoints(run)
    problems = {folder: verify(folder) for folder in found}
    intact = [folder for folder in found if not problems[folder]]
    if not found:
        raise UserError(f"{run} has no checkpoint yet; continue with: {command('train', '--resume', run)}")
    if not intact:
        raise _all_damaged(run, found[-1], problems[found[-1]])
    for folder, problem in problems.items():
        if problem:
            print(f"warning: {folder} is damaged ({problem}); using another checkpoint", file=Output("stderr"))
    scored = [(loss, folder) for folder in intact if (loss := read_state(folder)[0].val_loss) is not None]
    return min(scored)[1] if scored else intact[-1]


def find_checkpoint(path: Path) -> Path:
    """`path`, if it is a checkpoint, or the best checkpoint of the run at `path`. Raises `UserError`."""
    try:
        if not (path / STATE_FILE).is_file():
            if is_run(path):
                return best_checkpoint(path)
            raise UserError(f"{path} is neither a run nor a checkpoint of smallm; name one, such as runs/NAME")
        if problem := verify(path):
            raise UserError(f"{path} is damaged ({problem}); use another checkpoint")
        return path
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def model_name(checkpoint: Path) -> str:
    """The name of the run that a checkpoint lies in, or else that of its folder."""
    folder = checkpoint.resolve()
    return folder.parents[1].name if folder.parent.name == CHECKPOINTS else folder.name


def saved_config(run: Path) -> tuple[Config, dict[str, Any]]:
    """The resolved config of a run and its facts (`TrainingState.facts`), such as precision and number of threads.

    Both come from the newest intact checkpoint. Before the first one, the config comes from config.toml, and there are
    no facts.
    """
    folder, _ = newest_checkpoint(run)
    if folder is not None:
        state, config = read_state(folder)
        return config, state.facts
    try:
        return Config.from_dict(read_toml(run / CONFIG)), {}
    except (TypeError, UserError):
        raise UserError(f"{run} has neither a checkpoint nor a readable {CONFIG}; delete it and train again") from None


def prune(run: Path, best_step: int, keep_last: int) -> None:
    """Deletes all checkpoints except the newest `keep_last` and the best; also unfinished and quarantined ones.

    What cannot be deleted now, as files that another program has open on Windows, is deleted after the next save.
    """
    for folder in checkpoints(run)[:-keep_last]:
        if folder != checkpoint_folder(run, best_step):
            with suppress(PermissionError):
                quarantine(folder)
    for pattern in (".step-*", f"step-*{_DAMAGED}"):
        for leftover in (run / CHECKPOINTS).glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _all_damaged(run: Path, folder: Path, problem: str) -> UserError:
    return UserError(f"all checkpoints of {run} are damaged ({folder.name}: {problem}); train again")
