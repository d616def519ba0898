"""Reading ahead of a text: ids that probably come next go through the model together with the last one."""

from copy import copy

import numpy as np

from smallm.decoder import Decoder
from smallm.draft import Draft
from smallm.guesses import Guesses, weights

GUESSED = 3  # ids a pass; an even number in all goes through the same kernels as a whole window, in every precision
LEAST_LUCK = 0.6  # guesses of a pass that come true, of late; with fewer, single ids are quicker
REST = 64  # ids one by one, before guessing is tried again


class Lookahead:
    """Continues a draft in a decoder of one stream: several ids a pass where guesses come true, else one."""

    def __init__(self, decoder: Decoder, guesses: Guesses | None, temperature: float):
        self._decoder, self._guesses = decoder, guesses
        self._weights = weights(temperature) if guesses else []
        self._luck, self._rest = 2 * LEAST_LUCK, 0

    def over(self, decoder: Decoder) -> "Lookahead":
        """The same in another decoder."""
        other = copy(self)
        other._decoder = decoder
        return other

    def write(self, draft: Draft) -> None:
        """Gives the draft its next id, or several; the decoder has all of its ids but the last, and room for that."""
        if not self._guessing():
            self._rest = max(0, self._rest - 1)
            draft.choose(self._decoder.push(draft.history[-1]))
            return
        guessed = self._guesses.follow(draft.history, draft.rng.peek(GUESSED), self._weights)
        logits = self._decoder.read([draft.history[-1], *guessed])
        true = draft.choose_run(logits, guessed) - 1
        self._decoder.shorten(GUESSED - true)
        self._luck += (true - self._luck) / 32
        if self._luck < LEAST_LUCK:
            self._luck, self._rest = 1.5 * LEAST_LUCK, REST

    def predict(self, draft: Draft) -> np.ndarray:
        """The logits (V,) by which `write` would choose the next id; the decoder then has all of the draft's ids."""
        if not self._guessing():
            return self._decoder.push(draft.history[-1])
        logits = self._decoder.read([draft.history[-1], *[0] * GUESSED])
        self._decoder.shorten(GUESSED)
        return logits[0]

    def _guessing(self) -> bool:
        decoder = self._decoder
        return self._guesses is not None and not self._rest and decoder.block_size - decoder.longest > GUESSED
