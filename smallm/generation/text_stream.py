"""`TextStream`: one text as it is generated, which can be left, continued and branched."""

from copy import copy
from typing import NamedTuple

from smallm.errors import UserError
from smallm.generation.draft_table import DraftTable
from smallm.generation.rng import Rng
from smallm.generation.sequence_state import Prediction, SequenceState
from smallm.generation.speculative import SpeculativeDecoder, drafts_per_pass
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session


class TextChunk(NamedTuple):
    """Some characters of one of several texts."""

    number: int
    """Which text: the index of its seed text."""
    text: str
    logprobs: list[float]
    """As `TextStream.logprobs`; empty unless `logprobs=True`."""
    last: bool
    """Whether this chunk ends the text."""


class TextStream:
    """An iterator over the new text, in pieces of one or more whole characters.

    Nothing is computed ahead of what the caller asks for, except drafts. A loop over the stream may end at any time;
    the next loop continues there. The memory does not grow with the text. A stream belongs to one thread at a time.
    """

    def __init__(self, session: Session, state: SequenceState, table: DraftTable | None = None):
        self._session, self._state = session, state
        self._cache = KVCache(session)
        count = drafts_per_pass(session.manifest.precision, session.layer_bytes)
        self._speculative = SpeculativeDecoder(self._cache, table, count, state.sampling.temperature)
        self._kept: Prediction | None = None  # after the text so far, if `branch` has computed it already
        self._interrupted = False
        self._length = 0  # of the cache before the last pass
        self.logprobs: list[float] = []
        """With `logprobs=True`, for each character of the last piece: ln of its probability at temperature 1 with all
        characters allowed, the sum over its ids."""

    @property
    def done(self) -> bool:
        """Whether the text is complete."""
        return self._state.done

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> str:
        """The next piece. Raises `UserError` if an earlier exception (for instance Ctrl-C) left a step half done."""
        if self._interrupted:
            raise UserError("this text was interrupted within a step and cannot continue; start a new stream")
        state = self._state
        while not state.ready:
            if state.done:
                raise StopIteration
            draws = state.rng.draws
            try:
                prediction = self._prediction()
                state.choose(*prediction)
                self._kept = None
            except BaseException:
                self._interrupted = not self._can_repeat(draws)
                raise
        text = state.take()
        if state.keeps_logprobs:
            self.logprobs = state.take_logprobs(len(text))
        return text

    def branch(self, rng_seed: int | None = None, stream_number: int = 0) -> "TextStream":
        """A new stream that continues from here independently, without computing the text so far again.

        rng_seed, stream_number: the random numbers of the new stream; without rng_seed it would write the same text as
        this stream. Raises `UserError` for a value out of range.
        """
        rng = None if rng_seed is None else Rng(rng_seed, stream_number)
        other = copy(self)
        if not self._state.done:
            logits, _ = self._prediction()
            self._kept = other._kept = logits.copy(), None
            self._speculative.roll_back()
            other._cache = KVCache(self._session)
            other._cache.restore(self._cache.snapshot())
            other._speculative = self._speculative.with_cache(other._cache)
        other._state = self._state.copy()
        other._state.rng = rng or other._state.rng
        return other

    def _can_repeat(self, draws: int) -> bool:
        """Whether a step that raised an exception has changed nothing that matters."""
        longest, config = self._cache.longest, self._state.config
        unchanged = longest == self._length or (longest == 0 and config.overflow == "crop")
        return unchanged and self._state.rng.draws == draws and not self._speculative.pending

    def _prediction(self) -> Prediction:
        """The prediction after all of the text so far."""
        if self._kept is not None:
            return self._kept
        state, cache = self._state, self._cache
        accepted = self._speculative.accept(state)
        if accepted is not None:
            return accepted
        self._length = cache.longest
        if cache.longest == cache.block_size and state.config.overflow == "slide":
            cache.slide()
        if 0 < cache.longest < cache.block_size:
            return self._speculative.predict(state)
        window = state.window(fresh=cache.longest == 0)
        cache.reset()
        return cache.prefill(window), None
