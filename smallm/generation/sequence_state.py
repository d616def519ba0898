"""One text in the making, apart from the model: from the logits after it to its next id, and from ids to characters."""

from collections.abc import Sequence
from copy import copy

import numpy as np

from smallm.generation.config import Request
from smallm.generation.sampler import Rng, apply_repetition_penalty, log_probability, pick, sample, weigh
from smallm.generation.stop_strings import StopStrings
from smallm.tokenizer.vocabulary import Vocabulary

Prediction = tuple[np.ndarray, np.ndarray | None]
"""The logits (V,) after a text, and their weights, if they are known, see `SequenceState.choose`."""


class SequenceState:
    """Takes logits, chooses ids, and hands out the text that can no longer be part of a stop string.

    `history` has at least the last block_size ids (fewer if there are fewer), and its length stays bounded.
    """

    def __init__(self, vocabulary: Vocabulary, ids: list[int], block_size: int, request: Request, rng: Rng):
        """ids: the seed's, at least one, of which the last block_size matter."""
        self.request, self.rng = request, rng
        self.history, self._block_size = ids[-block_size:], block_size
        self.done = request.max_length == 0
        self._plain = request.permitted is None and request.repetition_penalty == 1  # logits stay as they are
        self._decoder = vocabulary.decoder()
        self._stops = StopStrings(request.stops) if request.stops else None
        self.ready = ""
        """New characters that are settled and not taken yet."""
        self._held = ""  # those after them, which may be the beginning of a stop
        self._length = 0  # new characters in all
        self.keeps_logprobs = False
        """Whether `take_logprobs` has something to tell, which costs some time per id; to be set before the start."""
        self._logprobs, self._logprob = [], 0.0

    def copy(self) -> "SequenceState":
        """Another text that begins with this one."""
        other = copy(self)
        other.history, other.rng, other._decoder = self.history.copy(), copy(self.rng), self._decoder.copy()
        other._stops, other._logprobs = self._stops and self._stops.copy(), self._logprobs.copy()
        return other

    def choose(self, logits: np.ndarray, weights: np.ndarray | None = None) -> int:
        """logits (V,), the model's after all of the text so far -> the id that is its next. Raises `UserError`.

        weights (V,): its row of what `weigh` made of them, which saves work.
        """
        u = self.rng.uniform()
        if weights is not None:
            id = pick(weights, u)
        else:
            id = sample(logits if self._plain else self._adjusted(logits), u, self.request.sampling)
        if self.keeps_logprobs:
            self._logprob += log_probability(logits, id)
        self.history.append(id)
        if len(self.history) > 2 * self._block_size:
            del self.history[: -self._block_size]
        text = self._decoder.push(id)
        if text:
            self._add(text)
        return id

    def weigh(self, logits: np.ndarray) -> Sequence[np.ndarray | None]:
        """logits (T, V) -> what `choose` may be given with each row, of this draft and others of its request."""
        weights = weigh(logits, self.request.sampling) if self._plain else None
        return [None] * len(logits) if weights is None else weights

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """logits (V,) -> those with what is not permitted, and what came up lately, made less likely."""
        request = self.request
        if request.permitted is not None:
            logits = logits + request.permitted.mask(self._decoder.pending)
        if request.repetition_penalty != 1:
            recent = self.history[-request.repetition_window :]
            logits = apply_repetition_penalty(logits, recent, request.repetition_penalty)
        return logits

    def window(self, fresh: bool) -> np.ndarray:
        """The ids (T,) to compute from when the cache is empty: fresh, the seed's, or full: what overflow leaves."""
        whole = fresh or self.request.overflow == "crop"
        return np.array(self.history[-(self._block_size if whole else max(1, self._block_size // 2)) :], np.int64)

    def take(self) -> str:
        """The characters that are ready."""
        piece, self.ready = self.ready, ""
        return piece

    def take_logprobs(self, n: int) -> list[float]:
        """For the n characters taken last: ln of the probability of each, the sum over its ids.

        If one id completes several characters (bytes that are not UTF-8), the last of them has the sum, the others 0.
        """
        taken, self._logprobs = self._logprobs[:n], self._logprobs[n:]
        return taken

    def _add(self, text: str) -> None:
        left = self.request.max_length - self._length
        text = text[:left] if len(text) > left else text
        self._length += len(text)
        if self.keeps_logprobs:
            self._logprobs += [0.0] * (len(text) - 1) + [self._logprob]
            self._logprob = 0.0
        if self._stops is None:
            self.ready = self.ready + text if self.ready else text
        else:
            self._hold_back(text)
        if self._length == self.request.max_length:
            self.done = True
            self.ready, self._held = self.ready + self._held, ""

    def _hold_back(self, text: str) -> None:
        """Adds what cannot be part of a stop to what is ready; ends the text before a stop."""
        for number, character in enumerate(text, self._length - len(text)):
            self._held += character
            met, begun = self._stops.push(character) if number >= self.request.min_length else (0, 0)
            free = len(self._held) - (met or begun)
            self.ready, self._held = self.ready + self._held[:free], self._held[free:]
            if met:
                self._held, self.done = "", True
                return
