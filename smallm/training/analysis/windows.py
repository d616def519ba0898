"""Finds the windows (n-grams of characters) that two texts have in common, by their hashes."""

from collections.abc import Sequence

import numpy as np

from smallm.training.analysis.characters import PIECE, code_points

FACTOR = np.uint64(0x9E3779B97F4A7C15)
SEPARATOR = "\ud800"  # between texts; a text that was read from a file cannot contain this character
MAX_FILTER_BITS = 25  # 32 MB
REBUILD_SHARE = 0.02  # of the windows must be newly found before the filter is built again without them


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

    def __init__(self, texts: Sequence[str], width: int):
        """texts: a window lies within one of them."""
        self.width, self.text = width, SEPARATOR.join(texts)
        self.characters = sum(map(len, texts))
        self._windows = sum(max(0, len(text) - width + 1) for text in texts)
        self._hashes, self._which = np.unique(window_hashes(code_points(self.text), width), return_inverse=True)
        self._found = np.zeros(len(self._hashes), bool)
        bits = min(MAX_FILTER_BITS, max(10, (32 * len(self._hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)  # a fast test that lets few other hashes pass
        self._build_filter()

    def _build_filter(self) -> None:
        """Leaves out the windows that were found: a text with many repeats would contain them again and again."""
        self._filter[:] = False
        self._filter[self._rows(self._hashes[~self._found])] = True
        self._left_out = np.count_nonzero(self._found)

    def find(self, hashes: np.ndarray) -> None:
        """Marks the windows that another text, of whose windows these are the hashes, contains."""
        hashes = hashes[self._filter[self._rows(hashes)]]
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        self._found[place[self._hashes[place] == hashes]] = True
        if np.count_nonzero(self._found) > self._left_out + REBUILD_SHARE * len(self._found):
            self._build_filter()

    def search(self, codes: np.ndarray) -> "WindowSet":
        """Marks the windows that another text with these code points (n,) contains; returns this set."""
        for start in range(0, len(codes), PIECE):
            self.find(window_hashes(codes[start : start + PIECE + self.width - 1], self.width))
        return self

    def starts(self) -> np.ndarray:
        """The positions in `text` of the windows that were found."""
        return np.flatnonzero(self._found[self._which])

    def share(self) -> float:
        """The share of the windows that were found, from 0 to 1."""
        return len(self.starts()) / max(1, self._windows)

    def covered(self) -> int:
        """The number of characters of the texts that lie in a window which was found."""
        return int(np.minimum(np.diff(self.starts(), append=1 << 62), self.width).sum())

    def _rows(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self._shift).view(np.int64)
