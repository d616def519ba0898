"""Splits a text by blocks, each of which gives its end to the validation part, or by documents, which are shuffled.

The text is copied to a temporary file once. The parts are stretches of this file, read in a new order: first those for
training, then those for validation. The result is again one text with a training part and a validation part after it.
"""

import codecs
import mmap
import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from smallm.errors import UserError
from smallm.tokenizer.text_files import DOCUMENT_END, ending, last_part
from smallm.training.config import DataConfig
from smallm.training.data import source
from smallm.training.data.source import Source, Text, progress_bar

MAX_BLOCKS, MIN_BLOCK_BYTES = 50, 10_000  # a text of less than 500,000 bytes has fewer blocks
MAPPED_BYTES = 64 << 20  # of the file, after which the pages are released
LINE_REACH = 1 << 12  # bytes after the border of a block among which a line end is searched


class Part(NamedTuple):
    """A part of a text: stretches (n, 2) of a file in UTF-8, the offsets [start, stop) in bytes."""

    file: IO[bytes]
    stretches: np.ndarray

    @property
    def size(self) -> int:
        """Length in bytes."""
        return int((self.stretches[:, 1] - self.stretches[:, 0]).sum())

    def pieces(self, bar: "tqdm[Any]") -> Iterator[str]:
        """Yields the text in pieces of bounded size, and moves the bar."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        held, limit = bytearray(), source.PIECE_BYTES
        for start, stop in map(np.ndarray.tolist, self.stretches):
            for at in range(start, stop, limit):
                self.file.seek(at)
                held += self.file.read(min(limit, stop - at))
                if len(held) >= limit:
                    bar.update(len(held))
                    if text := decoder.decode(held):
                        yield text
                    held.clear()
        if held:
            bar.update(len(held))
            yield decoder.decode(held)


@dataclass(frozen=True)
class SplitText:
    """One or several texts in a new order: the training part of each, then the validation part of each."""

    name: str
    train: list[Part]
    val: list[Part]
    train_characters: list[int] = field(default_factory=list)
    """The length of the training part of each text; known when `pieces` has yielded the whole text."""

    def pieces(self, label: str, progress: bool) -> Iterator[str]:
        """Yields the text in pieces of bounded size, as `Source.pieces` does."""
        parts, lengths = [*self.train, *self.val], [0] * len(self.train)
        with progress_bar(label, sum(part.size for part in parts), progress) as bar:
            for number, part in enumerate(parts):
                for text in part.pieces(bar):
                    if number < len(lengths):
                        lengths[number] += len(text)
                    yield text
        self.train_characters[:] = lengths


class Copy(NamedTuple):
    """A text in a temporary file, in UTF-8; with `data.split documents`, each document ends with the separator."""

    text: Source
    file: IO[bytes]
    characters: int
    """Length of the text without `DOCUMENT_END`."""


@contextmanager
def split_text(
    text: Source, data: DataConfig, seed: int, cache: Path, progress: bool,
    choose_val_fraction: Callable[[int], float],
) -> Iterator[Text]:
    """The text in the order of `data.split`; with `data.weights`, each of its texts is split separately.

    Yields the text itself if `data.split` and `data.weights` leave its order as it is. The temporary files lie in
    `cache`. seed: of the order of documents. choose_val_fraction: gives the share of the validation part for the length
    of the text in characters. Raises `UserError` if there is only one document.
    """
    if data.split == "tail" and not data.weights:
        yield text
        return
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        texts = text.texts if data.weights else (text,)
        copies = [_copy(one, files.enter_context(TemporaryFile(dir=cache)), data, progress) for one in texts]
        val_fraction = choose_val_fraction(sum(copy.characters for copy in copies))
        parts = [_split(copy, data.split, val_fraction, seed) for copy in copies]
        yield SplitText(text.name, [train for train, _ in parts], [val for _, val in parts])


def split_key(data: DataConfig, seed: int, val_fraction: float | None) -> tuple[object, ...]:
    """The settings, besides the text, on which the content and the order of the parts depend.

    val_fraction: None for what all fractions have in common, the length of the text.
    """
    separator = (data.separator,) if data.separator else ()
    if data.split == "tail" and not data.weights:
        return separator
    separate = (len(data.weights),) if data.weights else ()
    return (*separator, *separate, data.split, val_fraction, *((seed,) if data.split == "documents" else ()))


def _copy(text: Source, file: IO[bytes], data: DataConfig, progress: bool) -> Copy:
    """Copies the text into the file."""
    documents = data.split == "documents"
    text = replace(text, separator=data.separator or DOCUMENT_END) if documents else text
    last, characters = "", 0

    def write(piece: str) -> None:
        nonlocal characters
        file.write(_bytes(piece))
        characters += len(piece) - piece.count(DOCUMENT_END)

    for piece in text.pieces("copying", progress):
        write(piece)
        last = last_part(last + piece, text.separator)
    if documents and last:
        write(ending(last, text.separator))
    return Copy(text, file, characters)


def _split(copy: Copy, split: str, val_fraction: float, seed: int) -> tuple[Part, Part]:
    """The parts for training and for validation."""
    text, file, _ = copy
    if split != "documents":
        stretches, count = _blocks(file, val_fraction, MAX_BLOCKS if split == "blocks" else 1)
    else:
        documents = _documents(file, text.separator)
        if len(documents) == 1:
            raise UserError(f"{text.name} is one document; name what ends its documents with --data.separator, or "
                            "pass --data.split blocks")  # fmt: skip
        stretches, count = _shuffled(documents, val_fraction, seed)
    return Part(file, stretches[:count]), Part(file, stretches[count:])


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a lone surrogate in a text is refused when the ids are made


def _documents(file: IO[bytes], separator: str) -> np.ndarray:
    """(n, 2): the stretches of the documents, each with the separator and the line ends after it; no `DOCUMENT_END`."""
    if not file.tell():
        return np.empty((0, 2), np.int64)
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return _find_ends(text, separator)


def _find_ends(text: mmap.mmap, separator: str) -> np.ndarray:
    keep, pattern = separator != DOCUMENT_END, re.escape(_bytes(separator))
    stretches, start, mapped = array("q"), 0, 0
    for match in re.finditer(pattern + rb"[\r\n]*" if keep else pattern, text):
        stretches.extend((start, match.end() if keep else match.start()))
        start = match.end()
        if start - mapped > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            text.madvise(mmap.MADV_DONTNEED)
            mapped = start
    return np.frombuffer(stretches, np.int64).reshape(-1, 2)


def _shuffled(documents: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, int]:
    """The documents in an order that depends on the seed alone, and the number of those for training."""
    documents = documents[np.random.RandomState(seed).permutation(len(documents))]  # the same in every release of numpy
    ends = np.cumsum(documents[:, 1] - documents[:, 0])
    count = int(np.searchsorted(ends, int(ends[-1] * (1 - Fraction(str(val_fraction)))), "right")) if len(ends) else 0
    return documents, max(1, min(count, len(documents) - 1))


def _blocks(file: IO[bytes], val_fraction: float, max_blocks: int) -> tuple[np.ndarray, int]:
    """The stretches for training, which begin the blocks, then those for validation; the number of the former."""
    size = file.tell()
    count = max(1, min(max_blocks, size // MIN_BLOCK_BYTES))
    train_share = 1 - Fraction(str(val_fraction))  # 9/10 for 0.1, not the nearest float
    borders = [int(size * (block + share) / count) for block in range(count) for share in (0, train_share)]
    reach = min(LINE_REACH, *(b - a for a, b in pairwise([*borders, size]))) // 2
    borders = [0, *(_line_end(file, border, reach) for border in borders[1:]), size]
    stretches = list(pairwise(borders))
    return np.array([*stretches[::2], *stretches[1::2]]), count


def _line_end(file: IO[bytes], border: int, reach: int) -> int:
    """The first line end among the `reach` bytes after the border; otherwise the next character."""
    file.seek(max(0, border - 1))
    before, after = file.read(min(1, border)), file.read(max(reach, 3))
    if (newline := (before + after[:reach]).find(b"\n")) >= 0:
        return border - len(before) + newline + 1
    return border + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))
