"""The export folder is written under a temporary name, then moved into place; nothing else is ever overwritten."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smallm.errors import UserError
from smallm.model_file.manifest import MANIFEST_FILE


def check_replaceable(out: Path, names: Iterable[str]) -> None:
    """Raises `UserError` unless `out` is missing, empty, or an earlier export that holds only files of these names."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_FILE).exists()):
        raise UserError(f"{out} exists and is not a smallm export; choose another --out")
    known = {parent for name in names for parent in (Path(name), *Path(name).parents)}
    found = (path.relative_to(out) for path in sorted(out.rglob("*")))
    if other := next((path for path in found if path not in known), None):
        raise UserError(f"{out} also holds {other.as_posix()}, which would be lost; move it, or choose another --out")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yields a new folder that replaces `out` when the block ends; if the block raises, nothing has changed."""
    base = next(folder for folder in out.parents if folder.exists())
    new, old = (base / f".{out.name}.{os.getpid()}.{suffix}" for suffix in ("new", "old"))
    try:
        new.mkdir()
        yield new
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
