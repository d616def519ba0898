"""What a run folder tells of its run: read without PyTorch, and without reading more than the end of its metrics.

Run folders come from strangers too, and from runs that were killed: what is missing, broken or implausible is None.
"""

import json
import math
import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smallm.errors import UserError
from smallm.model_file.manifest import MANIFEST_FILE
from smallm.runs.layout import CHECKPOINTS, CONFIG, LOCK, METRICS
from smallm.runs.state_file import read_json, read_sealed

TAIL_BYTES = 1 << 16  # of the metrics
WEIGHTS = "model.safetensors"
RUNNING, FINISHED, INTERRUPTED, BROKEN = "running", "finished", "interrupted", "broken"


@dataclass(frozen=True)
class RunFacts:
    """A run, as far as its folder tells."""

    path: Path
    state: str
    """running, finished, interrupted (it can be resumed) or broken."""
    problem: str
    """What is wrong, in a few words; nothing if all is well."""
    text: str | None
    parameters: int | None
    val_loss: float | None
    """The best, in nats per character."""
    best_step: int | None
    step: int | None
    total_steps: int | None
    """Of the whole run; under train.minutes as they were expected last."""
    epoch: float | None
    seconds: float | None
    written: float
    """When the folder was last written to, in seconds since 1970."""
    exports: dict[str, str]
    """Folder in the run -> precision."""
    checkpoints: tuple[Path, ...]
    """Oldest first."""
    config: dict[str, Any]
    """The settings by section, if they can be read."""
    metrics: tuple[dict[str, Any], ...]
    """The last lines of metrics.jsonl."""

    @property
    def bits_per_character(self) -> float | None:
        """The best validation loss, in bits."""
        return None if self.val_loss is None else self.val_loss / math.log(2)

    @property
    def best_checkpoint(self) -> Path | None:
        """That of the best evaluation, if it is there."""
        return next((folder for folder in self.checkpoints if step_of(folder) == self.best_step), None)


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder, or the one that it is itself."""
    if _is_begun(folder):
        return [folder]
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and _is_begun(path))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; name a folder of runs") from None


def read_run(run: Path, tail_bytes: int = TAIL_BYTES) -> RunFacts:
    """All that there is to know of a run. tail_bytes: how much of the end of its metrics to read."""
    checkpoints = _checkpoints(run)
    state, problem = _newest_state(checkpoints)
    config = state.get("config") or _config(run)
    config = {name: section for name, section in config.items() if isinstance(section, dict)}
    metrics = _tail(run / METRICS, tail_bytes)
    running = is_running(run)
    last = next((line for line in reversed(metrics) if line.get("kind") == "train"), {}) if running or not state else {}
    facts = _section(state, "facts")
    step = _whole(last.get("step", state.get("step")))
    epochs = [line["epoch"] for line in metrics if _whole(line.get("step")) == step and _number(line.get("epoch"))]
    best, best_step = _best(state, metrics if running or not state else ())
    return RunFacts(
        path=run,
        state=RUNNING if running else _state(state, checkpoints, config),
        problem=problem or ("" if state or config else f"it has no checkpoint and no whole {CONFIG}"),
        text=_text(facts.get("text")) or _source(config),
        parameters=_whole(facts.get("parameters")),
        val_loss=best,
        best_step=best_step,
        step=step,
        total_steps=_whole(state.get("planned_steps")) or _whole(_section(config, "train").get("max_steps")) or None,
        epoch=epochs[-1] if epochs else None,
        seconds=_number(last.get("seconds", state.get("seconds"))),
        written=_written(run),
        exports=_exports(run),
        checkpoints=checkpoints,
        config=config,
        metrics=metrics,
    )


def is_running(run: Path) -> bool:
    """Whether a trainer holds the lock of this run; never so where the system has no locks of this kind."""
    try:
        import fcntl

        with (run / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # gone with the file, in a moment
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(checkpoint.name.removeprefix("step-"))


def bytes_in(folder: Path) -> int:
    """The size of all files below a folder."""
    total = 0
    with suppress(OSError):
        for file in folder.rglob("*"):
            total += file.lstat().st_size if file.is_file() and not file.is_symlink() else 0
    return total


def _is_begun(run: Path) -> bool:
    return any((run / name).exists() for name in (METRICS, CHECKPOINTS, CONFIG, LOCK))


def _checkpoints(run: Path) -> tuple[Path, ...]:
    found = [folder for folder in (run / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d{6,15}", folder.name)]
    return tuple(sorted(found, key=step_of))


def _newest_state(checkpoints: tuple[Path, ...]) -> tuple[dict[str, Any], str]:
    """What the newest readable checkpoint says, and what is wrong with the one that a resumed run would want."""
    problem = ""
    for folder in reversed(checkpoints):
        try:
            values = read_sealed(folder)
            if not (folder / WEIGHTS).is_file():
                raise UserError(f"{folder / WEIGHTS} is missing; use another checkpoint")
            return values, problem
        except UserError as error:
            problem = problem or str(error).split(";")[0]
    return {}, problem


def _state(state: dict[str, Any], checkpoints: tuple[Path, ...], config: dict[str, Any]) -> str:
    if not state:
        return INTERRUPTED if config and not checkpoints else BROKEN
    patience = _whole(_section(config, "train").get("patience")) or 0
    enough = 0 < patience <= (_whole(state.get("evaluations_since_best")) or 0)
    step, planned = _whole(state.get("step")), _whole(state.get("planned_steps"))
    at_end = step is not None and planned is not None and step >= planned > 0 and state.get("val_loss") is not None
    return FINISHED if at_end or enough else INTERRUPTED


def _best(state: dict[str, Any], metrics: tuple[dict[str, Any], ...]) -> tuple[float | None, int | None]:
    losses = [(_number(state.get("best_val_loss")), _whole(state.get("best_step")))]
    losses += [(_number(line.get("val_loss")), _whole(line.get("step"))) for line in metrics]
    return min(((loss, step) for loss, step in losses if loss is not None and step is not None), default=(None, None))


def _tail(file: Path, size: int) -> tuple[dict[str, Any], ...]:
    """The last lines of JSON Lines; those that are none, as after a kill, are left out."""
    try:
        if not file.is_file():
            return ()
        with file.open("rb") as stream:
            start = max(0, stream.seek(0, 2) - size)
            stream.seek(start)
            lines = stream.read(size).split(b"\n")[1 if start else 0 :]
    except OSError:
        return ()
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            found += [values] if isinstance(values, dict) else []
    return tuple(found)


def _config(run: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _exports(run: Path) -> dict[str, str]:
    found = {}
    with suppress(OSError):
        for file in sorted(run.glob(f"*/{MANIFEST_FILE}")):
            with suppress(OSError, ValueError):
                found[file.parent.name] = _text(read_json(file).get("precision")) or "?"
    return found


def _written(run: Path) -> float:
    times = [0.0]
    for file in (run, run / METRICS, run / CHECKPOINTS):
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)


def _source(config: dict[str, Any]) -> str | None:
    source = _text(_section(config, "data").get("source"))
    return source and (Path(source).name or source)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < 1e12 else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 10**12 else None
