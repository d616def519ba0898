"""`baselines.json` of a run: bits per character of its best checkpoint, of compressors and of an n-gram model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE, OLD_FILE = "baselines.json", "yardsticks.json"  # the old name is only read
MAX_BYTES = 1 << 16
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
        if file.stat().st_size > MAX_BYTES:
            return []
        found = [Baseline(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
        return found if all(map(_is_valid, found)) else []
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def _is_valid(one: Baseline) -> bool:
    if type(one.bits_per_char) not in (int, float) or not 0 <= one.bits_per_char < MAX_BITS:  # NaN fails, too
        return False
    texts = (one.name, one.how)
    return all(isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text) for text in texts)
