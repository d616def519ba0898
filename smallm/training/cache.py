"""The cache on disk that runs share: encoded texts, statistics of texts, compiled kernels."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from smallm.atomic_write import atomic_write
from smallm.errors import UserError


def cache_folder() -> Path:
    """The folder named by the environment variable SMALLM_CACHE; without it, `smallm` in the user's cache folder.

    Raises `UserError` if there is no such folder.
    """
    folder = os.environ.get("SMALLM_CACHE")
    try:
        if folder:
            return Path(folder).expanduser()
        import pooch

        return Path(pooch.os_cache("smallm"))
    except (RuntimeError, KeyError):  # neither HOME nor an entry in the list of users
        missing = f"SMALLM_CACHE={folder}: there is no such home folder" if folder else "this user has no home folder"
        raise UserError(f"{missing}; set SMALLM_CACHE to a folder for the cache") from None


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


def digest(values: Any) -> str:
    """SHA-256 of the values as JSON, in hex."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
