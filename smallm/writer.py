"""One text as it comes: an iterator that can be left, gone back to, and branched."""

from copy import copy

import numpy as np

from smallm.draft import Draft
from smallm.guesses import Guesses
from smallm.lookahead import Lookahead, guesses_a_pass
from smallm.sampling import Rng
from smallm.session import Session


class Writer:
    """Gives the new text in pieces of whole characters, and computes no more of it than it is asked for.

    A loop over it may be left at any time; the next one goes on where that stopped. `branch` gives another writer from
    here on. Its memory does not grow with the text.
    """

    def __init__(self, session: Session, draft: Draft, guesses: Guesses | None = None):
        self._session, self._draft = session, draft
        self._decoder = session.decoder()
        count = guesses_a_pass(session.manifest.precision, session.layer_bytes)
        self._ahead = Lookahead(self._decoder, guesses, count, draft.request.sampling.temperature)
        self._logits: np.ndarray | None = None  # the prediction after the text so far, if it is there and not used yet
        self.logprobs: list[float] = []
        """Of each character of the last piece, with `logprobs=True`: ln of its probability at temperature 1 with all
        characters permitted, the sum over its ids."""

    def __iter__(self) -> "Writer":
        return self

    def __next__(self) -> str:
        draft = self._draft
        while not draft.ready:
            if draft.done:
                raise StopIteration
            if self._logits is not None:
                logits, self._logits = self._logits, None
                draft.choose(logits)
            elif self._makes_room():
                self._ahead.write(draft)
            else:
                draft.choose(self._anew())
        piece = draft.take()
        if draft.keeps_logprobs:
            self.logprobs = draft.take_logprobs(len(piece))
        return piece

    def branch(self, rng_seed: int | None = None, stream_number: int = 0) -> "Writer":
        """Another writer that goes on from here by itself, without computing again what came before.

        With an `rng_seed` it draws from that one and `stream_number`; without, it would write what this one will.
        Raises `UserError` for a value out of range.
        """
        rng = None if rng_seed is None else Rng(rng_seed, stream_number)
        other = copy(self)
        if not self._draft.done:
            self._logits = other._logits = self._prediction().copy()
            other._decoder = self._session.decoder()
            other._decoder.restore(self._decoder.snapshot())
            other._ahead = self._ahead.over(other._decoder)
        other._draft = self._draft.copy()
        other._draft.rng = rng or other._draft.rng
        return other

    def _prediction(self) -> np.ndarray:
        """The logits (V,) after all of the text so far."""
        if self._logits is not None:
            return self._logits
        return self._ahead.predict(self._draft) if self._makes_room() else self._anew()

    def _makes_room(self) -> bool:
        """Whether the last id can be added to the cache; if the text slides, it can once there is something in it."""
        decoder = self._decoder
        if decoder.longest == decoder.block_size and self._draft.request.overflow == "slide":
            decoder.slide()
        return 0 < decoder.longest < decoder.block_size

    def _anew(self) -> np.ndarray:
        """The logits (V,) after the window that the overflow leaves, or after the seed."""
        window = self._draft.window(fresh=self._decoder.longest == 0)
        self._decoder.reset()
        return self._decoder.feed(window)
