"""Reading ahead of a text: ids that probably come next go through the model together with the last one."""

from copy import copy

import numpy as np

from smallm.decoder import Decoder
from smallm.draft import Draft
from smallm.guesses import Guesses
from smallm.session import BIG_LAYER_BYTES

LEAST_LUCK = 0.6  # guesses of a pass that come true, of late; with fewer, single ids are quicker
REST = 64  # ids one by one, before guessing is tried again


def guesses_a_pass(precision: str, layer_bytes: int) -> int:
    """How many ids to guess for a model with layers of this size: by measurement, see benchmarks/README.md.

    Where a pass waits for nodes or for weights from memory, more ids cost little; products with quantised matrices that
    are big enough to count take longer for each. An odd number, and the last id, go through the kernels that whole
    windows go through, in every precision.
    """
    if precision == "fp32" or layer_bytes < BIG_LAYER_BYTES:
        return 5
    return 3 if precision == "int8" else 0


class Lookahead:
    """Continues a draft in a decoder of one stream: several ids a pass where guesses come true, else one."""

    def __init__(self, decoder: Decoder, guesses: Guesses | None, count: int, temperature: float):
        """count: of the guesses in a pass; without them, or without a table, all goes id by id."""
        self._decoder, self._guesses, self._count = decoder, guesses if count else None, count
        self._temperature, self._guesser = temperature, None
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
        if self._guesser is None:
            self._guesser = self._guesses.at(self._temperature)
        guessed = self._guesser.follow(draft.history, draft.rng.peek(self._count))
        logits = self._decoder.read([draft.history[-1], *guessed])
        true = draft.choose_run(logits, guessed) - 1
        self._decoder.shorten(self._count - true)
        self._luck += (true - self._luck) / 32
        if self._luck < LEAST_LUCK:
            self._luck, self._rest = 1.5 * LEAST_LUCK, REST

    def predict(self, draft: Draft) -> np.ndarray:
        """The logits (V,) by which `write` would choose the next id; the decoder then has all of the draft's ids."""
        if not self._guessing():
            return self._decoder.push(draft.history[-1])
        logits = self._decoder.read([draft.history[-1], *[0] * self._count])
        self._decoder.shorten(self._count)
        return logits[0]

    def _guessing(self) -> bool:
        decoder = self._decoder
        return self._guesses is not None and not self._rest and decoder.block_size - decoder.longest > self._count
