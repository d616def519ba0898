"""What the folder of a run tells about the run, read without PyTorch.

Run folders may come from strangers and from killed runs: a value that is missing, broken or implausible is None.
"""

import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smallm.errors import UserError, command
from smallm.model_file.manifest import MANIFEST_FILE
from smallm.runs.config_file import flatten, read_config
from smallm.runs.layout import CHECKPOINTS, CONFIG, LOCK, METRICS, RECORD, checkpoint_folders, step_of
from smallm.runs.metrics import Record, number, read_metrics
from smallm.runs.state_file import CHANGED, read_json, read_state_file

TAIL_BYTES = 1 << 16  # of metrics.jsonl
WEIGHTS = "model.safetensors"
RUNNING, FINISHED, INTERRUPTED, BROKEN = "running", "finished", "interrupted", "broken"


@dataclass(frozen=True)
class Run:
    """A training run, as its folder describes the run at one moment.

    Losses are cross-entropies of the validation text in nats per character. `val_loss` and `best_step` belong to the
    best evaluation, `step`, `epoch` and `seconds` to the newest state. A value that the folder does not tell is None.

    >>> run = read_run(Path("runs/shakespeare"))
    >>> print(run.val_loss, run.bits_per_character, run.best_checkpoint)
    >>> losses = [(line["step"], line["val_loss"]) for line in run.metrics if line["kind"] == "eval"]
    """

    path: Path
    """The folder."""
    state: str
    """"running", "finished", "interrupted" (training can be resumed) or "broken"."""
    ending: str | None
    """How report.json says that the run ended: "finished", "out of patience", "interrupted", or not yet: "training"."""
    problem: str
    """What is wrong with the folder, in a few words; empty if nothing is."""
    text: str | None
    """Name of the training text."""
    parameters: int | None
    """Number of weights of the model."""
    val_loss: float | None
    """Lowest validation loss, in nats per character."""
    best_step: int | None
    """The step at which `val_loss` was measured."""
    step: int | None
    """Optimiser steps done."""
    total_steps: int | None
    """Steps of the whole run; with train.minutes the last estimate."""
    epoch: float | None
    """Passes over the training text."""
    seconds: float | None
    """Time spent on training."""
    written: float
    """Time at which training last wrote something, in seconds since 1970."""
    exports: dict[str, str]
    """Precision of each export, by the name of its folder within the run."""
    checkpoints: tuple[Path, ...]
    """Folders of the checkpoints, oldest first."""
    config: dict[str, Any]
    """The settings, by section and field; empty if they cannot be read."""
    changed_settings: dict[str, Any]
    """The settings that differ from their defaults, by `section.field`; all settings where the run does not tell."""
    metrics: tuple[Record, ...]
    """Records of metrics.jsonl in the order written: all of them, or those at the end of the file."""

    @property
    def bits_per_character(self) -> float | None:
        """`val_loss` in bits per character."""
        return None if self.val_loss is None else self.val_loss / math.log(2)

    @property
    def best_checkpoint(self) -> Path | None:
        """Folder of the checkpoint with the lowest validation loss; None if that checkpoint is missing."""
        return next((folder for folder in self.checkpoints if step_of(folder) == self.best_step), None)


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder; a folder that is a run itself is the only one. Raises `UserError`."""
    if _is_begun(folder):
        return [folder]
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and _is_begun(path))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; name a folder of runs") from None


def check_run(path: Path) -> None:
    """Raises `UserError` unless the folder is a run."""
    if not path.is_dir() or find_runs(path) != [path]:
        raise UserError(f"{path} is not a run; see the runs with: {command('runs')}")


def read_run(run: Path, max_bytes: int | None = TAIL_BYTES) -> Run:
    """Reads the folder of a run.

    max_bytes: how many bytes at the end of metrics.jsonl to read; None for the whole file.
    Raises `UserError` if the folder cannot be read.
    """
    try:
        next(run.iterdir(), None)
        running = is_running(run)
        trained = [file for file in (run / METRICS, run / CHECKPOINTS) if file.exists()]
        files = [run, *trained] if running or not trained else trained  # exports and plots change the folder, too
        written = max(file.stat().st_mtime for file in files)
        checkpoints = tuple(checkpoint_folders(run))
    except OSError as error:
        raise UserError(f"cannot read {run}: {error.strerror}") from None
    state, problem = _newest_state(checkpoints)
    record = _record(run)
    config = _section(state, "config") or read_config(run)
    config = {name: section for name, section in config.items() if isinstance(section, dict)}
    metrics = tuple(read_metrics(run, max_bytes))
    last = next((line for line in reversed(metrics) if line.get("kind") == "train"), {}) if running or not state else {}
    facts = _section(state, "facts")
    step = _whole(last.get("step", state.get("step")))
    epochs = [line["epoch"] for line in metrics if _whole(line.get("step")) == step and number(line.get("epoch"))]
    losses = [(number(state.get("best_val_loss")), _whole(state.get("best_step")))]
    if running or not state:
        losses += [(number(line.get("val_loss")), _whole(line.get("step"))) for line in metrics]
    known = ((loss, at) for loss, at in losses if loss is not None and at is not None)
    best, best_step = min(known, default=(None, None))
    source = _text(_section(config, "data").get("source")) or ""
    return Run(
        path=run,
        state=RUNNING if running else _state(state, checkpoints, config),
        ending=_text(record.get("state")),
        problem=problem or ("" if state or config else f"it has no checkpoint and no complete {CONFIG}"),
        text=_text(facts.get("text")) or Path(source).name or source or None,
        parameters=_whole(facts.get("parameters")),
        val_loss=best,
        best_step=best_step,
        step=step,
        total_steps=_whole(state.get("planned_steps")) or _whole(record.get("planned_steps"))
        or _whole(_section(config, "train").get("max_steps")) or None,
        epoch=epochs[-1] if epochs else None,
        seconds=number(last.get("seconds", state.get("seconds"))),
        written=written,
        exports=_exports(run),
        checkpoints=checkpoints,
        config=config,
        changed_settings=_section(state, CHANGED) or flatten(config),
        metrics=metrics,
    )


def is_running(run: Path) -> bool:
    """Whether a trainer holds the lock of this run; False where the file system has no locks.

    Takes the lock as `filelock` does, and releases it at once.
    """
    with suppress(OSError), (run / LOCK).open("rb") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
        except (BlockingIOError, PermissionError):  # the second on Windows
            return True
    return False


def _is_begun(run: Path) -> bool:
    try:
        return any((run / name).exists() for name in (METRICS, CHECKPOINTS, CONFIG, LOCK))
    except OSError:  # `read_run` says why
        return True


def _newest_state(checkpoints: tuple[Path, ...]) -> tuple[dict[str, Any], str]:
    """The state of the newest intact checkpoint, and what is wrong with the newest checkpoint."""
    problem = ""
    for folder in reversed(checkpoints):
        try:
            values = read_state_file(folder)
            if not (folder / WEIGHTS).is_file():
                raise UserError(f"{folder / WEIGHTS} is missing; use another checkpoint")
            return values, problem
        except UserError as error:
            problem = problem or str(error).split(";")[0]
    return {}, problem


def _record(run: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(run / RECORD)
        return record
    except (OSError, ValueError):
        return {}


def _state(state: dict[str, Any], checkpoints: tuple[Path, ...], config: dict[str, Any]) -> str:
    if not state:
        return INTERRUPTED if config and not checkpoints else BROKEN
    patience = _whole(_section(config, "train").get("patience")) or 0
    enough = 0 < patience <= (_whole(state.get("evaluations_since_best")) or 0)
    step, planned = _whole(state.get("step")), _whole(state.get("planned_steps"))
    at_end = step is not None and planned is not None and step >= planned > 0 and state.get("val_loss") is not None
    return FINISHED if at_end or enough else INTERRUPTED


def _exports(run: Path) -> dict[str, str]:
    found = {}
    with suppress(OSError):
        for file in sorted(run.glob(f"*/{MANIFEST_FILE}")):
            with suppress(OSError, ValueError):
                found[file.parent.name] = _text(read_json(file).get("precision")) or "?"
    return found


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 10**12 else None
