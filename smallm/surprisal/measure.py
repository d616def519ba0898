"""The surprisal of each character of a text: -ln of the probability that a model gave it, in nats.

>>> from smallm import LanguageModel
>>> from smallm.surprisal.measure import measure
>>> from smallm.surprisal.spans import SpanFinder
>>> lm = LanguageModel.load("runs/shakespeare")
>>> finder = SpanFinder(lm.vocabulary)
>>> for part in measure(lm, ["To be, or not to bxe: that is the question."]):
...     finder.add(part)
>>> passages, words = finder.finish()
>>> for span in words:
...     print(span.peak.line, span.peak.column, span.text, span.peak.expected)

Texts are processed in pieces, so a text may be larger than memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smallm.inference.scoring import IGNORED, begins_character, nats, windows
from smallm.tokenizer.vocabulary import Vocabulary

EXPECTED = 5  # number of alternatives recorded for a character
NOTABLE = 3.0  # nats, a probability of about 1 in 20; above this the alternatives are always recorded
MAX_LOGITS = 1 << 22  # computed at a time: 16 MB
UNKNOWN = -1  # in place of an id


class Model(Protocol):
    """The part of `LanguageModel` that `measure` needs."""

    vocabulary: Vocabulary
    vocab_size: int
    block_size: int

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """ids (B, T) -> logits (B, T, V)."""
        ...


@dataclass(frozen=True)
class Measured:
    """A part of a text with the surprisal of its n characters; K = EXPECTED."""

    text: str
    nats: np.ndarray
    """(n,) float64: the surprisal of each character; NaN for the first character of the text, which has no context."""
    expected: np.ndarray
    """(n, K) int32: the ids with the highest probability, in descending order; UNKNOWN where not recorded."""
    probabilities: np.ndarray
    """(n, K) float32: the probabilities of `expected`."""

    def __getitem__(self, part: slice) -> "Measured":
        return Measured(self.text[part], self.nats[part], self.expected[part], self.probabilities[part])

    @classmethod
    def join(cls, parts: list["Measured"]) -> "Measured":
        """Concatenates consecutive parts."""
        if not parts:
            return _unpredicted("", np.empty(0))
        arrays = ([getattr(part, name) for part in parts] for name in ("nats", "expected", "probabilities"))
        return cls("".join(part.text for part in parts), *map(np.concatenate, arrays))


def measure(model: Model, pieces: Iterable[str], detailed: int = 0) -> Iterator[Measured]:
    """Measures a text, and yields the text in parts of whole characters.

    The model sees windows of `block_size` ids that overlap by half, so that no character is surprising only because a
    window starts there: every character after the first is predicted once, from at least half a window or from all of
    the text before. A character spelled with several ids gets the sum of their surprisals, and the alternatives to the
    first of these ids.

    pieces: the text, in strings of any length.
    detailed: record the alternatives to this many characters at the beginning of the text; for the other characters
        only where the surprisal is NOTABLE nats or more.
    Raises `UserError` for lone surrogates and broken models.
    """
    first: list[str] = []

    def ids() -> Iterator[np.ndarray]:
        for piece in pieces:
            if piece and not first:
                first.append(piece[0])
            yield model.vocabulary.encode(piece)

    partial = _partial(model.vocabulary)
    held, done = None, 0  # held: the ids of the last character, which may continue in the next batch
    batches = windows(ids(), model.block_size, max(1, model.block_size // 2))
    for inputs, targets in _small_batches(batches, model.vocab_size):
        if not done:
            done = 1
            yield _unpredicted(first[0], np.array([np.nan]))
        found: tuple[np.ndarray, ...] = _measure_batch(model, inputs, targets, partial if done >= detailed else None)
        if held:
            found = tuple(np.concatenate(pair) for pair in zip(held, found, strict=True))
        starts = np.flatnonzero(begins_character(found[0]))
        if len(starts) > 1:
            part = _by_character(model.vocabulary, *(array[: starts[-1]] for array in found))
            done += len(part.text)
            yield part
        held = tuple(array[starts[-1] :] for array in found)
    if held:
        yield _by_character(model.vocabulary, *held)
    elif first:
        yield _unpredicted(first[0], np.array([np.nan]))


def _small_batches(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Splits batches of windows so that a batch needs at most MAX_LOGITS logits, without padding columns."""
    for inputs, targets in batches:
        rows = max(1, MAX_LOGITS // (inputs.shape[1] * vocab_size))
        for start in range(0, len(inputs), rows):
            part = targets[start : start + rows]
            used = 1 + np.flatnonzero((part != IGNORED).any(axis=0)).max(initial=-1)
            if used:  # otherwise only the rest of the first character is left
                yield inputs[start : start + rows, :used], part[:, :used]


def _measure_batch(
    model: Model, inputs: np.ndarray, targets: np.ndarray, partial: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """inputs, targets (B, T) -> ids (m,), nats (m,), expected and probabilities (m, K) of the targets not IGNORED.

    partial: (V + 1,), if given, the alternatives are recorded only where this is True or the surprisal is NOTABLE.
    """
    counts = targets != IGNORED
    unused = np.flatnonzero(counts.any(axis=0)).min()  # the columns that only give context
    logits, targets, counts = model.logits(inputs)[:, unused:], targets[:, unused:], counts[:, unused:]
    found = nats(logits.copy(), targets)
    wanted = counts if partial is None else counts & ((found >= NOTABLE) | partial[targets])
    rows, values = logits[wanted], found[wanted]  # (k, V), (k,)
    k = min(EXPECTED, rows.shape[1])
    best = np.argpartition(rows, -k, axis=1)[:, -k:]
    order = np.take_along_axis(rows, best, 1).argsort(axis=1)[:, ::-1]
    best = np.take_along_axis(best, order, 1)
    own = rows[np.arange(len(rows)), targets[wanted]].astype(np.float64)
    expected = np.full((*targets.shape, EXPECTED), UNKNOWN, np.int32)
    probabilities = np.zeros(expected.shape, np.float32)
    expected[wanted, :k] = best
    probabilities[wanted, :k] = np.exp(np.take_along_axis(rows, best, 1) - own[:, None] - values[:, None])
    return targets[counts], found[counts], expected[counts], probabilities[counts]


def _partial(vocabulary: Vocabulary) -> np.ndarray:
    """(V + 1,) bool: whether an id is only a part of a character; the last entry is for IGNORED."""
    whole = [*(byte < 0x80 for byte in range(256)), *(_is_by_character(token) for token in vocabulary.tokens), True]
    return ~np.array(whole)


def _is_by_character(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def id_name(vocabulary: Vocabulary, id: int) -> str:
    """The character of an id; for an id that is only a part of a character, its bytes as in <e2 82>."""
    data = vocabulary.decode_bytes([id])
    return data.decode() if _is_by_character(data) else f"<{data.hex(' ')}>"


def _by_character(
    vocabulary: Vocabulary, ids: np.ndarray, values: np.ndarray, expected: np.ndarray, probabilities: np.ndarray
) -> Measured:
    """Values of ids -> values of characters."""
    starts = np.flatnonzero(begins_character(ids))
    summed = np.add.reduceat(values, starts)
    return Measured(vocabulary.decode(ids), summed, expected[starts], probabilities[starts])


def _unpredicted(text: str, values: np.ndarray) -> Measured:
    """A part of a text for which nothing was predicted."""
    shape = len(text), EXPECTED
    return Measured(text, values, np.full(shape, UNKNOWN, np.int32), np.zeros(shape, np.float32))
