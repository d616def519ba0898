"""Which ids may come next, so that only permitted characters get written, those spelled in several ids included.

An id is permitted if every character that it completes is, and if the bytes of a character that it leaves unfinished
(those before it included) can still become a permitted one. So no text runs into a dead end. Bytes that are not UTF-8
come out as U+FFFD, and they are permitted where that character is. Probabilities of the permitted ids keep their ratios
at each step; texts as wholes do not, as with every rule that acts step by step.
"""

import codecs

import numpy as np

from smallm.errors import UserError
from smallm.tokenizer.vocabulary import CODE_POINTS, Vocabulary

LEAST = (0, 0x80, 0x800, 0x10000)  # code point that UTF-8 spells in 1, 2, 3, 4 bytes


class AllowedCharacters:
    """A set of characters, seen from the ids of a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, allowed: str | None = None, banned: str = ""):
        """allowed: None = all characters. Raises `UserError` if none is left, or for a lone surrogate."""
        self._vocabulary = vocabulary
        self._characters = np.full(CODE_POINTS, allowed is None)
        if allowed is not None:
            self._characters[_code_points("allowed", allowed)] = True
        self._characters[_code_points("banned", banned)] = False
        self._characters[0xD800:0xE000] = False  # no text has them
        if not self._characters.any():
            raise UserError("allowed and banned leave no character; allow one that is not banned")
        self._masks: dict[bytes, np.ndarray] = {}

    def mask(self, pending: bytes) -> np.ndarray:
        """What to add to the logits (V,) float32 after the bytes of an unfinished character: 0, or minus infinity."""
        if pending not in self._masks:
            fits = [self._fits(pending, id) for id in range(self._vocabulary.size)]
            self._masks[pending] = np.where(fits, np.float32(0), np.float32(-np.inf))
        return self._masks[pending]

    def _fits(self, pending: bytes, id: int) -> bool:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = utf8.decode(pending + self._vocabulary.decode_bytes([id]))
        return all(self._characters[ord(c)] for c in text) and self._can_end_well(utf8.getstate()[0])

    def _can_end_well(self, pending: bytes) -> bool:
        if not pending:
            return True
        if pending >= b"\xed\xa0" and pending[0] == 0xED:  # held back by Python, but no character begins so
            return bool(self._characters[0xFFFD])
        length = 2 if pending[0] < 0xE0 else 3 if pending[0] < 0xF0 else 4
        bits = pending[0] & (0x7F >> length)
        for byte in pending[1:]:
            bits = bits << 6 | byte & 0x3F
        span = 64 ** (length - len(pending))
        return bool(self._characters[max(bits * span, LEAST[length - 1]) : (bits + 1) * span].any())


def _code_points(name: str, characters: str) -> np.ndarray:
    try:
        return np.frombuffer(characters.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError:
        raise UserError(f"{name} has a lone surrogate, which no text can hold; leave it out") from None
    except AttributeError:
        raise UserError(f"{name} = {characters!r:.40} is no string of characters") from None
