"""Many texts at a time: one pass of the model gives each of them its next id."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from smallm.generation.sequence_state import SequenceState
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.model_file.manifest import Manifest

MAX_STREAMS = 64
MIN_STREAMS = 4  # fewer texts are not faster together than one after the other with drafts, see benchmarks/batches.py
MAX_CACHE_BYTES = 1 << 28  # of keys and values, unless a single text needs more
MIN_USED = 0.75  # with a smaller fraction of streams in use the others are dropped, which copies the caches in use


def generate_batch(session: Session, states: Iterable[SequenceState]) -> Iterator[SequenceState]:
    """Yields a state each time it has text to take or is done; waiting states take the streams of those that are done.

    All states have the same config.
    """
    states = iter(states)
    first = list(islice(states, max_streams(session.manifest)))
    return _Batch(session, first, states).run() if first else iter(())


def suits_batch(model: Manifest, texts: int, drafts: int) -> bool:
    """Whether this number of texts is faster in a batch than one after the other with `drafts` drafts per pass.

    Depends on the model and the number alone, so that the same call gives the same text.
    """
    return min(texts, max_streams(model)) >= (MIN_STREAMS if drafts else 2)


def max_streams(model: Manifest) -> int:
    """Number of texts that are generated at a time."""
    cache_bytes = 8 * model.n_layer * model.n_kv_head * model.head_dim * model.block_size  # of a text, float32
    return max(1, min(MAX_STREAMS, MAX_CACHE_BYTES // cache_bytes))


class _Batch:
    """The streams of a KV cache; each has a state, or None once no text is left for it."""

    def __init__(self, session: Session, states: list[SequenceState], waiting: Iterator[SequenceState]):
        self._states: list[SequenceState | None] = list(states)
        self._waiting = waiting
        self._weights = states[0].weights
        self._cache = KVCache(session, len(states))
        self._fresh = np.ones(len(states), bool)  # streams whose cache holds nothing of their text, or without a text
        self._steps = 0  # number of steps until the longest stream is full
        self._logits = np.zeros((len(states), session.manifest.vocab_size), np.float32)

    def run(self) -> Iterator[SequenceState]:
        ended = any(state is not None and state.done for state in self._states)
        while any(self._states):
            if ended:
                yield from self._replace_done()
                self._drop_unused()
                ended = False
            self._predict()
            for state, logits, weights in zip(self._states, self._logits, self._weights(self._logits), strict=True):
                if state is not None:
                    state.choose(logits, weights)
                    if state.done:
                        ended = True
                    elif state.ready:
                        yield state

    def _replace_done(self) -> Iterator[SequenceState]:
        """Yields the states that are done; waiting states take their streams."""
        self._steps = 0
        for stream, state in enumerate(self._states):
            while state is not None and state.done:  # with max_length 0 a state is done from the start
                yield state
                state = self._states[stream] = next(self._waiting, None)
                self._fresh[stream] = True

    def _drop_unused(self) -> None:
        """Drops the streams without a text if they are too many to carry along."""
        kept = [stream for stream, state in enumerate(self._states) if state is not None]
        if 0 < len(kept) <= MIN_USED * len(self._states):
            self._cache.select(np.array(kept))
            self._states = [self._states[stream] for stream in kept]
            self._fresh, self._logits = self._fresh[kept], self._logits[: len(kept)]

    def _predict(self) -> None:
        """Sets the logits after each text: streams with room in the cache in one pass, the others one by one."""
        if self._steps:
            self._steps -= 1
            self._decode()
            return
        cache, size = self._cache, self._cache.block_size
        for stream in np.flatnonzero(~self._fresh & (cache.lengths == size)).tolist():
            state = self._states[stream]
            assert state is not None  # a stream without a text is fresh
            if state.config.overflow == "slide":
                cache.slide(stream)
        alone = self._fresh | (cache.lengths == size)
        for stream in np.flatnonzero(alone).tolist():
            cache.reset(stream)  # the pass appends an id here too, which is discarded below
        if not alone.all():
            self._decode()
        read: dict[bytes, int] = {}  # window -> the stream that has computed it; equal seed texts are computed once
        for stream in np.flatnonzero(alone).tolist():
            state = self._states[stream]
            cache.reset(stream)
            if state is not None:
                window = state.window(self._fresh[stream])
                other = read.setdefault(window.tobytes(), stream)
                if other == stream:
                    self._logits[stream] = cache.prefill(window, stream)
                else:
                    cache.restore(cache.snapshot(other), stream)
                    self._logits[stream] = self._logits[other]
                self._fresh[stream] = False
        self._steps = size - int(cache.lengths.max())

    def _decode(self) -> None:
        ids = [0 if state is None else state.history[-1] for state in self._states]
        self._logits[:] = self._cache.decode_batch(np.array(ids))
