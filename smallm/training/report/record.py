"""What a run keeps for its report, besides its metrics: `report.json`, written while it trains.

So the report can be made at any time without the weights and the text, also of a run that was killed.
"""

import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from smallm.errors import UserError
from smallm.training.config import MAX_NUMBER, check_types

FILE = "report.json"
VERSION = 1


@dataclass(frozen=True)
class Passage:
    """A piece of the validation text as the model read it; n characters, K expected ones each."""

    step: int = 0
    """Of the model."""
    text: str = ""
    nats: list[float] = field(default_factory=list)
    """(n,)"""
    expected: list[str] = field(default_factory=list)
    """(n,) texts of K characters: those that it held likeliest, the likeliest first."""
    probabilities: list[list[float]] = field(default_factory=list)
    """(n, K) of them."""

    def __post_init__(self) -> None:
        check_types(self)
        lengths = {len(self.text), len(self.nats), len(self.expected), len(self.probabilities)}
        widths = {len(row) for row in [*self.expected, *self.probabilities]}
        if len(lengths) > 1 or len(widths) > 1 or not all(isinstance(row, str) for row in self.expected):
            raise UserError("a passage is not whole")
        shares = chain(*self.probabilities)
        if not all(0 <= value <= MAX_NUMBER for value in self.nats) or not all(0 <= share <= 1 for share in shares):
            raise UserError("a passage has a figure that is none")


@dataclass(frozen=True)
class Record:
    """What is known of a run; empty where nothing was kept."""

    state: str = ""
    """`training`, until the run says how it ended: `finished`, `out of patience` or `interrupted`."""
    planned_steps: int = 0
    began: str = ""
    """When."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Text, parameters, device, versions."""
    train_characters: int = 0
    val_characters: int = 0
    findings: list[str] = field(default_factory=list)
    """What the text doctor says, a line each."""
    copies: list[list[str]] = field(default_factory=list)
    """What of the last samples stands in the training text, what of the validation text does: a row for each figure."""
    passage: Passage = field(default_factory=Passage)

    def __post_init__(self) -> None:
        check_types(self)
        if not all(isinstance(line, str) for line in [*self.findings, *chain(*self.copies)]):
            raise UserError("a line is none")
        if not all(isinstance(value, str | int | float) for value in self.facts.values()):
            raise UserError("a fact is none")


class Keeper:
    """Keeps the record of a run as it trains: for each part that is new the file is written anew, as a whole."""

    def __init__(self, run: Path, say: Callable[[str], None], going_on: bool, enabled: bool = True):
        """going_on: with what the run has kept before. Where not enabled, or cannot write, it keeps nothing."""
        self._file, self._say, self._enabled = run / FILE, say, enabled
        self._record = read_record(run) if going_on else Record()

    def keep(self, **parts: Any) -> None:
        """Adds to the record, or replaces in it."""
        if not self._enabled:
            return
        self._record = replace(self._record, **parts)
        aside = self._file.with_name(f".{FILE}")
        try:
            values = {"version": VERSION, **vars(self._record), "passage": vars(self._record.passage)}
            text = json.dumps(values)
            aside.write_text(text + "\n", encoding="utf-8")
            aside.replace(self._file)
        except OSError as error:
            self._enabled = False
            with suppress(OSError):
                aside.unlink()
            self._say(f"warning: cannot write {self._file} ({error.strerror}); the report will lack what it would hold")


def read_record(run: Path) -> Record:
    """What a run has kept; an empty record if there is none, or one that is broken or of another version."""
    try:
        values = json.loads((run / FILE).read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return Record()
        return Record(**values | {"passage": Passage(**values.get("passage", {}))})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError):
        return Record()


def machine_facts() -> dict[str, str | int]:
    """Processor, its number of cores that we may use, and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": _processor(), "cores": cores or 0, "system": f"{platform.system()} {platform.release()}"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
