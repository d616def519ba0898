"""From a run to a written export folder or kit: the work behind `export.py` and `smallm.export`."""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from smallm.errors import UserError
from smallm.export.folder import Export, export_checkpoint
from smallm.export.kits import WRITERS, write_kit
from smallm.export.precision import PRECISIONS
from smallm.options import as_path
from smallm.runs.layout import CHECKPOINTS, EXPORT, check_path, newest_run, out_folder
from smallm.runs.state_file import STATE_FILE
from smallm.training.checkpoint.format import verify
from smallm.training.checkpoint.manager import best_checkpoint


@dataclass(frozen=True)
class Exported:
    """What `export_run` wrote."""

    path: Path
    """The export folder or the kit."""
    checkpoint: Path
    """The checkpoint that was exported."""
    export: Export


def export_run(
    run: str | os.PathLike[str] | None = None,
    *,
    precision: str = "fp32",
    kit: str | None = None,
    out: str | os.PathLike[str] | None = None,
    allow_loss: bool = False,
    gguf: bool = False,
    portable: bool = False,
) -> Exported:
    """Writes the export folder or the kit of a run; for the options and errors see `smallm.export`."""
    run = None if run is None else as_path("run", run)
    out = None if out is None else as_path("out", out)
    check_options(precision, kit, gguf, portable)
    run = newest_run() if run is None else run
    check_path(run)
    checkpoint = _checkpoint_of(run)
    path = out_folder(out) if out is not None else _default_folder(run, checkpoint, kit)
    if kit is None:
        export = export_checkpoint(checkpoint, path, precision, allow_loss, gguf, portable)
    else:
        with TemporaryDirectory(prefix="smallm-") as folder:
            export = export_checkpoint(checkpoint, Path(folder) / EXPORT, precision, allow_loss)
            write_kit(kit, Path(folder) / EXPORT, path)
    return Exported(path, checkpoint, export)


def check_options(precision: str, kit: str | None, gguf: bool, portable: bool) -> None:
    """Raises `UserError` for options that do not exist or exclude each other."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; use one of: {', '.join(PRECISIONS)}")
    if kit is not None and (not isinstance(kit, str) or kit not in WRITERS):
        raise UserError(f"unknown kit {kit!r}; use one of: {', '.join(WRITERS)}")
    if kit and (gguf or portable):
        raise UserError("a kit holds neither a GGUF file nor the portable model; leave out one or the other")


def _checkpoint_of(run: Path) -> Path:
    """The checkpoint that `run` is, or the best one of the run. Raises `UserError` if the checkpoint is damaged."""
    try:
        if not (run / STATE_FILE).is_file():
            return best_checkpoint(run)
        if problem := verify(run):
            raise UserError(f"{run} is damaged ({problem}); export another checkpoint")
        return run
    except OSError as error:
        raise UserError(f"cannot read {run}: {error.strerror}") from None


def _default_folder(run: Path, checkpoint: Path, kit: str | None) -> Path:
    is_in_run = checkpoint == run and run.parent.name == CHECKPOINTS
    return (run.parent.parent if is_in_run else run) / (f"kit-{kit}" if kit else EXPORT)
