"""From a text to ids: read once to know it, once more to encode it, in bounded memory and on more than one core."""

import hashlib
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from smallm.errors import UserError
from smallm.tokenizer.vocabulary import CODE_POINTS, Vocabulary, count_characters
from smallm.training.data.source import Piece, Place, Source
from smallm.training.data.store import TRAIN_IDS, VAL_IDS, VAL_TEXT

MAX_THREADS = 4  # besides the caller's; more would wait for the one that decodes for all of them
PLACE_CHARACTERS = 1 << 22  # between the places that are kept

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Survey:
    """What the first reading tells of a text."""

    fingerprint: str
    """SHA-256 of the text in UTF-8, in hex."""
    characters: int
    counts: np.ndarray
    """How often each code point above ASCII occurs, (0x110000,) int64; those of ASCII may be left out."""
    places: list[Place]
    """Where reading may go on: the beginning, and more every few million characters."""


def survey(source: Source, progress: bool) -> Survey:
    """Reads the text: does it decode, which text is it, how long is it, what does it use? Raises UserError."""
    digest, counts, places, end = hashlib.sha256(), np.zeros(CODE_POINTS, np.int64), [Place()], Place()
    for piece, found in _with_each(lambda piece: _count(piece.text), source.pieces("reading", progress)):
        digest.update(piece.utf8)
        counts[: len(found)] += found
        end = piece.end
        if end.characters - places[-1].characters >= PLACE_CHARACTERS:
            places.append(end)
    return Survey(digest.hexdigest(), end.characters, counts, places)


def training_counts(source: Source, known: Survey, train_characters: int, progress: bool) -> np.ndarray:
    """As `known.counts`, of the first `train_characters` alone: what follows them is read once more."""
    counts = known.counts.copy()
    if counts.any():
        start = known.places[bisect_right(known.places, train_characters, key=lambda place: place.characters) - 1]
        halves = _halves(source.pieces("counting", progress, start), train_characters - start.characters)
        for _, found in _with_each(_count, (val for _, _, val in halves)):
            counts[: len(found)] -= found
    return counts


def encode(
    source: Source, vocabulary: Vocabulary, fingerprint: str, train_characters: int, folder: Path, progress: bool
) -> dict:
    """Writes the ids, and the validation part as it is, into `folder`; returns what there is to say of them.

    Raises UserError if the text is not the one of this fingerprint any more.
    """
    digest, start_text, sizes = hashlib.sha256(), "", [0, 0, 0]
    halves = _halves(source.pieces("encoding", progress), train_characters)
    with ExitStack() as stack:
        files = [stack.enter_context((folder / part).open("wb")) for part in (TRAIN_IDS, VAL_IDS, VAL_TEXT)]
        for (piece, train, val), ids in _with_each(lambda each: [vocabulary.encode(half) for half in each[1:]], halves):
            digest.update(piece.utf8)
            if start_text != "\n":
                start_text = "\n" if "\n" in train else start_text or train[:1]
            for i, (file, data) in enumerate(zip(files, (*ids, val.encode()), strict=True)):
                file.write(data)
                sizes[i] += len(data)
    if digest.hexdigest() != fingerprint:
        raise UserError(f"{source.name} changed while it was being read; run the command again")
    about_files = dict(zip(("train_ids", "val_ids", "val_bytes"), sizes, strict=True))
    return {"dtype": vocabulary.dtype.str, "start_text": start_text} | about_files


def _count(text: str) -> np.ndarray:
    return count_characters("" if text.isascii() else text)  # the ids of ASCII do not depend on it


def _halves(pieces: Iterable[Piece], train_characters: int) -> Iterator[tuple[Piece, str, str]]:
    """Each piece with what of it is for training and what is for validation."""
    for piece in pieces:
        yield piece, piece.text[:train_characters], piece.text[train_characters:]
        train_characters = max(0, train_characters - len(piece.text))


def _with_each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in order, from threads that fetch items and compute results a few items ahead.

    Numpy, hashlib and files let go of Python's lock, so all of these, and the caller, work at the same time.
    """
    threads, items, ahead = min(MAX_THREADS, os.cpu_count() or 1), iter(items), deque()
    with ThreadPoolExecutor(threads) as pool:
        fetched = pool.submit(next, items, None)
        while (item := fetched.result()) is not None:
            fetched = pool.submit(next, items, None)
            ahead.append((item, pool.submit(function, item)))
            if len(ahead) > threads:
                first, result = ahead.popleft()
                yield first, result.result()
        for item, result in ahead:
            yield item, result.result()
