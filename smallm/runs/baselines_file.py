"""`baselines.json` of a run: bits per character of its best checkpoint, of compressors and of an n-gram model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from smallm.runs.state_file import read_json

FILE, OLD_FILE = "baselines.json", "yardsticks.json"  # the old name is only read
MAX_BITS = 1e6


@dataclass(frozen=True)
class Baseline:
    """A predictor of text and its result."""

    name: str
    bits_per_char: float
    how: str
    """What the predictor learned from and was measured on."""


def write_baselines(run: Path, baselines: list[Baseline], bits_per_char: float, characters: int) -> None:
    """Writes the file into a run folder: the model's best result, over so many characters, then the baselines.

    Raises `OSError`.
    """
    how = f"the best checkpoint, on the whole validation text, {characters:,} characters"
    model = Baseline("model", bits_per_char, how)
    (run / FILE).write_text(json.dumps([asdict(one) for one in (model, *baselines)], indent=1) + "\n", encoding="utf-8")


def read_baselines(run: Path) -> list[Baseline]:
    """Reads the file of a run; an empty list if the file is missing or damaged."""
    file = run / FILE if (run / FILE).exists() else run / OLD_FILE
    try:
        found = [Baseline(**one) for one in read_json(file, list)]
        valid = all(isinstance(one.name, str) and isinstance(one.how, str) and 0 <= one.bits_per_char < MAX_BITS
                    for one in found)  # fmt: skip
        return found if valid else []
    except (OSError, ValueError, TypeError):
        return []
