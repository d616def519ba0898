"""Writes small files so that a reader, or a crash, never meets half of one."""

import secrets
from contextlib import suppress
from pathlib import Path


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a file beside `path` and renames it, so that `path` holds either its old content or all of the new one.

    path: its folder must exist.
    content: bytes, or text that is written as UTF-8 with its line ends unchanged.
    Raises `OSError`; the old content then remains, and the unfinished file is removed.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
