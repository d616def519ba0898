"""The KV cache: keys and values that the model reads and extends in place, so that a step copies nothing."""

from collections.abc import Sequence

import numpy as np

from smallm.inference.session import Session


class KVCache:
    """Keys and values of `streams` independent texts, up to `block_size` ids each.

    The returned logits are views of a buffer and valid until the next call. After an exception within a method, also
    Ctrl-C, `rewind` restores the cache. Shapes: B streams, T time, V vocabulary.
    """

    def __init__(self, session: Session, streams: int = 1):
        """An empty cache. Raises `UserError` if the graph does not have the inputs and outputs of a smallm model."""
        m = session.manifest
        self.block_size, self.streams = m.block_size, streams
        self.lengths = np.zeros(streams, np.int64)
        """Number of ids in each stream (B,)."""
        self.longest = 0
        """The largest of `lengths`."""
        self._slid = np.zeros(streams, np.int64)  # ids of each stream that `slide` has removed
        self._unfinished: tuple[int, np.ndarray, int] | None = None  # arguments of `_complete` that are not stored yet
        self._session = session
        self._keys_values = np.zeros((2 * m.n_layer, streams, m.n_kv_head, m.block_size, m.head_dim), np.float32)
        self._mask = np.zeros((streams, m.block_size), np.int64)  # 1 where the cache holds an id
        self._row: _Rows
        self._verifier: _Rows | None
        self._bind()

    def prefill(self, ids: np.ndarray, stream: int = 0) -> np.ndarray:
        """Appends ids (T,) to one stream, 1 <= T <= the free room; returns the logits (V,) after the last id."""
        start, T = int(self.lengths[stream]), len(ids)
        assert 0 < T <= self.block_size - start, (T, self.lengths)
        if self._row.first != stream:
            self._row = _Rows(self._session, self._keys_values, self._mask, stream, 1)
        self._mask[stream, start : start + T] = 1
        logits: np.ndarray = self._row.prefill(np.asarray(ids)[None])[0]
        self.lengths[stream] = start + T
        self.longest = max(self.longest, start + T)
        return logits

    def decode_batch(self, ids: np.ndarray) -> np.ndarray:
        """Appends one id to each stream (B,); returns the logits (B, V). The streams may differ in length."""
        assert len(ids) == self.streams, (ids, self.streams)
        assert self.longest < self.block_size, self.lengths
        self._mask[self._stream_indices, self.lengths] = 1
        logits = self._rows.decode_batch(ids)
        self.lengths += 1
        self.longest += 1
        return logits

    def decode_one(self, id: int) -> np.ndarray:
        """`decode_batch` for a single stream; returns the logits (V,).

        Takes a plain int: building a one-element array costs as much as ten graph nodes.
        """
        at = self.longest
        assert at < self.block_size, self.lengths
        self._first_mask[at] = 1
        logits = self._row.decode_one(id)
        self.lengths[0] = self.longest = at + 1
        return logits

    def verify(self, ids: Sequence[int]) -> np.ndarray:
        """Appends ids (T,) to a single stream; returns the logits (T, V) after each id. T is the same in every call."""
        start, T = self.longest, len(ids)
        assert self.block_size - start >= T > 0, (T, self.lengths)
        self._first_mask[start : start + T] = 1
        if self._verifier is None:
            self._verifier = _Rows(self._session, self._keys_values, self._mask, 0, 1, T)
        logits = self._verifier.verify(ids)
        self.lengths[0] = self.longest = start + T
        return logits

    def truncate(self, n: int) -> None:
        """Removes the last n ids of a single stream."""
        self.longest -= n
        self._first_mask[self.longest : self.longest + n] = 0
        self.lengths[0] = self.longest

    @property
    def end(self) -> int:
        """Number of ids of a single stream, with those that `slide` has removed; for `rewind`."""
        return self.longest + int(self._slid[0])

    @property
    def ends(self) -> np.ndarray:
        """`end` of each stream (B,)."""
        return self.lengths + self._slid

    def rewind(self, end: int | np.ndarray) -> None:
        """Takes the streams back to where `end` or `ends` had this value, after completed or interrupted calls.

        Since then each stream may have been extended by one call; where it was full, `slide` or `reset` may come
        before, and after `reset` the contents are lost, but not the length. May be repeated.
        """
        if self._unfinished:
            self._complete(*self._unfinished)
        self.lengths = np.minimum(end - self._slid, self.block_size)
        self.longest = int(self.lengths.max())
        self._mask[:] = np.arange(self.block_size) < self.lengths[:, None]
        self._bind()  # the input of an interrupted `prefill` may still be bound

    def reset(self, stream: int | None = None) -> None:
        """Empties one stream, or all streams."""
        at = slice(None) if stream is None else stream
        self._mask[at], self.lengths[at], self._slid[at] = 0, 0, 0
        self.longest = int(self.lengths.max())

    def slide(self, stream: int = 0) -> None:
        """Makes room in a full stream: moves the ids that the attention window still sees to the start of the cache.

        The keys are rotated back by the distance that they move. Rotary attention depends only on distances between
        positions (Su et al. 2021), so the logits equal those of an endless cache.
        """
        m = self._session.manifest
        length, kept, half = int(self.lengths[stream]), m.window - 1, m.head_dim // 2
        moved = self._keys_values[:, stream, :, length - kept : length].copy()  # (2 n_layer, n_kv_head, kept, head_dim)
        angles = (length - kept) * m.rope_theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        keys = moved[0::2]
        low, high = keys[..., :half].copy(), keys[..., half:].copy()
        keys[..., :half], keys[..., half:] = low * cos + high * sin, high * cos - low * sin
        self._unfinished = slide = stream, moved, int(self._slid[stream]) + length - kept
        self._complete(*slide)

    def _complete(self, stream: int, moved: np.ndarray, slid: int) -> None:
        """Stores the result of a slide: keys and values at their new positions, and the ids removed since the reset."""
        kept = moved.shape[2]
        self._keys_values[:, stream, :, :kept] = moved
        self._mask[stream, kept:], self.lengths[stream], self._slid[stream] = 0, kept, slid
        self.longest = int(self.lengths.max())
        self._unfinished = None

    def snapshot(self, stream: int = 0) -> np.ndarray:
        """A copy of one stream, for `restore`: keys and values (2 n_layer, n_kv_head, length, head_dim)."""
        return self._keys_values[:, stream, :, : self.lengths[stream]].copy()

    def restore(self, snapshot: np.ndarray, stream: int = 0) -> None:
        """Replaces one stream by a snapshot, which may come from another cache of the same model."""
        self.reset(stream)
        length = snapshot.shape[2]
        self._keys_values[:, stream, :, :length] = snapshot
        self._mask[stream, :length], self.lengths[stream] = 1, length
        self.longest = max(self.longest, length)

    def _bind(self) -> None:
        self._stream_indices, self._first_mask = np.arange(self.streams), self._mask[0]
        self._rows = _Rows(self._session, self._keys_values, self._mask, 0, self.streams)
        self._row = self._rows if self.streams == 1 else _Rows(self._session, self._keys_values, self._mask, 0, 1)
        self._verifier = None


class _Rows:
    """Adjacent streams that are computed together, with their arrays bound once.

    The mask always covers block_size positions, so its shape is fixed: a new binding costs as much as ten graph nodes.
    """

    def __init__(
        self, session: Session, keys_values: np.ndarray, mask: np.ndarray, first: int, count: int, length: int = 1
    ):
        """length: number of ids per row in a pass of `verify`; the other methods need 1."""
        self.first = first
        self._binding = session.bind()
        self._run = self._binding.run
        logits = np.zeros((count, length, session.manifest.vocab_size), np.float32)
        self._logits, self._ids = logits[:, 0], np.zeros((count, length), np.int64)
        self._keep = np.array(length == 1, np.int64)  # num_logits_to_keep; 0 = all
        rows = slice(first, first + count)
        for past, present, buffer in zip(session.past, session.present, keys_values[:, rows], strict=True):
            self._binding.input(past, buffer)
            self._binding.output(present, buffer)
        self._binding.output("logits", logits)
        self._binding.input("attention_mask", mask[rows])
        self._binding.input("num_logits_to_keep", self._keep)
        self._binding.input("input_ids", self._ids)
        self._first_ids: np.ndarray = self._ids[0]
        self._first_logits: np.ndarray = self._logits[0]
        self._first_rows: np.ndarray = logits[0]

    def decode_one(self, id: int) -> np.ndarray:
        """Logits (V,) of the first row after this id, which the mask already includes."""
        self._first_ids[0] = id
        self._run()
        return self._first_logits

    def verify(self, ids: Sequence[int]) -> np.ndarray:
        """Logits (T, V) of the first row after each of ids (T,), which the mask already includes."""
        self._first_ids[:] = ids
        self._run()
        return self._first_rows

    def decode_batch(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, V) after ids (B,), which the mask already includes."""
        self._ids[:, 0] = ids
        self._run()
        return self._logits

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, V) after the last of ids (B, T), which the mask already includes."""
        if ids.shape[1] == 1:
            return self.decode_batch(ids[:, 0])
        ids = np.ascontiguousarray(ids, np.int64)  # a local variable keeps the array alive; the binding does not
        self._binding.input("input_ids", ids)
        try:
            self._run()
        finally:
            self._binding.input("input_ids", self._ids)
        return self._logits
