"""The history of a run: everything that its folder tells about it, read without the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smallm.cli.table import shortened
from smallm.errors import UserError
from smallm.runs import metrics
from smallm.runs.baselines_file import Baseline, read_baselines
from smallm.runs.config_file import flatten, read_config
from smallm.runs.layout import METRICS
from smallm.runs.metrics import Record, read_metrics
from smallm.training.report.record import RunRecord, read_record

KINDS = "train", "eval"  # of the records that are read
MAX_NAME = 54  # columns of a run's name that are shown


@dataclass(frozen=True)
class RunHistory:
    """What the folder of one run holds. Losses are in nats per character."""

    run: Path
    """The run folder."""
    name: str
    """What the run is called beside other runs."""
    train: dict[str, np.ndarray]
    """Columns of n training records in order of the step, NaN where a value is missing: `step`, `epoch`, `loss`,
    `learning_rate`, `seconds`, `characters` (of text seen so far), `characters_per_second`, `mfu`, `memory_bytes` and
    `member` (of an ensemble, from 1; NaN without one), each (n,)."""
    val: dict[str, np.ndarray]
    """Columns of m evaluations: `step`, `epoch`, `loss`, `seconds`, `characters` and `member`, each (m,)."""
    evaluations: list[Record]
    """The records of the m evaluations."""
    config: dict[str, Any]
    """Settings as `section.field`; empty if config.toml is missing or broken."""
    baselines: list[Baseline]
    """The model first, then the compressors and the n-gram model; empty if they were not measured."""
    record: RunRecord
    """The content of report.json."""

    @cached_property
    def best_index(self) -> int | None:
        """Index into `val` of the lowest loss, of an ensemble that of its latest model; None if none was measured."""
        loss, member = self.val["loss"], self.val["member"]
        loss = np.where(member < np.nanmax(member), np.nan, loss) if np.isfinite(member).any() else loss
        return int(np.nanargmin(loss)) if np.isfinite(loss).any() else None

    @property
    def best_loss(self) -> float:
        """Lowest validation loss; NaN if none was measured."""
        return math.nan if self.best_index is None else float(self.val["loss"][self.best_index])

    @property
    def best_step(self) -> int:
        """Step of the lowest validation loss; 0 if none was measured."""
        return 0 if self.best_index is None else int(self.val["step"][self.best_index])

    @property
    def last_step(self) -> int:
        """The highest step that was logged."""
        return int(max(*self.train["step"][-1:], *self.val["step"][-1:], 0))

    @property
    def seconds(self) -> float:
        """Duration of the run; NaN if unknown."""
        last = np.array([*self.train["seconds"][-1:], *self.val["seconds"][-1:]])
        return float(np.nanmax(last)) if np.isfinite(last).any() else math.nan

    @property
    def characters_per_second(self) -> float:
        """Training speed, the median over the log; NaN if unknown."""
        speeds = self.train["characters_per_second"]
        return float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else math.nan

    @property
    def samples(self) -> list[tuple[Record, str]]:
        """The evaluations for which the model wrote a sample, each with the sample."""
        texts = [(row, row.get("sample")) for row in self.evaluations]
        return [(row, text.strip("\n")) for row, text in texts if isinstance(text, str) and text.strip()]


def read_histories(runs: Sequence[Path]) -> list[RunHistory]:
    """Reads run folders. Raises `UserError` for a run without losses; what is missing or broken is left out."""
    return [_read(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)]


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """Names for runs: the name of the folder, after the name of its parent if two folders are called the same."""
    paths = [Path(run).resolve() for run in runs]
    names = [path.name for path in paths]
    names = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    return [shortened(name, MAX_NAME) for name in names]


def number(row: Record, key: str) -> float:
    """A number of a record; NaN if the number is missing or out of range."""
    value = metrics.number(row.get(key))
    return math.nan if value is None else value


def _read(run: Path, name: str) -> RunHistory:
    rows, record = read_metrics(run), read_record(run)
    rows = [row for row in rows if row.get("kind") in KINDS and math.isfinite(number(row, "step"))]
    latest = {(row["kind"], number(row, "step")): row for row in rows}  # a resumed run logs some steps again
    by_step = [latest[key] for key in sorted(latest)]
    if not any(math.isfinite(number(row, key)) for row in by_step for key in ("loss", "train_loss", "val_loss")):
        raise UserError(f"{run / METRICS} holds no loss: give the folder of a run that has made its first steps")
    evaluations = [row for row in by_step if row["kind"] == "eval"]
    train = [row for row in by_step if row["kind"] == "train"]
    if not train:  # a run shorter than its logging interval still has the mean training loss of its evaluations
        train = [{key: row.get(key) for key in ("step", "epoch", "seconds")} | {"loss": row.get("train_loss")}
                 for row in evaluations]  # fmt: skip
    history = RunHistory(
        run,
        name,
        train=_columns(train, record, "loss", "learning_rate", "characters_per_second", "mfu", "memory_bytes",
                       "member"),
        val=_columns([row | {"loss": row.get("val_loss")} for row in evaluations], record, "loss", "member"),
        evaluations=evaluations,
        config=flatten(read_config(run)),
        baselines=read_baselines(run),
        record=record,
    )
    if history.best_index is None:
        return history
    bits = history.best_loss / math.log(2)  # the run may have gone on since the baselines were written
    baselines = [replace(one, bits_per_char=bits) if one.name == "model" else one for one in history.baselines]
    return replace(history, baselines=baselines)


def _columns(rows: Sequence[Record], record: RunRecord, *keys: str) -> dict[str, np.ndarray]:
    """Columns (n,) of n records: step, epoch, seconds, characters, and `keys`."""
    columns = {key: np.array([number(row, key) for row in rows]) for key in ("step", "epoch", "seconds", *keys)}
    return columns | {"characters": columns["epoch"] * (record.train_characters or math.nan)}
