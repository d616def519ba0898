"""`NativeStream`: a `TextStream` that the C library generates."""

from copy import copy
from dataclasses import asdict
from threading import Lock

from smallm.generation.rng import Rng
from smallm.generation.sequence_state import SequenceState
from smallm.generation.text_stream import ResumableIterator, TextStream
from smallm.inference.native import NativeContext, NativeModel
from smallm.options import with_hints


@with_hints
class NativeStream(TextStream):
    """A text in C: the same text, in the same pieces."""

    def __init__(self, model: NativeModel, seed: str, state: SequenceState):
        """state: where the text begins, which this stream does not change; seed: the text of its ids."""
        self._context, self._keeps_logprobs = NativeContext(model), state.keeps_logprobs
        changed = {"stream_number": state.stream_number, "logprobs": state.keeps_logprobs}
        self._context.start(seed, asdict(state.config) | changed)
        self._done, self._piece = state.done, ""  # the piece was computed, but may not be given yet
        ResumableIterator.__init__(self)
        self.logprobs: list[float] = []

    @property
    def done(self) -> bool:
        """Whether the text is complete."""
        return self._done

    def _next(self) -> str:
        if not self._piece:
            text = self._context.piece()
            logprobs = self._context.logprobs() if self._keeps_logprobs and text else []
            self._piece, self.logprobs = text, logprobs
        done = self._context.finish_piece()
        text = self._piece
        self._undo = self._restore, text
        self._piece, self._done = "", done
        return text

    def _restore(self, text: str) -> None:
        self._piece, self._done = text, False

    def branch(self, rng_seed: int | None = None, stream_number: int = 0) -> "NativeStream":
        """As `TextStream.branch`."""
        Rng(rng_seed or 0, stream_number)
        with self._lock:
            self._recover()
            self._piece = self._piece or self._context.computed_piece()
            other = copy(self)
            other._lock, other._context = Lock(), self._context.copy()
            if rng_seed is not None:
                other._context.reseed(rng_seed, stream_number)
            return other
