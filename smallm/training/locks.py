"""Locks between processes."""

from pathlib import Path

from filelock import FileLock


def file_lock(path: Path) -> FileLock:
    """A lock that the system releases when its process ends, also by SIGKILL.

    Where the file system has no locks, `acquire` raises NotImplementedError. Newer versions of filelock would create a
    file that counts as a lock instead, and a killed process would leave that file behind.
    """
    try:
        return FileLock(path, fallback_to_soft=False)
    except TypeError:  # an older version of filelock, which has no such files
        return FileLock(path)
