"""Many texts at a time: one pass of the model gives each of them its next id."""

from collections.abc import Sequence

import numpy as np

from smallm.generation.sequence_state import Mark, SequenceState
from smallm.generation.text_stream import ResumableIterator, TextChunk
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.model_file.manifest import Manifest

MAX_STREAMS = 64
MIN_STREAMS = 4  # fewer texts are not faster together than one after the other with drafts, see benchmarks/batches.py
MAX_CACHE_BYTES = 1 << 28  # of keys and values, unless a single text needs more
MIN_USED = 0.75  # with a smaller fraction of streams in use the others are dropped, which copies the caches in use


def suits_batch(model: Manifest, texts: int, drafts: int) -> bool:
    """Whether this number of texts is faster in a batch than one after the other with `drafts` drafts per pass.

    Depends on the model and the number alone, so that the same call gives the same text.
    """
    return min(texts, max_streams(model)) >= (MIN_STREAMS if drafts else 2)


def max_streams(model: Manifest) -> int:
    """Number of texts that are generated at a time."""
    cache_bytes = 8 * model.n_layer * model.n_kv_head * model.head_dim * model.block_size  # of a text, float32
    return max(1, min(MAX_STREAMS, MAX_CACHE_BYTES // cache_bytes))


class Batch(ResumableIterator[TextChunk]):
    """The chunks of many texts of one config, interleaved; waiting texts take the streams of those that are done."""

    def __init__(self, session: Session, states: Sequence[SequenceState]):
        super().__init__()
        self._session, self._states = session, states
        streams = min(len(states), max_streams(session.manifest))
        self._texts: list[int | None] = list(range(streams))  # of each stream; None once no text is left for it
        self._started = streams  # number of texts that have been given a stream
        self._cache = KVCache(session, streams)
        self._fresh = np.ones(streams, bool)  # streams whose cache holds nothing of their text, or without a text
        self._steps = 0  # number of passes until the longest stream is full
        self._logits = np.zeros((streams, session.manifest.vocab_size), np.float32)
        self._weights: list[np.ndarray | None] = []  # for `SequenceState.choose`, of each stream
        self._turn = streams  # the stream that chooses the next id; after the last stream comes a pass of the model

    def _next(self) -> TextChunk | None:
        while True:
            if self._turn == len(self._texts):
                self._undo = None  # all choices are final
                self._replace_done()
                if self._texts.count(None) == len(self._texts):
                    return None
                self._predict()
            stream, number = self._turn, self._texts[self._turn]
            if number is None:
                self._turn = stream + 1
                continue
            state = self._states[number]
            self._undo = self._rewind_choice, (stream, state, state.mark())
            if not state.done:  # with max_length 0 a text is done from the start
                state.choose(self._logits[stream], self._weights[stream])
            self._turn = stream + 1
            if state.ready or state.done:
                text = state.take()
                return TextChunk(number, text, state.take_logprobs(len(text)), state.done)

    def _rewind_choice(self, mark: tuple[int, SequenceState, Mark]) -> None:
        self._turn, state, before = mark
        state.rewind(before)

    def _rewind_pass(self, ends: np.ndarray) -> None:
        self._cache.rewind(ends)
        self._steps = 0

    def _replace_done(self) -> None:
        """Waiting texts take the streams of those that are done; too many streams without a text are dropped."""
        texts, fresh, started = self._texts.copy(), self._fresh.copy(), self._started
        for stream, number in enumerate(texts):
            if number is not None and self._states[number].done and not fresh[stream]:  # and its end was given
                texts[stream], fresh[stream] = started if started < len(self._states) else None, True
                started += 1
        if started == self._started:
            return
        cache = self._cache
        used = [stream for stream, number in enumerate(texts) if number is not None]
        if 0 < len(used) <= MIN_USED * len(texts):
            cache = KVCache(self._session, len(used))
            for new, old in enumerate(used):
                cache.restore(self._cache.snapshot(old), new)
            texts, fresh = [texts[stream] for stream in used], fresh[used]
        streams = len(texts)
        logits = self._logits[:streams]
        self._texts, self._fresh, self._started, self._cache = texts, fresh, started, cache
        self._logits, self._turn, self._steps = logits, streams, 0

    def _predict(self) -> None:
        """Sets the logits after each text."""
        self._undo = self._rewind_pass, self._cache.ends
        fresh, steps = self._fresh, self._steps - 1
        if steps >= 0:
            self._decode()
        else:
            self._refill()
            fresh = np.array([number is None for number in self._texts])
            steps = self._cache.block_size - self._cache.longest
        weights = list(self._states[0].weights(self._logits))
        self._fresh, self._steps, self._weights, self._turn, self._undo = fresh, steps, weights, 0, None

    def _refill(self) -> None:
        """Sets the logits after each text: streams with room in the cache in one pass, the others one by one."""
        cache, size = self._cache, self._cache.block_size
        if self._states[0].config.overflow == "slide":
            for stream in np.flatnonzero(~self._fresh & (cache.lengths == size)).tolist():
                cache.slide(stream)
        alone = self._fresh | (cache.lengths == size)
        for stream in np.flatnonzero(alone).tolist():
            cache.reset(stream)  # the pass appends an id here too, which is discarded below
        if not alone.all():
            self._decode()
        read: dict[bytes, int] = {}  # window -> the stream that has computed it; equal seed texts are computed once
        for stream in np.flatnonzero(alone).tolist():
            cache.reset(stream)
            number = self._texts[stream]
            if number is None or self._states[number].done:
                continue
            window = self._states[number].window(self._fresh[stream])
            other = read.setdefault(window.tobytes(), stream)
            if other == stream:
                self._logits[stream] = cache.prefill(window, stream)
            else:
                cache.restore(cache.snapshot(other), stream)
                self._logits[stream] = self._logits[other]

    def _decode(self) -> None:
        ids = [0 if number is None else self._states[number].history[-1] for number in self._texts]
        self._logits[:] = self._cache.decode_batch(np.array(ids))
