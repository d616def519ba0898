"""The cache of texts on disk: surveys, found by the files they were made of, and ids, found by text and vocabulary.

The ids of a text lie in a folder that either is complete or does not exist, also after a crash. One process at a time
writes a folder. A text that several runs split differently is stored once, as long as the vocabulary is the same.
"""

import hashlib
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from smallm.atomic_write import sync
from smallm.training.cache import digest, read_json, write_json
from smallm.training.data.source import Source
from smallm.training.locks import file_lock
from smallm.training.output import Output

INDEX_FORMAT = 6  # raise when surveys change their meaning
IDS_FORMAT = 2  # raise when the stored files, or the ids that a `Vocabulary` gives, change their meaning
IDS, FACTS = "ids.bin", "corpus.json"
UNFINISHED = ".unfinished"
CHECKED_BYTES = 32 << 20  # ids up to this size are compared with their checksum whenever they are opened
PATIENCE_SECONDS = 3600.0  # how long to wait for another process that encodes the same text
SETTLED_SECONDS = 2.0  # the coarsest clock of a file system: a second change within one tick leaves no trace
RESIDENT_BYTES = 64 << 20  # how much of a mapped file may count as memory of this process
PAGE_BYTES = 2 << 20  # the largest page of the system's cache; reading one id may map all of it

Stamps = list[list[Any]]
Marks = list[list[int]]
"""[characters, ids] up to some points of a text, from [0, 0] on."""


# -- ids in a file


class MappedIds:
    """Ids in a file, (N,), read-only. Indexing with a slice, or an array of positions, returns a copy of those ids.

    Pages of a memory map count as memory of the process once they are read, and random windows of a long text would
    soon bring in all of it. So the pages are released now and then; the system keeps them cached while it has room.
    """

    def __init__(self, path: Path, dtype: np.dtype | str):
        """Maps the file. Raises `ValueError` if the file is empty or ends within an id."""
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ids = np.frombuffer(self._map, dtype)
        self._releases = len(self._map) > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED")
        self._read = 0  # upper bound of the bytes mapped since the last release

    def part(self, start: int, stop: int) -> "MappedIds":
        """The ids [start, stop), in the same memory map: further maps of a long text would fill the address space."""
        part = copy(self)
        part._ids = self._ids[start:stop]
        return part

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids."""
        return self._ids.dtype

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Returns a copy. The positions in a row of an array should be adjacent, as the ids of a window are."""
        if not self._releases:
            return np.array(self._ids[index])
        if isinstance(index, slice):
            return self._copy(index, pages=1)
        rows_at_once = RESIDENT_BYTES // PAGE_BYTES
        parts = [index[start : start + rows_at_once] for start in range(0, max(1, len(index)), rows_at_once)]
        return np.concatenate([self._copy(rows, pages=len(rows)) for rows in parts])

    def _copy(self, index: slice | np.ndarray, pages: int) -> np.ndarray:
        ids = np.array(self._ids[index])
        self._read += ids.nbytes + pages * PAGE_BYTES
        if self._read >= RESIDENT_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0
        return ids

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)


# -- surveys of files


def stamps(source: Source) -> Stamps | None:
    """What the file system knows of each file and changes with its content; None if a part is not a readable file."""
    files = [part for part in source.parts if isinstance(part, Path)]
    if len(files) < len(source.parts):
        return None
    try:
        status = [(str(file.resolve()), file.stat()) for file in files]
    except OSError:
        return None
    return [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in status]


def recall(cache: Path, source: Source, key: Sequence[object]) -> dict[str, Any] | None:
    """The survey that `remember` stored for these files, if they have not changed since; otherwise None.

    key: the settings, besides those of the source, on which the survey depends.
    """
    now = stamps(source)
    known = read_json(_entry(cache, source, key, now)) if now else None
    return known["survey"] if known and known["stamps"] == now else None


def remember(
    cache: Path, source: Source, key: Sequence[object], before: Stamps | None, survey: dict[str, Any]
) -> None:
    """Stores the survey of the files. before: their stamps when reading began; files changed since are not stored."""
    with suppress(OSError):  # a read-only cache is still useful
        if not before or before != stamps(source):
            return
        newest = max(max(mtime, ctime) for _, _, mtime, ctime, _, _ in before)
        if time.time() - newest / 1e9 > SETTLED_SECONDS:
            write_json(_entry(cache, source, key, before), {"stamps": before, "survey": survey})


def _entry(cache: Path, source: Source, key: Sequence[object], stamps: Stamps) -> Path:
    paths = (path for path, *_ in stamps)
    name = digest([INDEX_FORMAT, source.encoding, source.tidy, source.field, *key, *paths])
    return cache / "sources" / f"{name}.json"


# -- ids of texts


def ids_folder(cache: Path, fingerprint: str, tokens: list[str]) -> Path:
    """The folder for the ids of a text under the vocabulary with these tokens, in hex."""
    return cache / "corpora" / digest([IDS_FORMAT, fingerprint, *tokens])


def load(folder: Path) -> tuple[MappedIds, Marks] | None:
    """The ids of a whole text in this folder, and its marks; None if they are missing or damaged."""
    facts = read_json(folder / FACTS)
    if facts is None:
        return None
    try:
        ids = MappedIds(folder / IDS, facts["dtype"])
        if len(ids) != facts["ids"] or _checksum(folder / IDS) != facts["checksum"]:
            return None
        return ids, facts["marks"]
    except (FileNotFoundError, ValueError):
        return None


def build(folder: Path, encode: Callable[[Path], dict[str, Any]], progress: bool) -> tuple[MappedIds, Marks] | None:
    """Lets `encode` write the ids into a new folder and return the facts about them; then `load`s the result.

    One process at a time does this; the others wait for its result. progress: tell the user about the wait.
    """
    _remove_leftovers(folder.parent)
    with _exclusive(folder, progress):
        if found := load(folder):
            return found
        unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{UNFINISHED}")
        try:
            unfinished.mkdir(parents=True)
            facts = encode(unfinished)
            facts["checksum"] = _checksum(unfinished / IDS)
            write_json(unfinished / FACTS, facts)
            for path in unfinished.iterdir():
                sync(path)
            _move(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return load(folder)


def _move(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.replace(folder)
    except OSError:
        if load(folder) is None:  # otherwise a process that no lock kept out was faster
            # The folder is damaged. The content follows from its name, so files of two processes fit together.
            for file in (IDS, FACTS):
                (unfinished / file).replace(folder / file)


def _checksum(path: Path) -> str | None:
    """SHA-256 of the file; None for a file too long to be hashed at each start."""
    with path.open("rb") as file:
        short = os.fstat(file.fileno()).st_size <= CHECKED_BYTES
        return hashlib.file_digest(file, "sha256").hexdigest() if short else None


def _lock(folder: Path) -> FileLock:
    """The lock of the process that writes this folder; the system releases the lock of a process that is killed."""
    path = folder.parent.with_name("locks") / f"{folder.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return file_lock(path)


@contextmanager
def _exclusive(folder: Path, progress: bool) -> Iterator[None]:
    """Keeps other processes out. On file systems without locks all of them may encode; the first to finish wins."""
    lock = _lock(folder)
    with suppress(NotImplementedError, OSError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                print("text   another process is encoding this text; waiting for it", file=Output("stderr"))
            lock.acquire(timeout=PATIENCE_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished folders of killed processes: those whose lock nobody holds."""
    for unfinished in folder.glob(f"*{UNFINISHED}"):
        lock = _lock(folder / unfinished.name.split(".")[0])
        with suppress(NotImplementedError, OSError), lock.acquire(timeout=0):
            shutil.rmtree(unfinished, ignore_errors=True)
