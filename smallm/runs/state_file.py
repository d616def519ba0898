"""`training_state.json`: where a run stood at a checkpoint, under a seal. Read here without PyTorch too."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallm.errors import UserError

STATE_FILE = "training_state.json"
FORMAT_VERSION = 2
DEEPEST = 32  # levels of JSON; ours have four


def read_sealed(folder: Path) -> dict[str, Any]:
    """What the state file of a checkpoint holds, if it is as it was written. Raises `UserError`."""
    file = folder / STATE_FILE
    try:
        values = read_json(file)
        version, sealed = values["format_version"], values["seal"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{file} is missing or broken; use another checkpoint") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} was written by another version of smallm; train anew, or use that version")
    if sealed != seal({key: value for key, value in values.items() if key != "seal"}):
        raise UserError(f"{file} is not as it was written; use another checkpoint")
    return values


def seal(values: Mapping[str, Any]) -> str:
    """sha256 of what the state file says, however it is set out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for anything else, `OSError` if there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # halves of characters, which JSON can spell, are no text
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict) or _deeper(content, DEEPEST):
        raise ValueError("it is no JSON object, or one that is nested too deep")
    return content


def _deeper(content: Any, levels: int) -> bool:
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return not levels or any(_deeper(value, levels - 1) for value in values)
