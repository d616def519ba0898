"""How little a model expected each character of a text, and where that is out of the ordinary.

>>> from smallm import LanguageModel
>>> from smallm.surprisal.spans import find_spans
>>> from smallm.surprisal.measure import measure
>>> lm = LanguageModel.load("runs/shakespeare")
>>> passages, words = find_spans(measure(lm, ["To be, or not to bxe: that is the question."]), lm.vocabulary)
>>> for place in words:
...     print(place.peak.line, place.peak.column, place.text, place.peak.expected)

Texts come and go in pieces, so they may be larger than memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smallm.inference.scoring import IGNORED, begins_character, nats, windows
from smallm.tokenizer.vocabulary import Vocabulary

EXPECTED = 5  # characters that the model expected most
NOTABLE = 3.0  # nats, about 1 in 20: from here on it is always known what was expected instead
MAX_LOGITS = 1 << 22  # that are computed at a time: 16 MB
NONE = -1  # in place of an id


class Model(Protocol):
    """What a text is measured with; a `LanguageModel` is one."""

    vocabulary: Vocabulary
    vocab_size: int
    block_size: int

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """ids (B, T) -> logits (B, T, V)."""
        ...


@dataclass(frozen=True)
class Measured:
    """A part of a text, n characters; K = EXPECTED."""

    text: str
    nats: np.ndarray
    """(n,) float64: -ln of the probability of each character; NaN for the first of the text, which follows nothing."""
    expected: np.ndarray
    """(n, K) int32: the ids that were likeliest, the likeliest first; NONE where that is not known."""
    probabilities: np.ndarray
    """(n, K) float32: theirs."""

    def __getitem__(self, part: slice) -> "Measured":
        return Measured(self.text[part], self.nats[part], self.expected[part], self.probabilities[part])

    @classmethod
    def join(cls, parts: list["Measured"]) -> "Measured":
        """Parts that follow each other, as one."""
        if not parts:
            none = np.empty((0, EXPECTED))
            return cls("", np.empty(0), none.astype(np.int32), none.astype(np.float32))
        arrays = ([getattr(part, name) for part in parts] for name in ("nats", "expected", "probabilities"))
        return cls("".join(part.text for part in parts), *map(np.concatenate, arrays))


def measure(model: Model, pieces: Iterable[str], detailed: int = 0) -> Iterator[Measured]:
    """A text in pieces of any length -> the same text, measured, in pieces of whole characters.

    The model sees windows of `block_size` ids that overlap by half, so that no character is surprising just because its
    window began: each but the first of the text is predicted once, from at least half a window or all that comes before
    it. A character that is spelled in several ids has the sum of their nats, and what was expected in place of its
    first. What was expected is there for the first `detailed` characters, and for all that have NOTABLE nats or more.
    Raises `UserError` for lone surrogates and broken models.
    """
    first: list[str] = []

    def ids() -> Iterator[np.ndarray]:
        for piece in pieces:
            if piece and not first:
                first.append(piece[0])
            yield model.vocabulary.encode(piece)

    partial = _partial(model.vocabulary)
    held, done = None, 0  # `held` is the last character, which may go on in the next batch
    for inputs, targets in _small(windows(ids(), model.block_size, max(1, model.block_size // 2)), model.vocab_size):
        if not done:
            done = 1
            yield _measured(first[0], np.array([np.nan]))
        found = _of_batch(model, inputs, targets, partial if done >= detailed else None)
        if held:
            found = tuple(np.concatenate(pair) for pair in zip(held, found, strict=True))
        starts = np.flatnonzero(begins_character(found[0]))
        if len(starts) > 1:
            part = _whole(model.vocabulary, *(array[: starts[-1]] for array in found))
            done += len(part.text)
            yield part
        held = tuple(array[starts[-1] :] for array in found)
    if held:
        yield _whole(model.vocabulary, *held)
    elif first:
        yield _measured(first[0], np.array([np.nan]))


def _small(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of windows, cut into as many rows as give MAX_LOGITS, without the padding of the last window."""
    for inputs, targets in batches:
        rows = max(1, MAX_LOGITS // (inputs.shape[1] * vocab_size))
        for start in range(0, len(inputs), rows):
            part = targets[start : start + rows]
            used = 1 + np.flatnonzero((part != IGNORED).any(axis=0)).max(initial=-1)
            if used:  # else it is the rest of the first character
                yield inputs[start : start + rows, :used], part[:, :used]


def _of_batch(
    model: Model, inputs: np.ndarray, targets: np.ndarray, partial: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """inputs, targets (B, T) -> of the m targets that count: ids (m,), nats (m,), expected (m, K), probabilities.

    What was expected is looked for everywhere, or if `partial` is given, where an id is one of those or notable.
    """
    counts = targets != IGNORED
    unused = np.flatnonzero(counts.any(axis=0)).min()  # the half that is there for its context only
    logits, targets, counts = model.logits(inputs)[:, unused:], targets[:, unused:], counts[:, unused:]
    found = nats(logits.copy(), targets)
    wanted = counts if partial is None else counts & ((found >= NOTABLE) | partial[targets])
    rows, values = logits[wanted], found[wanted]  # (k, V), (k,)
    most = min(EXPECTED, rows.shape[1])
    best = np.argpartition(rows, -most, axis=1)[:, -most:]
    order = np.take_along_axis(rows, best, 1).argsort(axis=1)[:, ::-1]
    best = np.take_along_axis(best, order, 1)
    own = rows[np.arange(len(rows)), targets[wanted]].astype(np.float64)
    expected = np.full((*targets.shape, EXPECTED), NONE, np.int32)
    probabilities = np.zeros(expected.shape, np.float32)
    expected[wanted, :most] = best
    probabilities[wanted, :most] = np.exp(np.take_along_axis(rows, best, 1) - own[:, None] - values[:, None])
    return targets[counts], found[counts], expected[counts], probabilities[counts]


def _partial(vocabulary: Vocabulary) -> np.ndarray:
    """Whether each id is only a part of a character; (V + 1,), the last for IGNORED."""
    whole = [*(byte < 0x80 for byte in range(256)), *(_is_whole(token) for token in vocabulary.tokens), True]
    return ~np.array(whole)


def _is_whole(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def id_name(vocabulary: Vocabulary, id: int) -> str:
    """The character that an id is, or as <e2 82> the bytes of the part of a rare one that it is."""
    data = vocabulary.decode_bytes([id])
    return data.decode() if _is_whole(data) else f"<{data.hex(' ')}>"


def _whole(
    vocabulary: Vocabulary, ids: np.ndarray, values: np.ndarray, expected: np.ndarray, probabilities: np.ndarray
) -> Measured:
    """The same by characters."""
    starts = np.flatnonzero(begins_character(ids))
    summed = np.add.reduceat(values, starts)
    return Measured(vocabulary.decode(ids), summed, expected[starts], probabilities[starts])


def _measured(text: str, values: np.ndarray) -> Measured:
    """Where nothing was expected."""
    shape = len(text), EXPECTED
    return Measured(text, values, np.full(shape, NONE, np.int32), np.zeros(shape, np.float32))
