"""An n-gram model of ids with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999).

The probability of an id after a context is its discounted count there; the mass that the discounts set free is
distributed by the model with a context shorter by one id. The highest order uses plain counts, the lower orders the
number of distinct ids that precede an n-gram. The lowest order is interpolated with the uniform distribution.

An n-gram is packed into one integer, the oldest id in the highest bits, so that one sorted array holds the n-grams of
all orders.
"""

from collections.abc import Iterator

import numpy as np

MAX_ORDER = 8  # ids of an n-gram: up to seven before the predicted one
KEY_BITS = 64
HELD_OUT, MAX_HELD_OUT = 0.05, 50_000  # share of the training ids, at their end, on which the order is chosen


class NGram:
    """The n-gram counts of a training text, from which the models of all orders are derived."""

    def __init__(self, ids: np.ndarray, vocabulary_size: int, max_order: int = MAX_ORDER):
        """ids: (N,) with N >= 2. The order is limited further if n-grams of so many distinct ids exceed 64 bits."""
        self._used = np.unique(ids)
        self._bits = max(1, len(self._used).bit_length())  # 0 stands for all ids that do not occur
        self.max_order = max(1, min(max_order, KEY_BITS // self._bits, len(ids)))
        self._uniform = 1 / vocabulary_size
        keys = np.sort(self._pack(self._codes(ids), self.max_order))
        starts = _starts(keys)
        self._grams, self._counts = keys[starts], np.diff(starts, append=len(keys))

    def bits(self, before: np.ndarray, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the bits (n,) that the model of order 1, 2, ... needs for each of `ids`, which follow `before`."""
        codes = self._codes(np.concatenate([before[len(before) - min(len(before), self.max_order) :], ids]))
        shorter = np.full(len(ids), self._uniform)
        for order in range(1, self.max_order + 1):
            grams = self._pack(np.concatenate([np.zeros(order, np.uint64), codes]), order)[-len(ids) :]
            yield -np.log2(_probabilities(grams, shorter, *self._plain(order), self._bits))
            if order < self.max_order:
                shorter = _probabilities(grams, shorter, *self._continued(order), self._bits)

    def _plain(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of this order and their counts."""
        grams = self._grams >> np.uint64(self._bits * (self.max_order - order))
        starts = _starts(grams)
        return grams[starts], np.add.reduceat(self._counts, starts)

    def _continued(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams of this order and the numbers of distinct ids that precede them."""
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
    """Chooses the order on the end of `train`; returns it and the bits that the model needs for `val`.

    train, val: ids (N,); `val` follows `train`. The final model is trained on all of `train`.
    """
    cut = len(train) - max(1, min(MAX_HELD_OUT, int(len(train) * HELD_OUT)))
    trials = [bits.sum() for bits in NGram(train[:cut], vocabulary_size).bits(train[:cut], train[cut:])]
    order = 1 + int(np.argmin(trials))
    *_, bits = NGram(train, vocabulary_size, order).bits(train, val)
    return order, float(bits.sum())


def _probabilities(
    grams: np.ndarray, shorter: np.ndarray, known: np.ndarray, counts: np.ndarray, bits: int
) -> np.ndarray:
    """Probabilities (n,) of the last id of each of `grams` given the others.

    shorter: (n,), the same with one id less of context. known: (m,) uint64, the n-grams of the training text, sorted
    and distinct; counts: (m,). bits: of an id.
    """
    contexts = known >> np.uint64(bits)
    starts = _starts(contexts)
    totals = np.add.reduceat(counts, starts)
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    left = np.add.reduceat(discounts, starts) / totals
    shares = (counts - discounts) / np.repeat(totals, np.diff(starts, append=len(known)))
    found, place = _find(contexts[starts], grams >> np.uint64(bits))
    result = np.where(found, left[place], 1.0) * shorter
    found, place = _find(known, grams)
    return result + np.where(found, shares[place], 0.0)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts for counts of 0, 1, 2, and 3 or more, estimated from the numbers of n-grams that occur 1 to 4 times."""
    ones, twos, threes, fours = (max(1, int(np.count_nonzero(counts == n))) for n in range(1, 5))
    y = ones / (ones + 2 * twos)
    discounts = [0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
    return np.clip(discounts, [0, 0.05, 0.05, 0.05], [0, 0.95, 1.95, 2.95])  # few n-grams give poor estimates


def _starts(ordered: np.ndarray) -> np.ndarray:
    """The positions at which runs of equal values begin."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _find(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value is in `ordered`, and its position (arbitrary if not)."""
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values, place
