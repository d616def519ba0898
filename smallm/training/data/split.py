"""Divides a text into blocks, of which each gives its end to the validation part.

The text is copied to a temporary file once. The parts are stretches of this file, read in a new order: first those for
training, then those for validation. The result is again one text with a training part and a validation part after it.
"""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from smallm.training.config import DataConfig
from smallm.training.data import source
from smallm.training.data.source import Source, Text, progress_bar

MAX_BLOCKS, MIN_BLOCK_BYTES = 50, 10_000  # a text of less than 500,000 bytes has fewer blocks
LINE_REACH = 1 << 12  # bytes after the border of a block among which a line end is searched


@dataclass(frozen=True)
class SplitText:
    """The stretches of a file in UTF-8 as one text.

    stretches: (n, 2), the offsets [start, stop) in bytes. train_count: number of stretches in the training part.
    """

    name: str
    file: IO[bytes]
    stretches: np.ndarray
    train_count: int

    def pieces(self, label: str, progress: bool) -> Iterator[str]:
        """Yields the text in pieces of bounded size, as `Source.pieces` does."""
        return self._read(self.stretches, label, progress)

    @property
    def train_characters(self) -> int:
        """The length of the training part."""
        return sum(map(len, self._read(self.stretches[: self.train_count], "splitting", progress=False)))

    def _read(self, stretches: np.ndarray, label: str, progress: bool) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        size, limit = int((stretches[:, 1] - stretches[:, 0]).sum()), source.PIECE_BYTES
        held = bytearray()
        with progress_bar(label, size, progress) as bar:
            for start, stop in map(np.ndarray.tolist, stretches):
                for at in range(start, stop, limit):
                    self.file.seek(at)
                    held += self.file.read(min(limit, stop - at))
                    if len(held) >= limit:
                        bar.update(len(held))
                        if text := decoder.decode(held):
                            yield text
                        held.clear()
            if held:
                yield decoder.decode(held)


@contextmanager
def split_text(text: Source, data: DataConfig, cache: Path, progress: bool) -> Iterator[Text]:
    """The text in the order of `data.split`; the text itself for `tail`. The temporary file lies in `cache`."""
    if data.split == "tail":
        yield text
        return
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=cache) as file:
        for piece in text.pieces("copying", progress):
            file.write(piece.encode("utf-8", "surrogatepass"))  # a lone surrogate is refused when the text is encoded
        train, val = _blocks(file, file.tell(), data.val_fraction)
        yield SplitText(text.name, file, np.array([*train, *val], np.int64).reshape(-1, 2), len(train))


def split_key(data: DataConfig) -> tuple[object, ...]:
    """The settings, besides the text, on which the order of the parts depends."""
    return () if data.split == "tail" else (data.split, data.val_fraction)


def _blocks(file: IO[bytes], size: int, val_fraction: float) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The stretches for training and for validation: of each block, the beginning and the rest."""
    count = max(1, min(MAX_BLOCKS, size // MIN_BLOCK_BYTES))
    train_share = 1 - Fraction(str(val_fraction))  # 9/10 for 0.1, not the nearest float
    borders = [int(size * (block + share) / count) for block in range(count) for share in (0, train_share)]
    reach = min(LINE_REACH, *(b - a for a, b in pairwise([*borders, size]))) // 2
    borders = [0, *(_line_end(file, border, reach) for border in borders[1:]), size]
    stretches = list(pairwise(borders))
    return stretches[::2], stretches[1::2]


def _line_end(file: IO[bytes], border: int, reach: int) -> int:
    """The first line end among the `reach` bytes after the border; otherwise the next character."""
    file.seek(max(0, border - 1))
    before, after = file.read(min(1, border)), file.read(max(reach, 3))
    if (newline := (before + after[:reach]).find(b"\n")) >= 0:
        return border - len(before) + newline + 1
    return border + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))
