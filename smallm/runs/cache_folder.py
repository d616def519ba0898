"""The folder of everything that runs and models share on this machine: encoded texts, statistics, compiled C."""

import os
import platform
from pathlib import Path

from smallm.errors import UserError


def cache_folder() -> Path:
    """The folder named by the environment variable SMALLM_CACHE; without it, `smallm` in the user's cache folder.

    Raises `UserError` if there is no such folder.
    """
    folder = os.environ.get("SMALLM_CACHE")
    try:
        if folder:
            return Path(folder).expanduser()
        system, home = platform.system(), Path.home()
        if system == "Windows":
            return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local", "smallm", "smallm", "Cache")
        if system == "Darwin":
            return home / "Library" / "Caches" / "smallm"
        return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or home / ".cache", "smallm")
    except (RuntimeError, KeyError):  # neither HOME nor an entry in the list of users
        missing = f"SMALLM_CACHE={folder}: there is no such home folder" if folder else "this user has no home folder"
        raise UserError(f"{missing}; set SMALLM_CACHE to a folder for the cache") from None
