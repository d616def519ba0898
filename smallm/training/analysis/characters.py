"""Reads a text of any length that is stored as ids, as arrays of code points."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from smallm.inference.scoring import begins_character
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.data.store import MappedIds

PIECE = 1 << 18  # ids read at a time: a piece and its hashes stay in the processor's cache
_PART = np.uint32(0xFFFFFFFF)  # stands for an id that is not a whole character


class Characters:
    """A text whose pieces are read when they are asked for."""

    def __init__(self, ids: MappedIds | np.ndarray, vocabulary: Vocabulary | None = None):
        """ids: (N,) of the vocabulary; without a vocabulary they are code points."""
        self._ids, self._vocabulary = ids, vocabulary

    @classmethod
    def of(cls, text: str) -> "Characters":
        """The characters of a string."""
        return cls(np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4"))

    def __len__(self) -> int:
        """The number of ids; a character may take several."""
        return len(self._ids)

    def between(self, start: int, stop: int) -> np.ndarray:
        """The code points (n,) uint32 of the characters whose first id lies in [start, stop)."""
        ids = np.asarray(self._ids[start : stop + 3])
        if self._vocabulary is None:
            return ids[: stop - start].astype(np.uint32)
        begins = np.append(begins_character(ids), True)
        first = int(np.argmax(begins))
        last = min(stop - start, len(ids))
        last += int(np.argmax(begins[last:]))
        ids, begins = ids[first:last], begins[first:last]
        codes = self._code_points[ids]
        parts = codes == _PART
        if not parts.any():
            return codes
        spelled = self._vocabulary.decode(ids[parts])
        codes[parts & begins] = np.frombuffer(spelled.encode("utf-32-le"), "<u4")
        return codes[begins]

    def pieces(self, limit: int | None = None, size: int = PIECE, overlap: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """Yields code points of `size` ids at a time, and how many of these were the end of the previous piece.

        limit: ids to read at most, in evenly spaced pieces of the text; None reads all.
        overlap: characters to repeat from the previous piece, where two pieces are adjacent.
        """
        kept, end = np.zeros(0, np.uint32), 0
        for start, stop in spread(len(self), len(self) if limit is None else limit, size):
            if start != end:
                kept = kept[:0]
            codes = np.concatenate([kept, self.between(start, stop)])
            yield codes, len(kept)
            kept, end = codes[max(0, len(codes) - overlap) :] if overlap else kept, stop

    @cached_property
    def _code_points(self) -> np.ndarray:
        """The code point of each id that is a whole character; (vocabulary size,) uint32."""
        assert self._vocabulary is not None  # `between` reads the table for ids of a vocabulary only
        table = np.full(self._vocabulary.size, _PART, np.uint32)
        table[:128] = np.arange(128)
        for id, token in enumerate(self._vocabulary.tokens, 256):
            text = token.decode(errors="ignore")
            if text and text.encode() == token:  # not only the first bytes of a character
                table[id] = ord(text)
        return table


def spread(length: int, limit: int, size: int) -> list[tuple[int, int]]:
    """Pieces [start, stop) of `size` that cover `length`, or `limit` of it in evenly spaced pieces if it is longer."""
    if length <= limit:
        return [(start, min(length, start + size)) for start in range(0, length, size)]
    size = min(size, limit)
    number = limit // size
    return [(start, start + size) for start in ((length - size) * i // max(1, number - 1) for i in range(number))]


def as_text(codes: np.ndarray) -> str:
    """The string of these code points."""
    return codes.astype("<u4").tobytes().decode("utf-32-le", errors="surrogatepass")
