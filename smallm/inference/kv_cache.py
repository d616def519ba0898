"""Texts in the making: caches of keys and values that a model reads and extends in place, so a step copies nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from smallm.inference.session import Session


class Snapshot(NamedTuple):
    """What one stream of a `KVCache` had in its cache."""

    cache: np.ndarray
    """Keys and values of every layer (2 n_layer, n_kv_head, length, head_dim); a copy."""

    @property
    def length(self) -> int:
        """Number of ids in it."""
        return self.cache.shape[2]


class KVCache:
    """`streams` texts, each with a cache of its own of up to `block_size` ids. Made by `Session.decoder`.

    Logits are views of a buffer, valid until the next call. Shapes: B streams, T time, V vocabulary.
    """

    def __init__(self, session: "Session", streams: int = 1):
        m = session.manifest
        self.block_size, self.streams = m.block_size, streams
        self.lengths = np.zeros(streams, np.int64)
        """Number of ids in each stream's cache (B,)."""
        self.longest = 0
        """The most of them."""
        self._session = session
        self._cache = np.zeros((2 * m.n_layer, streams, m.n_kv_head, m.block_size, m.head_dim), np.float32)
        self._mask = np.zeros((streams, m.block_size), np.int64)  # of all places in the cache, 1 where an id is
        self._bind()

    def feed(self, ids: np.ndarray, stream: int = 0) -> np.ndarray:
        """Appends ids (T,), one or more, as many as fit, to one stream; returns the logits (V,) after the last."""
        start, T = int(self.lengths[stream]), len(ids)
        assert 0 < T <= self.block_size - start, (T, self.lengths)
        if self._row.first != stream:
            self._row = _Rows(self._session, self._cache, self._mask, stream, 1)
        self._mask[stream, start : start + T] = 1
        self.lengths[stream] = start + T
        self.longest = max(self.longest, start + T)
        return self._row.run(np.asarray(ids)[None])[0]

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Appends one id to each stream (B,), whatever the length of each; returns the logits (B, V) after them."""
        assert len(ids) == self.streams, (ids, self.streams)
        assert self.longest < self.block_size, self.lengths
        self._mask[self._numbers, self.lengths] = 1
        self.lengths += 1
        self.longest += 1
        return self._rows.step(ids)

    def push(self, id: int) -> np.ndarray:
        """`step` of a single stream; returns the logits (V,). What an array of one costs, ten nodes of a graph do."""
        at = self.longest
        assert at < self.block_size, self.lengths
        self._places[at] = 1
        self.lengths[0] = self.longest = at + 1
        return self._row.push(id)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Appends ids (T,), as many each time, to a single stream; returns the logits (T, V) after each of them."""
        start, T = self.longest, len(ids)
        assert self.block_size - start >= T > 0, (T, self.lengths)
        self._places[start : start + T] = 1
        self.lengths[0] = self.longest = start + T
        if self._pass is None:
            self._pass = _Rows(self._session, self._cache, self._mask, 0, 1, T)
        return self._pass.read(ids)

    def shorten(self, n: int) -> None:
        """Forgets the last n ids of a single stream."""
        self.longest -= n
        self._places[self.longest : self.longest + n] = 0
        self.lengths[0] = self.longest

    def reset(self, stream: int | None = None) -> None:
        """Forgets one stream's text, or all."""
        at = slice(None) if stream is None else stream
        self._mask[at], self.lengths[at] = 0, 0
        self.longest = int(self.lengths.max())

    def slide(self, stream: int = 0) -> None:
        """Keeps what the model's window still sees, at the beginning of the cache, so that there is room again.

        Keys are turned back by as many positions as they move. Rotary attention depends on distances only (Su et al.
        2021), so what follows is exactly what it would have been in an endless cache.
        """
        m = self._session.manifest
        cache, length = self._cache[:, stream], self.lengths[stream]  # (2 n_layer, n_kv_head, block_size, head_dim)
        kept, half = m.window - 1, m.head_dim // 2
        cache[:, :, :kept] = cache[:, :, length - kept : length]
        angles = (length - kept) * m.rope_theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        keys = cache[0::2, :, :kept]
        low, high = keys[..., :half].copy(), keys[..., half:].copy()
        keys[..., :half], keys[..., half:] = low * cos + high * sin, high * cos - low * sin
        self._mask[stream, kept:], self.lengths[stream] = 0, kept
        self.longest = int(self.lengths.max())

    def snapshot(self, stream: int = 0) -> Snapshot:
        """A copy of what one stream has read, to go on from later, or many times."""
        return Snapshot(self._cache[:, stream, :, : self.lengths[stream]].copy())

    def restore(self, snapshot: Snapshot, stream: int = 0) -> None:
        """Puts a stream, of this decoder or another of the same model, where it was."""
        self.reset(stream)
        self._cache[:, stream, :, : snapshot.length] = snapshot.cache
        self._mask[stream, : snapshot.length], self.lengths[stream] = 1, snapshot.length
        self.longest = max(self.longest, snapshot.length)

    def select(self, streams: np.ndarray) -> None:
        """Keeps these streams (n,), at most as many as there are, in this order, and forgets the others."""
        n, longest = len(streams), self.lengths[streams].max()
        self._cache[:, :n, :, :longest] = self._cache[:, streams, :, :longest]
        self._mask[:n] = self._mask[streams]
        self._cache, self._mask = self._cache[:, :n], self._mask[:n]
        self.streams, self.lengths, self.longest = n, self.lengths[streams], int(longest)
        self._bind()

    def _bind(self) -> None:
        self._numbers, self._places = np.arange(self.streams), self._mask[0]
        self._rows = _Rows(self._session, self._cache, self._mask, 0, self.streams)
        self._row = self._rows if self.streams == 1 else _Rows(self._session, self._cache, self._mask, 0, 1)
        self._pass: _Rows | None = None


class _Rows:
    """Streams side by side that are computed together, and all that ONNX Runtime is told about them, once.

    The mask has a place for each of the cache's, and so always the same shape: a binding costs as much as ten nodes.
    """

    def __init__(
        self, session: "Session", cache: np.ndarray, mask: np.ndarray, first: int, count: int, length: int = 1
    ):
        """length: of the ids at a time, for `read`; the other methods want 1."""
        self.first = first
        self._binding, self._run = session.bound(count)
        logits = np.zeros((count, length, session.manifest.vocab_size), np.float32)
        self._logits, self._id = logits[:, 0], np.zeros((count, length), np.int64)
        self._keep = np.array(length == 1, np.int64)  # 0: all
        rows = slice(first, first + count)
        for past, present, buffer in zip(session.past, session.present, cache[:, rows], strict=True):
            self._bind_input(past, buffer)
            self._binding.bind_output(present, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._bind_input("attention_mask", mask[rows])
        self._bind_input("num_logits_to_keep", self._keep)
        self._bind_input("input_ids", self._id)
        self._first_id, self._first_logits, self._first_rows = self._id[0], self._logits[0], logits[0]

    def push(self, id: int) -> np.ndarray:
        """An id, already in the mask, of the first row -> logits (V,) after it."""
        self._first_id[0] = id
        self._run()
        return self._first_logits

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """ids (T,), already in the mask, of the first row -> logits (T, V) after each."""
        self._first_id[:] = ids
        self._run()
        return self._first_rows

    def step(self, ids: np.ndarray) -> np.ndarray:
        """ids (B,), already in the mask -> logits (B, V) after them."""
        self._id[:, 0] = ids
        self._run()
        return self._logits

    def run(self, ids: np.ndarray) -> np.ndarray:
        """ids (B, T), already in the mask -> logits (B, V) after the last of each."""
        if ids.shape[1] == 1:
            return self.step(ids[:, 0])
        ids = np.ascontiguousarray(ids, np.int64)  # alive until they are read: the binding holds no reference
        self._bind_input("input_ids", ids)
        try:
            self._run()
        finally:
            self._bind_input("input_ids", self._id)
        return self._logits

    def _bind_input(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
