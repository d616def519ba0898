"""Output folders: written under a temporary name, then moved into place; nothing else is ever overwritten."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smallm.errors import UserError
from smallm.model_file.manifest import MANIFEST_FILE


def check_replaceable(out: Path, names: Iterable[str], kind: str) -> None:
    """Raises `UserError` unless `out` is missing, empty, or an earlier output that may be replaced.

    Args:
        out: The folder that will be written.
        names: Relative paths of the files and folders that such an output may hold; a folder includes its content.
        kind: What such an output is called in the message.
    """
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_FILE).exists()):
        raise UserError(f"{out} exists and is not a {kind}; choose another --out")
    known = [Path(name) for name in names]
    folders = {folder for path in known for folder in path.parents}
    found = (path.relative_to(out) for path in out.rglob("*"))
    others = [path for path in found if path not in folders and not {path, *path.parents} & set(known)]
    if others:
        first = min(path.as_posix() for path in others)
        raise UserError(f"{out} also holds {first}, which would be lost; move it, or choose another --out")


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
