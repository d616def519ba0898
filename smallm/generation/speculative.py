"""Reading ahead of a text: ids that probably come next go through the model together with the last one."""

from copy import copy

from smallm.generation.draft_table import DraftTable
from smallm.generation.sequence_state import Prediction, SequenceState
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import BIG_LAYER_BYTES

MIN_LUCK = 0.6  # guesses of a pass that come true, of late; with fewer, single ids are quicker
REST = 64  # ids one by one, before guessing is tried again


def drafts_per_pass(precision: str, layer_bytes: int) -> int:
    """How many ids to guess for a model with layers of this size: by measurement, see benchmarks/README.md.

    Where a pass waits for nodes or for weights from memory, more ids cost little; products with quantised matrices that
    are big enough to count take longer for each. An odd number, and the last id, go through the kernels that whole
    windows go through, in every precision.
    """
    if precision == "fp32" or layer_bytes < BIG_LAYER_BYTES:
        return 5
    return 3 if precision == "int8" else 0


class SpeculativeDecoder:
    """What follows a draft in a decoder of one stream: several ids a pass where guesses come true, else one."""

    def __init__(self, decoder: KVCache, guesses: DraftTable | None, count: int, temperature: float):
        """count: of the guesses in a pass; without them, or without a table, all goes id by id."""
        self._decoder, self._guesses, self._count = decoder, guesses if count else None, count
        self._temperature, self._guesser = temperature, None
        self._guessed: list[int] = []  # ids in the decoder that the draft has not
        self._rows: list[tuple] = []  # what comes after its last id, and after each of those; the last first
        self._true, self._luck, self._rest = 0, 2 * MIN_LUCK, 0

    def over(self, decoder: KVCache) -> "SpeculativeDecoder":
        """The same in another decoder, that of a text which goes on from here."""
        other = copy(self)
        other._decoder = decoder
        return other

    def known(self, draft: SequenceState) -> Prediction | None:
        """What `SequenceState.choose` wants for the next id, if the last one was a draft; else drops the rest."""
        if self._guessed and self._guessed[-1] == draft.history[-1]:
            self._guessed.pop()
            self._true += 1
            return self._rows.pop()
        self.drop()
        return None

    def push(self, draft: SequenceState) -> Prediction:
        """What `SequenceState.choose` wants for the next id; the decoder has all ids but the last."""
        id, decoder, count = draft.history[-1], self._decoder, self._count
        if self._guesses is None or self._rest or decoder.block_size - decoder.longest <= count:
            self._rest = max(0, self._rest - 1)
            return decoder.decode_one(id), None
        if self._guesser is None:
            self._guesser = self._guesses.at(self._temperature)
        guessed = self._guesser.follow(draft.history, draft.rng.peek(count))
        logits = decoder.verify([id, *guessed])
        self._guessed, self._true = guessed[::-1], 0
        self._rows = list(zip(logits, draft.weigh(logits), strict=True))[::-1]
        return self._rows.pop()

    def drop(self) -> None:
        """Takes what the draft has not out of the decoder."""
        if not self._rows and not self._true:
            return
        self._decoder.truncate(len(self._guessed))
        self._guessed, self._rows = [], []
        self._luck += (self._true - self._luck) / 32
        self._true = 0
        if self._luck < MIN_LUCK:
            self._luck, self._rest = 1.5 * MIN_LUCK, REST
