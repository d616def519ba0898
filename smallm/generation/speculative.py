"""Speculative decoding: the model checks several drafted ids together with the last id, in one pass."""

from copy import copy

from smallm.generation.draft_table import Drafter, DraftTable
from smallm.generation.sequence_state import Prediction, SequenceState
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import BIG_LAYER_BYTES

MIN_ACCEPTANCE = 0.6  # accepted drafts per pass; below this moving average, decoding goes on one id at a time
COOLDOWN = 64  # ids that are decoded one at a time before drafts are tried again
Mark = tuple[list[int], list[Prediction], int, float, int]
"""What `SpeculativeDecoder.mark` returns and `SpeculativeDecoder.rewind` takes."""


def drafts_per_pass(precision: str, layer_bytes: int) -> int:
    """Number of drafts per pass that was measured as fastest for layers of this size, see benchmarks/README.md.

    More ids cost little while a pass waits for graph nodes or for weights from memory; products with large quantised
    matrices take longer for each id. An odd number of drafts plus the last id is even, and an even number of ids uses
    the matrix kernels of whole windows in every precision.
    """
    if precision == "fp32" or layer_bytes < BIG_LAYER_BYTES:
        return 5
    return 3 if precision == "int8" else 0


class SpeculativeDecoder:
    """Predictions for one sequence: several ids per pass while drafts are accepted, otherwise one id per pass."""

    def __init__(self, cache: KVCache, table: DraftTable | None, count: int, temperature: float):
        """count: number of drafts per pass; with 0, or without a table, decoding goes one id at a time."""
        self._cache, self._table, self._count = cache, table if count else None, count
        self._temperature = temperature
        self._drafter: Drafter | None = None
        self._drafts: list[int] = []  # of the last pass; the cache holds them
        self._predictions: list[Prediction] = []  # after the last id and after each draft
        self._accepted = 0  # number of drafts that the sequence has taken
        self.acceptance_rate, self._cooldown = 2 * MIN_ACCEPTANCE, 0

    def mark(self) -> Mark:
        """The state of the drafts, for `rewind`."""
        return self._drafts, self._predictions, self._accepted, self.acceptance_rate, self._cooldown

    def rewind(self, mark: Mark) -> None:
        """Undoes what was done since `mark` returned this, completely or in part, except to the cache."""
        self._drafts, self._predictions, self._accepted, self.acceptance_rate, self._cooldown = mark

    def with_cache(self, cache: KVCache) -> "SpeculativeDecoder":
        """A copy that works on another cache with the same content."""
        other = copy(self)
        other._cache = cache
        return other

    def accept(self, state: SequenceState) -> Prediction | None:
        """The prediction after the last id if that id was drafted; otherwise rolls back and returns None."""
        drafts, n = self._drafts, self._accepted
        if n < len(drafts) and drafts[n] == state.history[-1]:
            self._accepted = n + 1
            return self._predictions[n + 1]
        self.roll_back()
        return None

    def predict(self, state: SequenceState) -> Prediction:
        """The prediction after the last id of the sequence, which is the only id that the cache lacks."""
        id, cache, count = state.history[-1], self._cache, self._count
        if self._table is None or self._cooldown or cache.block_size - cache.longest <= count:
            self._cooldown = max(0, self._cooldown - 1)
            return cache.decode_one(id), None
        if self._drafter is None:
            self._drafter = self._table.drafter(self._temperature)
        drafts = self._drafter.propose(state.history, state.rng.peek(count))
        logits = cache.verify([id, *drafts])
        self._predictions = list(zip(logits, state.weights(logits), strict=True))
        self._drafts, self._accepted = drafts, 0
        return self._predictions[0]

    def roll_back(self) -> None:
        """Removes the drafts that were not accepted from the cache."""
        if not self._drafts:
            return
        self._cache.truncate(len(self._drafts) - self._accepted)
        self._drafts, self._predictions = [], []
        self.acceptance_rate += (self._accepted - self.acceptance_rate) / 32
        self._accepted = 0
        if self.acceptance_rate < MIN_ACCEPTANCE:
            self.acceptance_rate, self._cooldown = 1.5 * MIN_ACCEPTANCE, COOLDOWN
