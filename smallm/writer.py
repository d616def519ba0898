"""One text as it comes: an iterator that can be left, gone back to, and branched."""

from copy import copy

import numpy as np

from smallm.draft import Draft
from smallm.sampling import Rng
from smallm.session import Session


class Writer:
    """Gives the new text in pieces of whole characters, and computes no more of it than it is asked for.

    A loop over it may be left at any time; the next one goes on where that stopped. `branch` gives another writer from
    here on. Its memory does not grow with the text.
    """

    def __init__(self, session: Session, draft: Draft):
        self._session, self._draft = session, draft
        self._decoder = session.decoder()
        self._fed = 0  # ids in the cache
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
            logits, self._logits = self._prediction(), None
            draft.choose(logits)
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
            other._fed = self._fed
        other._draft = self._draft.copy()
        other._draft.rng = rng or other._draft.rng
        return other

    def _prediction(self) -> np.ndarray:
        """The logits (V,) after all of the text so far."""
        if self._logits is not None:
            return self._logits
        draft, size = self._draft, self._decoder.block_size
        if self._fed == size and draft.request.overflow == "slide":
            self._decoder.slide()
            self._fed = int(self._decoder.lengths[0])
        if 0 < self._fed < size:
            self._fed += 1
            return self._decoder.push(draft.history[-1])
        window = draft.window(fresh=self._fed == 0)
        self._decoder.reset()
        self._fed = len(window)
        return self._decoder.feed(window)
