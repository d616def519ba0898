"""Encoded texts in the cache: each is a folder that exists whole or not at all, whatever else goes on."""

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from smallm.training.data.ids import MappedIds

CHECKED_BYTES = 32 << 20  # ids up to this length are compared with their checksum whenever they are opened
PATIENCE_SECONDS = 3600.0  # with a process that encodes the same text
PARTS = TRAIN_IDS, VAL_IDS, VAL_TEXT = "train.bin", "val.bin", "val.txt"
FACTS = "corpus.json"
UNFINISHED = ".unfinished"


class Stored(NamedTuple):
    """An encoded text."""

    facts: dict
    train_ids: MappedIds
    val_ids: MappedIds
    val_text: Path
    """The validation part in UTF-8."""


def load(folder: Path) -> Stored | None:
    """What lies in this folder; None if it is missing or damaged."""
    try:
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        facts = content["facts"]
        if content["checksum"] != _checksum_of(facts):
            return None
        ids = [MappedIds(folder / part, facts["dtype"]) for part in (TRAIN_IDS, VAL_IDS)]
        sizes = [*map(len, ids), (folder / VAL_TEXT).stat().st_size]
        if sizes != [facts["train_ids"], facts["val_ids"], facts["val_bytes"]]:
            return None
        if [_checksum(folder / part) for part in PARTS] != facts["checksums"]:
            return None
        return Stored(facts, *ids, folder / VAL_TEXT)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def build(folder: Path, encode: Callable[[Path], dict], progress: bool) -> Stored | None:
    """Has `encode` write the parts into the folder that it is given, and adds the facts that it returns; then `load`.

    One process at a time does so, and the others wait for its result.
    """
    _remove_leftovers(folder.parent)
    with _alone(folder, progress):
        if found := load(folder):
            return found
        unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{UNFINISHED}")
        try:
            unfinished.mkdir(parents=True)
            facts = encode(unfinished)
            facts["checksums"] = [_checksum(unfinished / part) for part in PARTS]
            content = {"facts": facts, "checksum": _checksum_of(facts)}
            (unfinished / FACTS).write_text(json.dumps(content), encoding="utf-8")
            for path in unfinished.iterdir():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
            _move(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return load(folder)


def _move(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.replace(folder)
    except OSError:
        if load(folder) is None:  # else a process was faster that no lock kept out
            # What is there is damaged. All depends on the folder's name alone, so two processes' files go together.
            for file in (*PARTS, FACTS):
                (unfinished / file).replace(folder / file)


def _checksum(path: Path) -> str | None:
    """SHA-256 of a file that is read in a moment, None of a longer one."""
    with path.open("rb") as file:
        short = os.fstat(file.fileno()).st_size <= CHECKED_BYTES
        return hashlib.file_digest(file, "sha256").hexdigest() if short else None


def _checksum_of(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _lock(folder: Path) -> FileLock:
    """Held by who writes this folder; the system takes it from a process that was killed."""
    path = folder.parent.with_name("locks") / f"{folder.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


@contextmanager
def _alone(folder: Path, progress: bool) -> Iterator[None]:
    """Keeps other processes out. Where the file system has no locks all may encode, and the first to finish wins."""
    lock = _lock(folder)
    with suppress(NotImplementedError, OSError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                print("text   another process is encoding it; waiting for that", file=sys.stderr)
            lock.acquire(timeout=PATIENCE_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """What killed processes have left: folders that are not finished, and whose lock nobody holds."""
    for unfinished in folder.glob(f"*{UNFINISHED}"):
        lock = _lock(folder / unfinished.name.split(".")[0])
        with suppress(NotImplementedError, OSError), lock.acquire(timeout=0):
            shutil.rmtree(unfinished, ignore_errors=True)
