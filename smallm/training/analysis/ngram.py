"""Interpolated modified Kneser-Ney over ids (Chen and Goodman 1999): what counting alone can learn of a text.

The probability of an id after a context is that of its count there, less a discount; what the discounts give free is
shared out by the same model with a shorter context. The longest context goes by plain counts, the shorter ones by the
number of different ids that stand before an n-gram. Below all is the uniform distribution over the vocabulary.

An n-gram is one number, its ids packed from the oldest in the highest bits to the newest in the lowest, so that the
n-grams of all orders come from one sorted array.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

HIGHEST_ORDER = 8  # ids of an n-gram: up to seven before the one that is predicted
KEY_BITS = 64
HELD_OUT, MAX_HELD_OUT = 0.05, 50_000  # of the training ids, at their end, on which the order is chosen


@dataclass(frozen=True, eq=False)
class Level:
    """The n-grams of one order: sorted, each with its discounted share; their contexts, each with what is left over."""

    bits: int
    grams: np.ndarray
    shares: np.ndarray
    contexts: np.ndarray
    left: np.ndarray

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray, bits: int) -> "Level":
        """grams: (n,) uint64, sorted, each once; counts: how often each occurs."""
        contexts = grams >> np.uint64(bits)
        starts = _starts(contexts)
        totals = np.add.reduceat(counts, starts)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        left = np.add.reduceat(discounts, starts) / totals
        shares = (counts - discounts) / np.repeat(totals, np.diff(starts, append=len(grams)))
        return cls(bits, grams, shares, contexts[starts], left)

    def probabilities(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Of the last id of each n-gram after the others, (n,); shorter: the same with one id less before it."""
        known, place = _find(self.contexts, grams >> np.uint64(self.bits))
        result = np.where(known, self.left[place], 1.0) * shorter
        known, place = _find(self.grams, grams)
        return result + np.where(known, self.shares[place], 0.0)


class NGram:
    """The counts of some ids, from which the models of all orders up to the highest are made."""

    def __init__(self, ids: np.ndarray, vocabulary_size: int, highest: int = HIGHEST_ORDER):
        """ids: (N,), at least 2. The highest order is lower where so many different ids do not fit into a key."""
        self._used = np.unique(ids)
        self._bits = max(1, len(self._used).bit_length())  # 0 stands for all that do not occur
        self.highest = max(1, min(highest, KEY_BITS // self._bits, len(ids)))
        self._uniform = 1 / vocabulary_size
        keys = np.sort(self._pack(self._codes(ids), self.highest))
        starts = _starts(keys)
        self._grams, self._counts = keys[starts], np.diff(starts, append=len(keys))

    def bits(self, before: np.ndarray, ids: np.ndarray) -> Iterator[float]:
        """Bits that the model of order 1, 2, ... needs for all `ids` (n,), which stand after `before`."""
        codes = self._codes(np.concatenate([before[len(before) - min(len(before), self.highest) :], ids]))
        shorter = np.full(len(ids), self._uniform)
        for order in range(1, self.highest + 1):
            grams = self._pack(np.concatenate([np.zeros(order, np.uint64), codes]), order)[-len(ids) :]
            level = Level.of(*self._plain(order), self._bits)
            yield float(-np.log2(level.probabilities(grams, shorter)).sum())
            if order < self.highest:
                shorter = Level.of(*self._continued(order), self._bits).probabilities(grams, shorter)

    def _plain(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of this order, and how often each occurs."""
        grams = self._grams >> np.uint64(self._bits * (self.highest - order))
        starts = _starts(grams)
        return grams[starts], np.add.reduceat(self._counts, starts)

    def _continued(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of this order, and after how many different ids each occurs."""
        longer, _ = self._plain(order + 1)
        grams = np.sort(longer & np.uint64((1 << self._bits * order) - 1))
        starts = _starts(grams)
        return grams[starts], np.diff(starts, append=len(grams))

    def _codes(self, ids: np.ndarray) -> np.ndarray:
        known, place = _find(self._used, ids)
        return np.where(known, place + 1, 0).astype(np.uint64)

    def _pack(self, codes: np.ndarray, order: int) -> np.ndarray:
        number = len(codes) - order + 1
        keys = np.zeros(number, np.uint64)
        for i in range(order):
            keys = keys << np.uint64(self._bits) | codes[i : i + number]
        return keys


def best_ngram(train: np.ndarray, val: np.ndarray, vocabulary_size: int) -> tuple[int, float]:
    """The order that suits the end of `train` best, learnt from what is before it; and the bits for `val` with it.

    train, val: ids (N,), val follows train; the model of that order is then learnt from all of `train`.
    """
    cut = len(train) - max(1, min(MAX_HELD_OUT, int(len(train) * HELD_OUT)))
    trials = list(NGram(train[:cut], vocabulary_size).bits(train[:cut], train[cut:]))
    order = 1 + int(np.argmin(trials))
    *_, bits = NGram(train, vocabulary_size, order).bits(train, val)
    return order, bits


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken off counts of 0, 1, 2, and 3 or more; from how many n-grams occur once to four times."""
    ones, twos, threes, fours = (max(1, int(np.count_nonzero(counts == n))) for n in range(1, 5))
    y = ones / (ones + 2 * twos)
    wanted = [0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
    return np.clip(wanted, [0, 0.05, 0.05, 0.05], [0, 0.95, 1.95, 2.95])  # few n-grams tell little


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _find(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value is there, and at which place (any, if not)."""
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values, place
