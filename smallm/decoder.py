"""Texts in the making: caches of keys and values that a model reads and extends in place, so a step copies nothing."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from smallm.session import Session


class Snapshot(NamedTuple):
    """What one stream of a `Decoder` had in its cache."""

    cache: np.ndarray
    """Keys and values of every layer (2 n_layer, n_kv_head, length, head_dim); a copy."""

    @property
    def length(self) -> int:
        """Number of ids in it."""
        return self.cache.shape[2]


class Decoder:
    """`streams` texts, each with a cache of its own of up to `block_size` ids. Made by `Session.decoder`.

    Logits are views of a buffer, valid until the next call. Shapes: B streams, T time, V vocabulary.
    """

    def __init__(self, session: "Session", streams: int = 1):
        m = session.manifest
        self.block_size, self.streams = m.block_size, streams
        self.lengths = np.zeros(streams, np.int64)
        """Number of ids in each stream's cache (B,)."""
        self._session = session
        self._cache = np.zeros((2 * m.n_layer, streams, m.n_kv_head, m.block_size, m.head_dim), np.float32)
        self._row = _Rows(session, self._cache, 0, 1)
        self._rows = self._row if streams == 1 else _Rows(session, self._cache, 0, streams)

    def feed(self, ids: np.ndarray, stream: int = 0) -> np.ndarray:
        """Appends ids (T,), one or more, as many as fit, to one stream; returns the logits (V,) after the last."""
        T = len(ids)
        assert 0 < T <= self.block_size - self.lengths[stream], (T, self.lengths)
        if self._row.first != stream:
            self._row = _Rows(self._session, self._cache, stream, 1)
        lengths = self.lengths[stream : stream + 1]  # a view
        lengths += T
        return self._row.run(np.asarray(ids, np.int64).reshape(1, T), lengths)[0]

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Appends one id to each stream (B,), whatever the length of each; returns the logits (B, V) after them."""
        assert len(ids) == self.streams, (ids, self.streams)
        assert self.lengths.max() < self.block_size, self.lengths
        self.lengths += 1
        return self._rows.run(np.asarray(ids, np.int64).reshape(-1, 1), self.lengths)

    def reset(self, stream: int | None = None) -> None:
        """Forgets one stream's text, or all."""
        self.lengths[slice(None) if stream is None else stream] = 0

    def snapshot(self, stream: int = 0) -> Snapshot:
        """A copy of what one stream has read, to go on from later, or many times."""
        return Snapshot(self._cache[:, stream, :, : self.lengths[stream]].copy())

    def restore(self, snapshot: Snapshot, stream: int = 0) -> None:
        """Puts a stream, of this decoder or another of the same model, where it was."""
        self._cache[:, stream, :, : snapshot.length] = snapshot.cache
        self.lengths[stream] = snapshot.length

    def select(self, streams: np.ndarray) -> None:
        """Keeps these streams (n,), at most as many as there are, in this order, and forgets the others."""
        longest = self.lengths[streams].max()
        self._cache[:, : len(streams), :, :longest] = self._cache[:, streams, :, :longest]
        self._cache = self._cache[:, : len(streams)]
        self.streams, self.lengths = len(streams), self.lengths[streams].copy()
        self._rows = _Rows(self._session, self._cache, 0, self.streams)
        if self.streams == 1:
            self._row = self._rows


class _Rows:
    """Streams side by side that are computed together, and all that ONNX Runtime is told about them once."""

    def __init__(self, session: "Session", cache: np.ndarray, first: int, count: int):
        self.first, self._session = first, session
        self._binding = session.binding()
        self._logits = np.zeros((count, 1, session.manifest.vocab_size), np.float32)
        self._keep = np.ones((), np.int64)
        self._kept: tuple[np.ndarray, ...] = ()  # the binding holds no references
        for past, present, buffer in zip(session.past, session.present, cache[:, first : first + count], strict=True):
            self._bind_input(past, buffer)
            self._binding.bind_output(present, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        self._binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        self._bind_input("num_logits_to_keep", self._keep)

    def run(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """ids (B, T), lengths (B,) with them -> logits (B, V) after the last of each."""
        mask = np.arange(lengths.max()) < lengths[:, None]
        self._kept = ids, mask = np.ascontiguousarray(ids), mask.astype(np.int64)
        self._bind_input("input_ids", ids)
        self._bind_input("attention_mask", mask)
        self._session.run_bound(self._binding)
        return self._logits[:, 0]

    def _bind_input(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
