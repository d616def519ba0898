"""`report.json`: what a run stores for its report besides its metrics, updated while the run trains.

With this file the report can be written at any time without the weights and the text, even for a run that was killed.
"""

import json
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from smallm.atomic_write import atomic_write
from smallm.errors import UserError
from smallm.inference.processors import usable_processors
from smallm.runs.layout import RECORD
from smallm.training.config import MAX_NUMBER, check_types

VERSION = 1
OLD_FIELDS = {"copies": "memorisation"}  # names in files of earlier versions


@dataclass(frozen=True)
class Passage:
    """A passage of the validation text with the model's predictions: n characters, K likeliest candidates for each."""

    step: int = 0
    """Step of the model that predicted."""
    text: str = ""
    """The n characters."""
    nats: list[float] = field(default_factory=list)
    """(n,), the surprisal of each character in nats."""
    expected: list[str] = field(default_factory=list)
    """(n,), for each position a string of the K likeliest characters, likeliest first."""
    probabilities: list[list[float]] = field(default_factory=list)
    """(n, K), the probabilities of the characters in `expected`."""

    def __post_init__(self) -> None:
        check_types(self)
        lengths = {len(self.text), len(self.nats), len(self.expected), len(self.probabilities)}
        widths = {len(row) for row in [*self.expected, *self.probabilities]}
        if len(lengths) > 1 or len(widths) > 1 or not all(isinstance(row, str) for row in self.expected):
            raise UserError("a passage is incomplete")
        probabilities = chain(*self.probabilities)
        if not all(0 <= nats <= MAX_NUMBER for nats in self.nats) or not all(0 <= p <= 1 for p in probabilities):
            raise UserError("a passage holds a number that is out of range")


@dataclass(frozen=True)
class RunRecord:
    """What `report.json` holds. Fields keep their defaults where nothing was stored."""

    state: str = ""
    """How the run ended: `finished`, `out of patience` or `interrupted`; `training` before that."""
    planned_steps: int = 0
    began: str = ""
    """Date and time of the first step, in UTC."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Text, parameters, device, versions: name -> string or number."""
    train_characters: int = 0
    val_characters: int = 0
    findings: list[str] = field(default_factory=list)
    """The lines of the text check."""
    memorisation: list[list[str]] = field(default_factory=list)
    """Rows of a table: name of a figure, its value for the last samples, its value for the validation text."""
    passage: Passage = field(default_factory=Passage)

    def __post_init__(self) -> None:
        check_types(self)
        if not all(isinstance(line, str) for line in [*self.findings, *chain(*self.memorisation)]):
            raise UserError("a line is not a string")
        if not all(isinstance(value, str | int | float) for value in self.facts.values()):
            raise UserError("a fact is neither a string nor a number")


class RecordWriter:
    """Stores the record of a run while it trains; each update replaces the whole file.

    run: the run folder.
    warn: called with one line, once, if the file cannot be written; after that nothing more is stored.
    resumed: start from the record that the folder holds; otherwise from an empty one.
    enabled: False on all ranks but the first, which then store nothing.
    """

    def __init__(self, run: Path, warn: Callable[[str], None], resumed: bool, enabled: bool = True):
        self._file, self._warn, self._enabled = run / RECORD, warn, enabled
        self._record = read_record(run) if resumed else RunRecord()

    def update(self, **fields: Any) -> None:
        """Sets fields of the `RunRecord` and writes the file."""
        if not self._enabled:
            return
        self._record = replace(self._record, **fields)
        try:
            values = {"version": VERSION, **vars(self._record), "passage": vars(self._record.passage)}
            atomic_write(self._file, json.dumps(values) + "\n")
        except OSError as error:
            self._enabled = False
            self._warn(f"warning: cannot write {self._file} ({error.strerror}); the report will be incomplete")


def read_record(run: Path) -> RunRecord:
    """The record of a run; an empty one if the file is missing, broken or of another version."""
    try:
        values = json.loads((run / RECORD).read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return RunRecord()
        values = {OLD_FIELDS.get(name, name): value for name, value in values.items()}
        return RunRecord(**values | {"passage": Passage(**values.get("passage", {}))})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError):
        return RunRecord()


def machine_facts() -> dict[str, str | int]:
    """Name of the processor, number of cores that this process may use, and operating system."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    system = f"{platform.system()} {platform.release()}"
    return {"processor": processor, "cores": usable_processors(), "system": system}
