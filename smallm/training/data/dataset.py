"""Windows of the training text in an order that is a pure function of (seed, row); a resume needs no sampler state."""

from collections.abc import Sequence

import numpy as np

from smallm.training.data.store import MappedIds


class CharDataset:
    """Windows of `block_size` ids, with the next id of each position as its target.

    The text is cut into adjacent windows, at an offset that changes with each epoch, and an epoch visits each window
    once, in shuffled order. Row r of the endless sequence of windows belongs to epoch `r // len(dataset)`; a batch is
    `batch_size` consecutive rows. The order depends on the seed alone, not on the number of processes or on a resume.
    """

    def __init__(self, ids: MappedIds | np.ndarray, block_size: int, seed: int = 0):
        """ids: (N,) with N > block_size; only the windows that are asked for are read, so a memory map will do."""
        assert len(ids) > block_size
        self.ids, self.block_size, self.seed = ids, block_size, seed
        self._windows = max(1, (len(ids) - block_size) // block_size)  # whole windows at any offset

    def __len__(self) -> int:
        """The number of windows in an epoch."""
        return self._windows

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """The windows of some rows (B,), each with the id after it: (B, T + 1) int64."""
        starts = self.starts(rows)  # (B,)
        return self.ids[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)

    def sources(self, rows: np.ndarray, noise: float) -> np.ndarray:
        """The positions (B, T) within the windows of some rows (B,) from which noisy inputs take their ids.

        Each position is replaced by a random position of the same window with probability `noise`. The ids that replace
        others are therefore as frequent as in the text. The choice depends on seed, row and position alone.
        """
        T = self.block_size
        places = np.asarray(rows, dtype=np.uint64)[:, None] * np.uint64(T) + np.arange(T, dtype=np.uint64)  # (B, T)
        bits = _mix(_mix(places) + _key(self.seed, -1))
        chosen = (bits >> np.uint64(32)) < np.uint64(noise * 2**32)
        return np.where(chosen, (bits & np.uint64(0xFFFFFFFF)) % np.uint64(T), np.arange(T)).astype(np.int64)

    def starts(self, rows: np.ndarray) -> np.ndarray:
        """The offsets (B,) in the text of the windows of some rows (B,)."""
        T, n = self.block_size, self._windows
        epochs, places = np.divmod(np.asarray(rows, dtype=np.int64), n)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = _key(self.seed, int(epoch))
            phase = int(key[0]) % min(T, len(self.ids) - n * T)
            starts[here] = phase + _shuffled(places[here], n, key) * T
        return starts


class WeightedDataset(CharDataset):
    """Windows of several texts, drawn in proportion to weights. An epoch has as many windows as without weights.

    Each text is a `CharDataset` with an endless sequence of windows. An epoch takes the next windows of each sequence,
    a number in proportion to the weight of the text, and shuffles them.
    """

    def __init__(
        self, ids: MappedIds | np.ndarray, block_size: int, seed: int, ends: Sequence[int], weights: Sequence[float]
    ):
        """ends: where each text ends in `ids`; each has more than `block_size` ids. weights: above 0, any sum."""
        super().__init__(ids, block_size, seed)
        self._offsets = np.array([0, *ends[:-1]])
        lengths = np.diff([0, *ends]).tolist()
        self._texts = [CharDataset(np.broadcast_to(np.uint16(0), length), block_size, seed) for length in lengths]
        shares = np.cumsum([0.0, *weights]) / sum(weights)
        self._bounds = np.rint(shares * len(self)).astype(np.int64)  # of the windows of each text in an epoch

    def starts(self, rows: np.ndarray) -> np.ndarray:
        """The offsets (B,) in the text of the windows of some rows (B,)."""
        epochs, places = np.divmod(np.asarray(rows, dtype=np.int64), len(self))
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = _shuffled(places[here], len(self), _key(self.seed, int(epoch)))
        texts = np.searchsorted(self._bounds, places, "right") - 1
        for text in np.unique(texts):
            here, (first, end) = texts == text, self._bounds[text : text + 2]
            rows_of_text = epochs[here] * (end - first) + places[here] - first
            starts[here] = self._texts[text].starts(rows_of_text) + self._offsets[text]
        return starts


def _key(seed: int, epoch: int) -> np.ndarray:
    """(1,): determines the order of an epoch."""
    return _mix(np.array([seed * _GOLDEN + epoch + 1 & _MASK], dtype=np.uint64))


_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 0xFFFFFFFFFFFFFFFF


def _shuffled(places: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    """Maps `places` by a pseudorandom permutation of range(count) that depends on `key`.

    A four-round Feistel network on the next even number of bits, repeated until the image is in range (cycle walking,
    Black and Rogaway 2002). It needs no table, so a text of any length is shuffled in constant memory.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    images, outside = places.astype(np.uint64), np.ones(len(places), dtype=bool)
    while outside.any():
        x = images[outside]
        left, right = x >> half, x & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right * np.uint64(_GOLDEN) + key + np.uint64(turn)) & mask)
        images[outside] = left << half | right
        outside = images >= count
    return images.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), a 64-bit hash."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
