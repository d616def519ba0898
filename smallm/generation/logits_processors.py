"""Changes to the logits before sampling: allowed and banned characters, and the repetition penalty."""

import codecs
from collections.abc import Sequence

import numpy as np

from smallm.generation.config import GenerationConfig
from smallm.tokenizer.vocabulary import CODE_POINTS, Vocabulary

FIRST_CODE_POINTS = (0, 0x80, 0x800, 0x10000)  # of those that UTF-8 spells in 1, 2, 3 and 4 bytes


class LogitsProcessor:
    """The changes that a `GenerationConfig` asks for. Texts with the same config share one processor."""

    def __init__(self, vocabulary: Vocabulary, config: GenerationConfig):
        """config: resolved for the model."""
        unrestricted = config.allowed is None and not config.banned
        self._allowed = None if unrestricted else AllowedCharacters(vocabulary, config.allowed, config.banned)
        self._penalty, self._window = config.repetition_penalty, config.repetition_window
        self.active = not unrestricted or self._penalty != 1
        """Whether `process` changes anything."""

    def process(self, logits: np.ndarray, history: Sequence[int], pending: bytes) -> np.ndarray:
        """New logits (V,) from the model's logits (V,).

        history: the ids of the text so far; pending: the bytes of a character that is not complete yet.
        """
        if self._allowed is not None:
            logits = logits + self._allowed.mask(pending)
        if self._penalty != 1:
            logits = apply_repetition_penalty(logits, history[-self._window :], self._penalty)
        return logits


class AllowedCharacters:
    """Which ids may come next, so that only allowed characters are written, also those that several ids spell.

    An id is allowed if every character that it completes is allowed, and if the bytes of the incomplete character that
    follows can still become an allowed character. So generation never reaches a dead end. Bytes that are not UTF-8
    decode to U+FFFD, so they are allowed if U+FFFD is allowed. At each step the probabilities of the allowed ids keep
    their ratios.
    """

    def __init__(self, vocabulary: Vocabulary, allowed: str | None = None, banned: str = ""):
        """allowed: None = all characters. `GenerationConfig` has checked both, so at least one character is left."""
        self._vocabulary = vocabulary
        self._characters = np.full(CODE_POINTS, allowed is None)
        if allowed is not None:
            self._characters[_code_points(allowed)] = True
        self._characters[_code_points(banned)] = False
        self._characters[0xD800:0xE000] = False  # surrogates do not occur in text
        assert self._characters.any()
        self._masks: dict[bytes, np.ndarray] = {}

    def mask(self, pending: bytes) -> np.ndarray:
        """What to add to the logits (V,) float32 after the bytes of an incomplete character: 0 or minus infinity."""
        if pending not in self._masks:
            fits = [self._fits(pending, id) for id in range(self._vocabulary.size)]
            self._masks[pending] = np.where(fits, np.float32(0), np.float32(-np.inf))
        return self._masks[pending]

    def _fits(self, pending: bytes, id: int) -> bool:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = utf8.decode(pending + self._vocabulary.decode_bytes([id]))
        return all(self._characters[ord(c)] for c in text) and self._can_become_allowed(utf8.getstate()[0])

    def _can_become_allowed(self, pending: bytes) -> bool:
        if not pending:
            return True
        if pending >= b"\xed\xa0" and pending[0] == 0xED:  # Python's decoder waits here, but no character begins so
            return bool(self._characters[0xFFFD])
        length = 2 if pending[0] < 0xE0 else 3 if pending[0] < 0xF0 else 4
        bits = pending[0] & (0x7F >> length)
        for byte in pending[1:]:
            bits = bits << 6 | byte & 0x3F
        span = 64 ** (length - len(pending))
        first = max(bits * span, FIRST_CODE_POINTS[length - 1])
        return bool(self._characters[first : (bits + 1) * span].any())


def apply_repetition_penalty(logits: np.ndarray, ids: Sequence[int], penalty: float) -> np.ndarray:
    """New logits (V,), in which the logits of the given ids are lowered (Keskar et al. 2019, CTRL).

    A positive logit is divided by the penalty, another one is multiplied by it, in single precision.
    """
    changed, repeated = logits.copy(), np.array(ids, np.int64)
    seen = logits[repeated]
    with np.errstate(over="ignore"):  # beyond float32's range: minus infinity, probability 0
        changed[repeated] = np.where(seen > 0, seen / np.float32(penalty), seen * np.float32(penalty))
    return changed


def _code_points(characters: str) -> np.ndarray:
    return np.frombuffer(characters.encode("utf-32-le"), "<u4")
