"""Finds the windows (n-grams of characters) that two texts have in common: by their hashes, each hit compared."""

from collections.abc import Sequence

import numpy as np

FACTOR = np.uint64(0x9E3779B97F4A7C15)
SEPARATOR = np.uint32(0xFFFFFFFF)  # is not a code point
REBUILD_SHARE = 0.02  # of the windows must be newly found before the filter is built again without them
MAX_FILTER_BITS = 25  # 32 MB


def window_hashes(codes: np.ndarray, width: int) -> np.ndarray:
    """Hashes (n - width + 1,) uint64 of all windows of some code points (n,); equal windows have equal hashes."""
    hashes, covered = codes.astype(np.uint64) * FACTOR, 1
    while covered < width:  # two overlapping windows make a wider one
        step = min(covered, width - covered)
        wider = hashes[:-step] * FACTOR
        wider += hashes[step:]
        wider ^= wider >> np.uint64(29)
        hashes, covered = wider, covered + step
    return hashes


class WindowSet:
    """All windows of one width of some texts, and which of them were found in another text so far."""

    def __init__(self, texts: Sequence[np.ndarray], width: int, once: bool = False):
        """texts: code points, (n,) each; a window lies within one of them.

        once: stop looking for windows that were found, which keeps the search fast in a text with many repeats.
        """
        self.width, self._once = width, once
        self.characters = sum(map(len, texts))
        self.codes = np.concatenate([np.append(text, SEPARATOR) for text in texts] or [np.zeros(0, np.uint32)])
        separators = np.concatenate([[0], np.cumsum(self.codes == SEPARATOR)])
        number = max(0, len(self.codes) - width + 1)
        self._starts = np.flatnonzero(separators[width : width + number] == separators[:number])
        hashes = window_hashes(self.codes, width)[self._starts]
        self._hashes, first, self._which = np.unique(hashes, return_index=True, return_inverse=True)
        self._examples = self._starts[first]
        self._found = np.zeros(len(self._hashes), bool)
        bits = min(MAX_FILTER_BITS, max(10, (32 * len(hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)  # a fast test that lets few other hashes pass
        self._filter[self._rows(self._hashes)] = True
        self._known = 0  # windows found when the filter was built

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, codes: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """Marks the windows that occur in another text; returns the positions there, unless `once`.

        codes: the code points of the other text, or a piece of it; hashes: `window_hashes(codes, width)`.
        """
        if not len(self):
            return np.zeros(0, np.int64)
        places = np.flatnonzero(self._filter[self._rows(hashes)])
        which = np.minimum(np.searchsorted(self._hashes, hashes[places]), len(self._hashes) - 1)
        same = self._hashes[which] == hashes[places]
        places, which = places[same], which[same]
        self._compare(codes, places, which)
        found = int(np.count_nonzero(self._found)) if self._once else 0
        if found > self._known + REBUILD_SHARE * len(self._found):
            self._known = found
            self._filter[:] = False
            self._filter[self._rows(self._hashes[~self._found])] = True
        return places

    def _compare(self, codes: np.ndarray, places: np.ndarray, which: np.ndarray) -> None:
        """Marks the windows whose characters are the same too; each is compared until it was found once."""
        new = ~self._found[which]
        which, first = np.unique(which[new], return_index=True)
        places, span = places[new][first], np.arange(self.width)
        for some in np.array_split(np.arange(len(which)), len(which) // 4096 + 1):  # bounds the memory
            theirs, ours = places[some, None] + span, self._examples[which[some], None] + span
            self._found[which[some]] = (codes[theirs] == self.codes[ours]).all(axis=1)

    def _rows(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self._shift).view(np.int64)

    @property
    def share(self) -> float:
        """The share of the windows that were found, from 0 to 1."""
        return float(self._found[self._which].mean()) if len(self) else 0.0

    def covered(self) -> np.ndarray:
        """For each of `codes` (N,), whether it lies in a window that was found; bool."""
        change = np.zeros(len(self.codes) + 1, np.int64)
        starts = self._starts[self._found[self._which]]
        change[starts] += 1
        change[starts + self.width] -= 1
        return np.cumsum(change)[:-1] > 0
