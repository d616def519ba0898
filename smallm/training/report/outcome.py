"""What came of a run: all that its folder tells, read without the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smallm.runs.config_file import flatten, read_config
from smallm.training.analysis.baselines import Baseline, read_baselines
from smallm.training.config import MAX_NUMBER
from smallm.training.report.plot import Curves, curves, distinct_names, read_metrics
from smallm.training.report.record import RunRecord, read_record


@dataclass(frozen=True)
class Outcome:
    """One run."""

    run: Path
    name: str
    curves: Curves
    steps: list[dict[str, Any]]
    """The training records of metrics.jsonl, by step."""
    evaluations: list[dict[str, Any]]
    """Its evaluations, by step."""
    config: dict[str, Any]
    """The settings as `section.field`; empty where config.toml is missing or broken."""
    baselines: list[Baseline]
    """The model's own figure first; empty where they were not measured."""
    record: RunRecord

    @property
    def best(self) -> float:
        """Lowest validation loss, in nats per character; NaN if none was measured."""
        return math.nan if self.curves.best is None else float(self.curves.val["loss"][self.curves.best])

    @property
    def best_step(self) -> int:
        """Where it was measured."""
        return 0 if self.curves.best is None else int(self.curves.val["step"][self.curves.best])

    @cached_property
    def last_step(self) -> int:
        """Steps done, as far as they were logged."""
        return int(max(points["step"][-1] for points in (self.curves.train, self.curves.val) if len(points["step"])))

    @cached_property
    def seconds(self) -> float:
        """That the run took; NaN if it does not say."""
        seconds = column([*self.steps[-1:], *self.evaluations[-1:]], "seconds")
        return float(seconds.max())

    @cached_property
    def characters_per_second(self) -> float:
        """Of text, that training went through: the median of the log; NaN if it does not say."""
        return float(np.median(column(self.steps, "characters_per_second"))) if self.steps else math.nan

    @cached_property
    def samples(self) -> list[tuple[dict[str, Any], str]]:
        """The evaluations with what the model wrote then, where it wrote something."""
        texts = [(row, row.get("sample")) for row in self.evaluations]
        return [(row, text.strip("\n")) for row, text in texts if isinstance(text, str) and text.strip()]


def read_outcomes(runs: Sequence[Path]) -> list[Outcome]:
    """What came of these runs. Raises `UserError` for one without losses; what else it lacks is left out."""
    return [_read(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)]


def number(row: dict[str, Any], key: str) -> float:
    """A figure of a record; NaN if there is none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and -MAX_NUMBER <= value <= MAX_NUMBER else math.nan


def column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """That figure of each record, (n,)."""
    return np.array([number(row, key) for row in rows])


def _read(run: Path, name: str) -> Outcome:
    records = read_metrics(run)
    latest = {(row["kind"], float(row["step"])): row for row in records}  # a resumed run logs some steps again
    rows = [latest[place] for place in sorted(latest)]
    steps, evaluations = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    known, baselines = curves(name, records), read_baselines(run)
    if known.best is not None:  # since the file was written the run may have gone on
        bits = float(known.val["loss"][known.best]) / math.log(2)
        baselines = [replace(one, bits_per_char=bits) if one.name == "model" else one for one in baselines]
    return Outcome(run, name, known, steps, evaluations, flatten(read_config(run)), baselines, read_record(run))
