"""Which windows of one text stand word for word in another, however long: by their hashes, each hit compared.

The hash of the window of w code points c[i], ... is the sum of c[i + m] * BASE^m modulo 2^64. From running sums of
c[j] * BASE^j that of any window of any width takes one subtraction and one product.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(BASE, -1, 1 << 64)
SEPARATOR = np.uint32(0xFFFFFFFF)  # no code point
RENEWED = 0.02  # of the windows must be found before the table is made anew without them
MAX_BITS = 25  # of the table's index; 32 MB


class Sums:
    """The running sums of some code points, (n,)."""

    def __init__(self, codes: np.ndarray):
        self.codes = codes
        powers, self._inverse = _powers(1 << max(10, len(codes).bit_length()))
        self._sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(codes * powers[: len(codes)], out=self._sums[1:])
        self._known: dict[int, np.ndarray] = {}

    def windows(self, width: int, starts: np.ndarray | None = None) -> np.ndarray:
        """The hashes, uint64, of the windows at these positions, or at all."""
        if starts is not None:
            return (self._sums[starts + width] - self._sums[starts]) * self._inverse[starts]
        if width not in self._known:
            number = max(0, len(self.codes) - width + 1)
            self._known[width] = (self._sums[width : width + number] - self._sums[:number]) * self._inverse[:number]
        return self._known[width]


@lru_cache(maxsize=4)
def _powers(number: int) -> tuple[np.ndarray, np.ndarray]:
    rising, falling = np.full((2, number), 1, np.uint64)
    rising[1:], falling[1:] = BASE, _INVERSE
    return np.multiply.accumulate(rising), np.multiply.accumulate(falling)


class Windows:
    """All windows of a width in some texts, and which of them were found elsewhere by now."""

    def __init__(self, texts: Sequence[np.ndarray], width: int, once: bool = False):
        """texts: the code points of each; no window crosses from one to the next; once: what was found need not be
        found again, which keeps looking through a text with many repeats as quick as through another."""
        self.width, self._once = width, once
        self.codes = joined(texts)
        self.characters = sum(map(len, texts))
        apart = np.concatenate([[0], np.cumsum(self.codes == SEPARATOR)])
        number = max(0, len(self.codes) - width + 1)
        self._starts = np.flatnonzero(apart[width : width + number] == apart[:number])
        hashes = Sums(self.codes).windows(width)[self._starts]
        self._hashes, first, self._which = np.unique(hashes, return_index=True, return_inverse=True)
        self._examples = self._starts[first]
        self._found = np.zeros(len(self._hashes), bool)
        bits = min(MAX_BITS, max(10, (32 * len(hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)  # says "perhaps", quickly
        self._table[self._row(self._hashes)] = True
        self._known = 0  # windows that were found when the table was made

    def __len__(self) -> int:
        return len(self._starts)

    def look(self, sums: Sums, starts: np.ndarray | None = None) -> np.ndarray:
        """Looks for them at these positions of another text, or at all; returns where they stand, if not `once`."""
        hashes = sums.windows(self.width, starts)
        if not len(self):
            return np.zeros(0, np.int64)
        places = np.flatnonzero(self._table[self._row(hashes)])
        hashes = hashes[places]
        which = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        same = self._hashes[which] == hashes
        places, which = places[same] if starts is None else starts[places[same]], which[same]
        self._compare(sums.codes, places, which)
        if self._once and (found := np.count_nonzero(self._found)) > self._known + RENEWED * len(self._found):
            self._known = found
            self._table[:] = False
            self._table[self._row(self._hashes[~self._found])] = True
        return places

    def _compare(self, codes: np.ndarray, places: np.ndarray, which: np.ndarray) -> None:
        """Marks those whose characters are the same too; each once, so comparing takes no time to speak of."""
        new = ~self._found[which]
        which, first = np.unique(which[new], return_index=True)
        places, span = places[new][first], np.arange(self.width)
        for some in np.array_split(np.arange(len(which)), len(which) // 4096 + 1):
            theirs, ours = places[some, None] + span, self._examples[which[some], None] + span
            self._found[which[some]] = (codes[theirs] == self.codes[ours]).all(axis=1)

    def _row(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self._shift).view(np.int64)

    @property
    def share(self) -> float:
        """Of the windows, that were found."""
        return float(self._found[self._which].mean()) if len(self) else 0.0

    def covered(self) -> np.ndarray:
        """Which characters lie in a window that was found; bool, for each of `codes`."""
        change = np.zeros(len(self.codes) + 1, np.int64)
        starts = self._starts[self._found[self._which]]
        change[starts] += 1
        change[starts + self.width] -= 1
        return np.cumsum(change)[:-1] > 0


def joined(texts: Sequence[np.ndarray]) -> np.ndarray:
    """The texts with a separator after each, which is in no other text."""
    return np.concatenate([np.append(text, SEPARATOR) for text in texts] or [np.zeros(0, np.uint32)])
