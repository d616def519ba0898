"""The characters of a text that is held as ids, as arrays of code points: for what looks at texts of any length."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.data.store import MappedIds

PIECE = 1 << 18  # ids looked at in one go: what is made of them stays in the processor's cache
_PART = np.uint32(0xFFFFFFFF)  # stands for an id that is no whole character


class Characters:
    """A text, of which pieces are read as they are wanted."""

    def __init__(self, ids: MappedIds | np.ndarray, vocabulary: Vocabulary | None = None):
        """ids: (N,) of the vocabulary; without a vocabulary they are the code points themselves."""
        self._ids, self._vocabulary = ids, vocabulary

    @classmethod
    def of(cls, text: str) -> "Characters":
        """Those of a string."""
        return cls(np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4"))

    def __len__(self) -> int:
        """The number of ids, of which some characters have several."""
        return len(self._ids)

    def between(self, start: int, stop: int) -> np.ndarray:
        """The code points (n,) uint32 of the characters whose first id lies in [start, stop)."""
        ids = np.asarray(self._ids[start : stop + 3])
        if self._vocabulary is None:
            return ids[: stop - start].astype(np.uint32)
        goes_on = (ids >= 128) & (ids < 192)  # the bytes of a character after its first
        first = int(np.argmin(np.append(goes_on, False)))
        last = stop - start
        if first >= last:
            return np.zeros(0, np.uint32)
        while last < len(ids) and goes_on[last]:
            last += 1
        ids, goes_on = ids[first:last], goes_on[first:last]
        codes = self._code_points[ids]
        parts = codes == _PART
        if not parts.any():
            return codes
        spelled = self._vocabulary.decode(ids[parts])
        codes[parts & ~goes_on] = np.frombuffer(spelled.encode("utf-32-le"), "<u4")
        return codes[~goes_on]

    def pieces(self, most: int | None = None, size: int = PIECE, keep: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """The text in pieces of about `size` characters, or of a longer one than `most` as many, evenly spread.

        With each comes how many characters at its beginning are the end of the piece before it: `keep`, or as many as
        there are.
        """
        kept, end = np.zeros(0, np.uint32), 0
        for start, stop in spread(len(self), len(self) if most is None else most, size):
            codes = self.between(start, stop)
            if keep and start == end:
                codes = np.concatenate([kept, codes])
            carried = len(kept) if start == end else 0
            yield codes, carried
            kept, end = codes[max(0, len(codes) - keep) :] if keep else kept, stop

    @cached_property
    def _code_points(self) -> np.ndarray:
        """The code point of each id that is a whole character; (vocabulary size,) uint32."""
        table = np.full(self._vocabulary.size, _PART, np.uint32)
        table[:128] = np.arange(128)
        for id, token in enumerate(self._vocabulary.tokens, 256):
            text = token.decode(errors="ignore")
            if text and text.encode() == token:  # not the first bytes of a character alone
                table[id] = ord(text)
        return table


def spread(length: int, most: int, size: int) -> list[tuple[int, int]]:
    """Pieces [start, stop) of `size` that cover `length`; or `most` of it, evenly spread, if it is longer."""
    if length <= most:
        return [(start, min(length, start + size)) for start in range(0, length, size)]
    size = min(size, most)
    number = most // size
    return [(start, start + size) for start in ((length - size) * i // max(1, number - 1) for i in range(number))]


def as_text(codes: np.ndarray) -> str:
    """The string of these code points."""
    return codes.astype("<u4").tobytes().decode("utf-32-le", errors="replace")
