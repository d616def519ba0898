"""Turns a text into ids in two readings, in bounded memory and on several cores: `survey` it, then `encode` it."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from smallm.errors import UserError
from smallm.inference.processors import usable_processors
from smallm.tokenizer.vocabulary import CODE_POINTS, Vocabulary, count_characters
from smallm.training.data.source import Text
from smallm.training.data.store import IDS

MAX_THREADS = 4  # besides the caller's thread; one thread decodes the text for all others and is the limit
CHARACTERS_BETWEEN_MARKS = 1 << 22

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Survey:
    """What the first reading finds out about a text. It gives the vocabulary of any split without reading again."""

    fingerprint: str
    """SHA-256 of the text in UTF-8, in hex."""
    characters: int
    """Length of the text in code points."""
    first_character: str
    first_newline: int
    """Offset of the first newline in characters; the length of the text if it has none."""
    frequent_from: dict[str, int]
    """For each non-ASCII character that occurs `min_count` times: the length in characters of the shortest beginning
    of the text in which it occurs that often."""
    train_characters: Sequence[int] = ()
    """As in `Text`."""

    def vocabulary(self, characters: int, base: Vocabulary) -> Vocabulary:
        """`base`, extended by the characters that occur `min_count` times in the first `characters` of the text."""
        return base.extended(character for character, length in self.frequent_from.items() if length <= characters)


def survey(source: Text, min_count: int, progress: bool) -> Survey:
    """Reads the text once. Raises `UserError` if it cannot be read or decoded, or has lone surrogates."""
    digest, counts, characters, first, newline = hashlib.sha256(), np.zeros(CODE_POINTS, np.int64), 0, "", -1
    frequent_from = {}
    for text, found in _with_each(_count_non_ascii, source.pieces("reading", progress)):
        digest.update(text.encode())
        before = counts[: len(found)]
        for code in np.flatnonzero((before < min_count) & (before + found >= min_count)).tolist():
            frequent_from[chr(code)] = characters + _end_of_nth(text, chr(code), min_count - int(before[code]))
        before += found
        first = first or text[0]
        if newline < 0 and (place := text.find("\n")) >= 0:
            newline = characters + place
        characters += len(text)
    return Survey(
        digest.hexdigest(), characters, first, newline if newline >= 0 else characters, frequent_from,
        source.train_characters,
    )  # fmt: skip


def encode(source: Text, vocabulary: Vocabulary, fingerprint: str, folder: Path, progress: bool) -> dict[str, Any]:
    """Writes the ids of the text into `folder`; returns the facts that are needed to use them.

    Facts: dtype; ids: their number; marks: [characters, ids] up to some points of the text, the first one [0, 0].
    Raises `UserError` if the text no longer has this fingerprint.
    """
    digest, characters, count, marks = hashlib.sha256(), 0, 0, [[0, 0]]
    with (folder / IDS).open("wb") as file:
        for text, ids in _with_each(vocabulary.encode, source.pieces("encoding", progress)):
            digest.update(text.encode())
            file.write(ids.data)
            characters, count = characters + len(text), count + len(ids)
            if characters - marks[-1][0] >= CHARACTERS_BETWEEN_MARKS:
                marks.append([characters, count])
    if digest.hexdigest() != fingerprint:
        raise UserError(f"{source.name} changed while it was being read; run the command again")
    return {"dtype": vocabulary.dtype.str, "ids": count, "marks": marks}


def _count_non_ascii(text: str) -> np.ndarray:
    if text.isascii():  # the ids of ASCII characters do not depend on counts
        return np.zeros(0, np.int64)
    counts = count_characters(text)
    counts[:128] = 0
    return counts


def _end_of_nth(text: str, character: str, n: int) -> int:
    """The offset after the n-th occurrence of the character, from 1."""
    end = 0
    for _ in range(n):
        end = text.index(character, end) + 1
    return end


def _with_each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yields each item with its result, in order; threads fetch items and compute results a few items ahead.

    numpy, hashlib and file operations release Python's lock, so these threads and the caller run at the same time.
    """
    threads, items = min(MAX_THREADS, usable_processors()), iter(items)
    ahead: deque[tuple[Item, Future[Result]]] = deque()
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
