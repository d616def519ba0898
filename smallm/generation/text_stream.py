"""One text as it comes: an iterator that can be left, gone back to, and branched."""

from copy import copy

from smallm.generation.draft_table import DraftTable
from smallm.generation.sampler import Rng
from smallm.generation.sequence_state import Prediction, SequenceState
from smallm.generation.speculative import SpeculativeDecoder, drafts_per_pass
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session


class TextStream:
    """Gives the new text in pieces of whole characters, and computes no more of it than it is asked for.

    A loop over it may be left at any time; the next one goes on where that stopped. `branch` gives another writer from
    here on. Its memory does not grow with the text.
    """

    def __init__(self, session: Session, draft: SequenceState, guesses: DraftTable | None = None):
        self._session, self._draft = session, draft
        self._decoder = KVCache(session)
        count = drafts_per_pass(session.manifest.precision, session.layer_bytes)
        self._ahead = SpeculativeDecoder(self._decoder, guesses, count, draft.request.sampling.temperature)
        self._kept: Prediction | None = None  # what comes after the text so far, if it is there and not used yet
        self.logprobs: list[float] = []
        """Of each character of the last piece, with `logprobs=True`: ln of its probability at temperature 1 with all
        characters permitted, the sum over its ids."""

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> str:
        draft = self._draft
        while not draft.ready:
            if draft.done:
                raise StopIteration
            prediction, self._kept = self._prediction(), None
            draft.choose(*prediction)
        piece = draft.take()
        if draft.keeps_logprobs:
            self.logprobs = draft.take_logprobs(len(piece))
        return piece

    def branch(self, rng_seed: int | None = None, stream_number: int = 0) -> "TextStream":
        """Another writer that goes on from here by itself, without computing again what came before.

        With an `rng_seed` it draws from that one and `stream_number`; without, it would write what this one will.
        Raises `UserError` for a value out of range.
        """
        rng = None if rng_seed is None else Rng(rng_seed, stream_number)
        other = copy(self)
        if not self._draft.done:
            logits, _ = self._prediction()
            self._kept = other._kept = logits.copy(), None
            self._ahead.drop()
            other._decoder = KVCache(self._session)
            other._decoder.restore(self._decoder.snapshot())
            other._ahead = self._ahead.over(other._decoder)
        other._draft = self._draft.copy()
        other._draft.rng = rng or other._draft.rng
        return other

    def _prediction(self) -> Prediction:
        """What comes after all of the text so far."""
        if self._kept is not None:
            return self._kept
        draft, decoder = self._draft, self._decoder
        known = self._ahead.known(draft)
        if known is not None:
            return known
        if decoder.longest == decoder.block_size and draft.request.overflow == "slide":
            decoder.slide()
        if 0 < decoder.longest < decoder.block_size:
            return self._ahead.push(draft)
        window = draft.window(fresh=decoder.longest == 0)
        decoder.reset()
        return decoder.prefill(window), None
