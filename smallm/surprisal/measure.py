"""The surprisal of each character of a text: -ln of the probability that a model gave it, in nats.

Texts are processed in pieces, so a text may be larger than memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from smallm.inference.scoring import IDS_PER_BATCH, IGNORED, begins_character, nats, windows
from smallm.language_model import MAX_LOGITS, LanguageModel
from smallm.tokenizer.vocabulary import Vocabulary

EXPECTED = 5  # number of alternatives recorded for a character
UNKNOWN = -1  # in place of an id


@dataclass(frozen=True)
class Measured:
    """A part of a text with the surprisal of its n characters; K = EXPECTED."""

    text: str
    nats: np.ndarray
    """(n,) float64: the surprisal of each character; NaN for the first character of the text, which has no context."""
    expected: np.ndarray
    """(n, K) int32: the ids with the highest probability, in descending order; UNKNOWN for the first character."""
    probabilities: np.ndarray
    """(n, K) float32: the probabilities of `expected`."""

    def __getitem__(self, part: slice) -> "Measured":
        return Measured(self.text[part], self.nats[part], self.expected[part], self.probabilities[part])

    @classmethod
    def join(cls, parts: list["Measured"]) -> "Measured":
        """Concatenates consecutive parts, at least one."""
        arrays = ([getattr(part, name) for part in parts] for name in ("nats", "expected", "probabilities"))
        return cls("".join(part.text for part in parts), *map(np.concatenate, arrays))


def measure(model: LanguageModel, pieces: Iterable[str]) -> Iterator[Measured]:
    """Measures a text, and yields the text in parts of whole characters.

    The model sees windows of `block_size` ids that overlap by half, so that no character is surprising only because a
    window starts there: every character after the first is predicted once, from at least half a window or from all of
    the text before. A character spelled with several ids gets the sum of their surprisals, and the alternatives to the
    first of these ids.

    pieces: the text, in strings of any length.
    Raises `UserError` for lone surrogates and broken models.
    """
    vocabulary, pieces = model.vocabulary, iter(pieces)
    begin = next(filter(None, pieces), "")
    if not begin:
        return
    nothing = np.full((1, EXPECTED), UNKNOWN, np.int32), np.zeros((1, EXPECTED), np.float32)
    yield Measured(begin[0], np.array([np.nan]), *nothing)
    ids = map(vocabulary.encode, chain([begin], pieces))
    ids_per_batch = min(IDS_PER_BATCH, MAX_LOGITS // model.vocab_size)
    held = None  # the ids of the last character, which may continue in the next batch
    for inputs, targets in windows(ids, model.block_size, max(1, model.block_size // 2), ids_per_batch):
        found = _measure_batch(model, inputs, targets)
        if held:
            found = tuple(map(np.concatenate, zip(held, found, strict=True)))
        last = np.flatnonzero(begins_character(found[0])).max(initial=0)
        if last:
            yield _by_character(vocabulary, *(array[:last] for array in found))
        held = tuple(array[last:] for array in found)
    if held and len(held[0]):
        yield _by_character(vocabulary, *held)


def _measure_batch(model: LanguageModel, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """inputs, targets (B, T) -> ids (m,), nats (m,), expected and probabilities (m, K) of the targets not IGNORED."""
    counts = targets != IGNORED
    logits, ids = model.logits(inputs)[counts], targets[counts]  # (m, V), (m,)
    found = nats(logits[None].copy(), ids[None])[0]
    rows, probabilities = np.arange(len(ids)), np.empty((len(ids), EXPECTED), np.float32)
    own, expected = logits[rows, ids].astype(np.float64), np.empty((len(ids), EXPECTED), np.int32)
    for k in range(EXPECTED):
        expected[:, k] = best = logits.argmax(axis=1)
        probabilities[:, k] = np.exp(logits[rows, best] - own - found)
        logits[rows, best] = -np.inf
    return ids, found, expected, probabilities


def id_name(vocabulary: Vocabulary, id: int) -> str:
    """The character of an id; for an id that is only a part of a character, its bytes as in <e2 82>."""
    data = vocabulary.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"<{data.hex(' ')}>"


def _by_character(
    vocabulary: Vocabulary, ids: np.ndarray, values: np.ndarray, expected: np.ndarray, probabilities: np.ndarray
) -> Measured:
    """Values of ids -> values of characters."""
    starts = np.flatnonzero(begins_character(ids))
    return Measured(vocabulary.decode(ids), np.add.reduceat(values, starts), expected[starts], probabilities[starts])
