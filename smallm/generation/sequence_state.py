"""The state of one sequence, apart from the model: from logits to the next id, and from ids to characters."""

from collections.abc import Iterable, Sequence
from copy import copy

import numpy as np

from smallm.generation.config import GenerationConfig
from smallm.generation.logits_processors import LogitsProcessor
from smallm.generation.rng import Rng
from smallm.generation.sampler import cumulative_weights, log_probability, pick, sample
from smallm.tokenizer.vocabulary import Vocabulary

Prediction = tuple[np.ndarray, np.ndarray | None]
"""The logits (V,) after a text, and their row of `SequenceState.weights`, if that was computed."""
Mark = tuple[int, int, bytes, str, str, int, bool, float, list[float]]
"""What `SequenceState.mark` returns and `SequenceState.rewind` takes."""


class SequenceState:
    """Takes logits, chooses ids, and hands out the text that can no longer be part of a stop string.

    `history` holds at least the last block_size ids (fewer if there are fewer); its length is bounded.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        ids: list[int],
        block_size: int,
        config: GenerationConfig,
        processor: LogitsProcessor,
        stream: int = 0,
        logprobs: bool = False,
    ):
        """ids: those of the seed text, at least one; the last block_size matter. config: resolved for the model.

        stream: added to `config.stream_number`. logprobs: whether to keep log-probabilities for `take_logprobs`, which
        costs some time per id.
        """
        self.config, self.sampling, self._processor = config, config.sampling, processor
        assert config.rng_seed is not None  # `resolve` draws one
        self.stream_number = config.stream_number + stream
        self.rng = Rng(config.rng_seed, self.stream_number)
        self.history, self._block_size = ids[-block_size:], block_size
        self.done = config.max_length == 0
        self._processes = processor.active
        self._decoder = vocabulary.decoder()
        self._stops = [stop for stop in config.stop if len(stop) <= config.max_length]  # longer stops cannot occur
        self._min_length, self._max_length = config.min_length, config.max_length
        self.ready = ""
        """New characters that are final and not taken yet."""
        self._held = ""  # the characters after them, which may begin a stop string
        self._length = 0  # number of new characters
        self.keeps_logprobs, self._logprob = logprobs, 0.0
        self._logprobs: list[float] = []

    def copy(self) -> "SequenceState":
        """An independent sequence that continues from here."""
        other = copy(self)
        other.history, other.rng, other._decoder = self.history.copy(), copy(self.rng), copy(self._decoder)
        return other

    def mark(self) -> Mark:
        """The point that the sequence has reached, for `rewind`; at most one id may be chosen in between."""
        self._forget()  # before the ids are counted, so that `choose` removes none of them
        return (
            self.rng.draws, len(self.history), self._decoder.pending, self.ready, self._held,
            self._length, self.done, self._logprob, self._logprobs,
        )  # fmt: skip

    def rewind(self, mark: Mark) -> None:
        """Undoes what was done since `mark` returned this, completely or in part. May be repeated."""
        (self.rng.draws, kept, self._decoder.pending, self.ready, self._held,
         self._length, self.done, self._logprob, self._logprobs) = mark  # fmt: skip
        del self.history[kept:]

    def choose(self, logits: np.ndarray, weights: np.ndarray | None = None) -> int:
        """Chooses the next id from the model's logits (V,) after the text so far. Raises `UserError`.

        weights (V,): the row of `weights` for these logits, if it was computed, which saves work.
        """
        u = self.rng.uniform()
        if weights is not None:
            id = pick(weights, u)
        else:
            if self._processes:
                id = sample(self._processor.process(logits, self.history, self._decoder.pending), u, self.sampling)
            else:
                id = sample(logits, u, self.sampling)
        if self.keeps_logprobs:
            self._logprob += log_probability(logits, id)
        self._forget()
        self.history.append(id)
        text = self._decoder.push(id)
        if text:
            self._add(text)
        return id

    def weights(self, logits: np.ndarray) -> Iterable[np.ndarray | None]:
        """For each row of logits (T, V), the weights that `choose` takes; the same for all sequences of one config."""
        weights = None if self._processes else cumulative_weights(logits, self.sampling)
        return [None] * len(logits) if weights is None else weights

    def window(self, fresh: bool) -> np.ndarray:
        """The ids (T,) to compute when the cache is empty (fresh) or full (what `overflow` keeps)."""
        whole = fresh or self.config.overflow == "crop"
        return np.array(self.history[-(self._block_size if whole else max(1, self._block_size // 2)) :], np.int64)

    def take(self) -> str:
        """The characters that are ready."""
        text, self.ready = self.ready, ""
        return text

    def take_logprobs(self, n: int) -> list[float]:
        """For each of the n characters taken last, ln of its probability: the sum over its ids.

        If one id completes several characters (bytes that are not UTF-8), the last character has the sum, the others 0.
        """
        taken, self._logprobs = self._logprobs[:n], self._logprobs[n:]
        return taken

    def _forget(self) -> None:
        if len(self.history) >= 2 * self._block_size:
            del self.history[: -self._block_size]

    def _add(self, text: str) -> None:
        left = self._max_length - self._length
        text = text[:left] if len(text) > left else text
        self._length += len(text)
        if self.keeps_logprobs:
            self._logprobs = [*self._logprobs, *[0.0] * (len(text) - 1), self._logprob]  # `mark` keeps the old list
            self._logprob = 0.0
        if self._stops:
            self._hold_back(text)
        else:
            self.ready = self.ready + text if self.ready else text
        if self._length == self._max_length:
            self.done = True
            self.ready, self._held = self.ready + self._held, ""

    def _hold_back(self, text: str) -> None:
        """Moves characters that cannot be part of a stop string to `ready`; ends the text before a stop string."""
        for number, character in enumerate(text, self._length - len(text)):
            self._held += character
            complete, begun = match_stops(self._stops, self._held) if number >= self._min_length else (0, 0)
            free = len(self._held) - (complete or begun)
            self.ready, self._held = self.ready + self._held[:free], self._held[free:]
            if complete:
                self._held, self.done = "", True
                return


def match_stops(stops: Sequence[str], tail: str) -> tuple[int, int]:
    """(length of the longest stop string at the end of the tail, length of the longest end that begins a stop)."""
    complete = max((len(stop) for stop in stops if tail.endswith(stop)), default=0)
    ends = (tail[start:] for start in range(len(tail)))
    return complete, next((len(end) for end in ends if any(stop.startswith(end) for stop in stops)), 0)
