"""Values in the cache folder: JSON files with a version and a checksum."""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from smallm.atomic_write import atomic_write


def cached_json(file: Path, version: int, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The values in `file` if they are of this `version`; otherwise the result of `compute()`, written to `file`.

    A file that cannot be written is no error: the values are computed again the next time.
    """
    values = read_cached_json(file, version)
    if values is None:
        values = compute()
        with suppress(OSError):
            write_json(file, {"version": version, "values": values})
    return values


def read_cached_json(file: Path, version: int) -> dict[str, Any] | None:
    """The values that `cached_json` wrote, or None if the file is missing, damaged or of another version."""
    content = read_json(file)
    return content["values"] if content and content["version"] == version else None


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Writes the values with their checksum, for `read_json`. Raises `OSError`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps({"values": values, "checksum": digest(values)}))


def read_json(file: Path) -> dict[str, Any] | None:
    """The values that `write_json` wrote, or None if the file is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["values"] if content["checksum"] == digest(content["values"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def unfinished_file(folder: Path) -> Iterator[Path]:
    """The path of a new file in the folder, to be written and then renamed; a file that keeps the name is deleted."""
    file = folder / secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield file
    finally:
        file.unlink(missing_ok=True)


def digest(values: Any) -> str:
    """SHA-256 of the values as JSON, in hex."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
