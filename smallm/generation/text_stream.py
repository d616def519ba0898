"""`TextStream`: one text as it is generated, which can be left, continued and branched."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from threading import Lock
from typing import Any, Generic, NamedTuple, Self, TypeVar

from smallm.generation import sequence_state, speculative
from smallm.generation.draft_table import DraftTable
from smallm.generation.rng import Rng
from smallm.generation.sequence_state import Prediction, SequenceState
from smallm.generation.speculative import SpeculativeDecoder, drafts_per_pass
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.options import with_hints

Piece = TypeVar("Piece")


class TextChunk(NamedTuple):
    """Some characters of one of several texts."""

    number: int
    """Which text: the index of its seed text."""
    text: str
    logprobs: list[float]
    """As `TextStream.logprobs`; empty unless `logprobs=True`."""
    last: bool
    """Whether this chunk ends the text."""


class ResumableIterator(ABC, Generic[Piece]):
    """An iterator that an exception leaves where it was: the next call gives the same piece. Threads take turns.

    `_next` sets `_undo` before each of its steps. A piece counts as given when `__next__` returns; no signal handler
    can run between two plain assignments, so that they are made together or not at all.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._undo: tuple[Callable[[Any], None], Any] | None = None
        """What takes back the steps since the last piece was given, and its argument."""

    @abstractmethod
    def _next(self) -> Piece | None:
        """Computes the next piece; something empty at the end."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        undo = None
        try:
            with self._lock:
                self._recover()
                piece = self._next()
                undo, self._undo = self._undo, None
            if piece:
                return piece
        except BaseException:
            self._undo = undo or self._undo
            raise
        raise StopIteration

    def _recover(self) -> None:
        """After an exception, goes back to the beginning of the step that it has ended."""
        if self._undo:
            rewind, mark = self._undo
            rewind(mark)
            self._undo = None


@with_hints
class TextStream(ResumableIterator[str]):
    """An iterator over the new text, in pieces of one or more whole characters.

    Nothing is computed ahead of what the caller asks for, except drafts. A loop over the stream may end at any time,
    also by an exception within a step (Ctrl-C, for instance); the next loop continues with the same text. The memory
    does not grow with the text. Threads that share a stream take turns.
    """

    def __init__(self, session: Session, state: SequenceState, table: DraftTable | None = None):
        self._session, self._state = session, state
        self._cache = KVCache(session)
        count = drafts_per_pass(session.manifest.precision, session.layer_bytes)
        self._speculative = SpeculativeDecoder(self._cache, table, count, state.sampling.temperature)
        self._kept: Prediction | None = None  # after the text so far, if `branch` has computed it already
        self.logprobs: list[float] = []
        """With `logprobs=True`, for each character of the last piece: ln of its probability at temperature 1 with all
        characters allowed, the sum over its ids."""
        super().__init__()

    @property
    def done(self) -> bool:
        """Whether the text is complete."""
        return self._state.done

    def _next(self) -> str:
        state = self._state
        while not (state.ready or state.done):
            self._undo = None  # the step before is final
            self._undo = self._rewind, self._mark()
            state.choose(*self._prediction())
            self._kept = None
        text = state.take()
        if state.keeps_logprobs:
            self.logprobs = state.take_logprobs(len(text))
        return text

    def branch(self, rng_seed: int | None = None, stream_number: int = 0) -> "TextStream":
        """A new stream that continues from here independently, without computing the text so far again.

        rng_seed, stream_number: the random numbers of the new stream; without rng_seed it would write the same text as
        this stream. Raises `UserError` for a value of the wrong type or out of range.
        """
        new = Rng(0 if rng_seed is None else rng_seed, stream_number)
        rng = None if rng_seed is None else new
        with self._lock:
            self._recover()
            other = copy(self)
            other._lock, other._state = Lock(), self._state.copy()
            if not self._state.done:
                self._undo = self._rewind, self._mark()
                logits, _ = self._prediction()
                self._kept = other._kept = logits.copy(), None
                self._speculative.roll_back()
                self._undo = None
                other._cache = KVCache(self._session)
                other._cache.restore(self._cache.snapshot())
                other._speculative = self._speculative.with_cache(other._cache)
            other._state.rng = rng or other._state.rng
            return other

    def _mark(self) -> "_Mark":
        return self._state.mark(), self._speculative.mark(), self._cache.end, self._kept

    def _rewind(self, mark: "_Mark") -> None:
        """Goes back to the point that `_mark` returned; the same ids follow again."""
        state, speculative, end, self._kept = mark
        self._state.rewind(state)
        self._speculative.rewind(speculative)
        self._cache.rewind(end)

    def _prediction(self) -> Prediction:
        """The prediction after all of the text so far."""
        if self._kept is not None:
            return self._kept
        state, cache = self._state, self._cache
        accepted = self._speculative.accept(state)
        if accepted is not None:
            return accepted
        if cache.longest == cache.block_size and state.config.overflow == "slide":
            cache.slide()
        if 0 < cache.longest < cache.block_size:
            return self._speculative.predict(state)
        window = state.window(fresh=cache.longest == 0)
        cache.reset()
        return cache.prefill(window), None


class TextsInTurn(ResumableIterator[TextChunk]):
    """The chunks of several texts, one text after the other."""

    def __init__(self, texts: int, stream_of: Callable[[int], TextStream]):
        """texts: their number. stream_of: makes the stream of a text when its turn comes."""
        super().__init__()
        self._texts, self._stream_of = texts, stream_of
        self._number = 0  # of the present text
        self._stream: TextStream | None = None  # None between two texts

    def _next(self) -> TextChunk | None:
        number = self._number
        if number == self._texts:
            return None
        stream = self._stream or self._stream_of(number)
        self._stream, stream._undo, self._undo = stream, None, (self._rewind, (number, stream))
        text = stream._next()
        if stream.done:
            self._number, self._stream = number + 1, None
        return TextChunk(number, text, stream.logprobs if text else [], stream.done)

    def _rewind(self, mark: tuple[int, TextStream]) -> None:
        self._number, self._stream = mark
        self._stream._recover()


_Mark = tuple[sequence_state.Mark, speculative.Mark, int, Prediction | None]
