"""Where encoded texts, what is known of them, and compiled kernels are kept from one run to the next."""

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """$SMALLM_CACHE, or the user's cache folder."""
    if folder := os.environ.get("SMALLM_CACHE"):
        return Path(folder)
    import pooch

    return Path(pooch.os_cache("smallm"))


def remembered(file: Path, version: int, compute: Callable[[], dict]) -> dict:
    """What `compute` returned the last time, kept in this file; a cache that is read-only is done without."""
    values = recalled(file, version)
    if values is None:
        values = compute()
        with suppress(OSError):
            unfinished = file.with_suffix(f".{secrets.token_hex(4)}")
            unfinished.write_text(json.dumps({"version": version, "values": values}), encoding="utf-8")
            unfinished.replace(file)
    return values


def recalled(file: Path, version: int) -> dict | None:
    """What is kept in this file, if it is of this version."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return known["values"] if known["version"] == version else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
