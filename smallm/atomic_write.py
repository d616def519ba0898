"""Writes and renames files so that a reader, or a crash, never meets half of one; the same on POSIX and Windows."""

import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path

WINDOWS = sys.platform == "win32"
WINDOWS_WAITS = (0.01, 0.03, 0.1, 0.3, 1.0)  # seconds between attempts to rename what another program has open


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a file beside `path` and renames it, so that `path` holds either its old content or all of the new one.

    path: its folder must exist.
    content: bytes, or text that is written as UTF-8 with its line ends unchanged.
    Raises `OSError`; the old content then remains, and the unfinished file is removed.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        rename(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def rename(path: Path, target: Path) -> None:
    """Renames a file or a folder; a file at `target` is replaced.

    Windows refuses this while another program, such as a virus scanner, has one of the files open; smallm then tries
    again for about 1.5 seconds. Raises `OSError`.
    """
    for seconds in WINDOWS_WAITS if WINDOWS else ():
        with suppress(PermissionError):
            path.replace(target)
            return
        time.sleep(seconds)
    path.replace(target)


def sync(path: Path) -> None:
    """Has the system write a file, or the entries of a folder, to the disk. Raises `OSError`.

    Windows does this only for files that are open for writing, and not for folders, which are left out there.
    """
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
