"""`training_state.json`: the state of training at a checkpoint, with a checksum; read here without PyTorch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallm.errors import UserError

STATE_FILE = "training_state.json"
FORMAT_VERSION = 2
CHECKSUM, OLD_CHECKSUM = "checksum", "seal"  # keys in the file; the old key is still read
CHANGED = "changed_settings"  # key of the settings that differ from their defaults, for readers without PyTorch
MAX_BYTES = 8 << 20  # of a JSON file; a tokenizer.json of 60,000 characters has 2.5 MB
MAX_DEPTH = 32  # levels of nested JSON; our files have four


def read_state_file(folder: Path) -> dict[str, Any]:
    """The values in the state file of a checkpoint, without the checksum. Raises `UserError` if they were altered."""
    file = folder / STATE_FILE
    try:
        values: dict[str, Any] = read_json(file)
        version = values["format_version"]
        expected = values.pop(CHECKSUM if CHECKSUM in values else OLD_CHECKSUM)
    except (OSError, ValueError, KeyError):
        raise UserError(f"{file} is missing or broken; use another checkpoint") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} was written by another version of smallm; train again, or use that version")
    if expected != checksum(values):
        raise UserError(f"{file} does not match its checksum; use another checkpoint")
    return values


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of the values of a state file; detects damage, protects against nobody."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_json(file: Path, kind: type = dict) -> Any:
    """A JSON object, or a value of another `kind`. Raises `ValueError` for any other content, or `OSError`."""
    if file.stat().st_size > MAX_BYTES:
        raise ValueError("larger than 8 MB")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # JSON can spell lone surrogates, which are not valid text
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, kind) or _is_deeper(content, MAX_DEPTH):
        raise ValueError("not a JSON object, or nested too deeply")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return not levels or any(_is_deeper(value, levels - 1) for value in values)
