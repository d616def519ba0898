"""Where encoded texts and compiled kernels are kept from one run to the next."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SMALLM_CACHE, or the user's cache folder."""
    if folder := os.environ.get("SMALLM_CACHE"):
        return Path(folder)
    import pooch

    return Path(pooch.os_cache("smallm"))
