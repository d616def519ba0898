"""The most surprising spans of a text: passages, such as a paragraph in another language, and words, such as a typo.

The gain of a character is its surprisal minus a threshold, USUAL times the mean surprisal of the text. A span comes
from a stretch with the maximal sum of gains: a longer or a shorter stretch would have a smaller sum. Surprising
characters with few usual characters between them therefore form one stretch, and about a hundred usual characters
separate two. The factor is that of the likelihood-ratio test whether exponentially distributed values, which
surprisals nearly are, have this mean or twice this mean.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from smallm.surprisal.measure import Measured, id_name
from smallm.tokenizer.vocabulary import Vocabulary

USUAL = 1.386  # 2 ln 2
MAX_LOSS = 40.0  # times the mean: a stretch ends after losing this much, which takes about a hundred characters
CHUNK = 1 << 18  # characters searched at a time; no span crosses the end of a chunk
MAX_WORD = 30  # characters; a longer stretch is a passage
MIN_EXCESS = 10.0  # nats above the threshold that a passage needs
PEAK_SHARE = 0.75  # a word's peak is its first character with this share of its highest surprisal, as one surprising
# character makes the following ones surprising too
MIN_PEAK = 4.0  # nats that the highest surprisal in a span must reach
CONTEXT = 30  # characters stored from before and after a span
MAX_TEXT = 300  # characters stored of a span


@dataclass(frozen=True)
class Peak:
    """The most surprising character of a passage; in a word, the first character with nearly the highest surprisal."""

    line: int
    column: int
    offset: int
    character: str
    nats: float
    expected: tuple[tuple[str, float], ...]
    """The characters with the highest probabilities here, as named by `id_name`, and these probabilities."""


@dataclass(frozen=True)
class Span:
    """Consecutive whole words of a text. Lines and columns count from 1, offsets from 0, all in characters."""

    line: int
    column: int
    offset: int
    characters: int
    nats: float
    """Sum of the surprisals of its characters."""
    excess: float
    """`nats` above the threshold."""
    text: str
    """Its first MAX_TEXT characters."""
    before: str
    """The CONTEXT characters before it; `after`: those after it."""
    after: str
    peak: Peak

    @property
    def end(self) -> int:
        """The offset after its last character."""
        return self.offset + self.characters


class SpanFinder:
    """Takes a text part by part and keeps its most surprising spans, in bounded memory.

    vocabulary: the model's, for the names of expected characters.
    max_spans: how many passages, and how many words, to keep.
    """

    def __init__(self, vocabulary: Vocabulary, max_spans: int = 10):
        self._vocabulary, self._max_spans = vocabulary, max_spans
        self._parts: list[Measured] = []
        self._waiting = 0  # characters in self._parts
        self._line = self._column = 1  # of the first of these
        self._passages: list[Span] = []
        self._words: list[Span] = []
        self.nats = 0.0
        """Sum of the surprisals searched so far; of the whole text after `finish`."""
        self.characters = 0
        """Number of characters searched so far, including the first, which is not predicted."""

    def add(self, part: Measured) -> None:
        """Takes the next part of the text."""
        self._parts.append(part)
        self._waiting += len(part.text)
        while self._waiting >= CHUNK:
            joined = Measured.join(self._parts)
            self._search(joined[:CHUNK])
            self._parts, self._waiting = [joined[CHUNK:]], self._waiting - CHUNK

    def finish(self) -> tuple[list[Span], list[Span]]:
        """The passages, by decreasing excess, and the words, by decreasing surprisal of their peak.

        The threshold comes from the mean of the text up to the end of the chunk that contains the span; a text of up to
        CHUNK characters thus has one threshold. A word that occurs several times is listed once, where its peak is
        highest.
        """
        if self._waiting:
            self._search(Measured.join(self._parts))
            self._parts, self._waiting = [], 0
        return self._passages, self._words

    def _search(self, measured: Measured) -> None:
        """Finds the spans of a chunk, and keeps the best of all so far."""
        text, nats = measured.text, np.nan_to_num(measured.nats)
        self.nats += float(nats.sum())
        self.characters += len(nats)
        mean = self.nats / max(1, self.characters - 1)
        usual = mean * USUAL
        found: tuple[dict[Hashable, Span], dict[Hashable, Span]] = {}, {}  # passages, words
        taken: list[tuple[int, int]] = []  # no two spans share a word
        for is_word, _, start, end, peak in sorted(_candidates(text, nats, usual, mean * MAX_LOSS)):
            spans, key = found[is_word], _bare(text[start:end]) if is_word else start
            is_apart = all(end <= first or last <= start for first, last in taken)
            if is_apart and key not in spans and len(spans) < self._max_spans:
                spans[key] = self._span(measured, usual, start, end, peak)
                taken.append((start, end))
        passages, words = ([*old, *new.values()] for old, new in zip((self._passages, self._words), found, strict=True))
        self._passages = self._best(passages, lambda span: span.excess, lambda span: span.offset)
        self._words = self._best(words, lambda span: span.peak.nats, lambda span: _bare(span.text))
        self._line, self._column = self._position(text, len(text))

    def _best(
        self, spans: Iterable[Span], score: Callable[[Span], float], key: Callable[[Span], Hashable]
    ) -> list[Span]:
        """The spans with the highest score, one for each key."""
        best: dict[Hashable, Span] = {}
        for span in sorted(spans, key=lambda span: (-score(span), span.offset)):
            best.setdefault(key(span), span)
        return list(best.values())[: self._max_spans]

    def _span(self, measured: Measured, usual: float, start: int, end: int, at: int) -> Span:
        """The span of a chunk from `start` to `end` with its peak `at`. usual: the threshold in nats."""
        text, ids, offset = measured.text, measured.expected[at], self.characters - len(measured.text)
        names = (id_name(self._vocabulary, id) for id in ids.tolist())
        expected = tuple(zip(names, measured.probabilities[at].tolist(), strict=True))
        peak = Peak(*self._position(text, at), offset + at, text[at], float(measured.nats[at]), expected)
        total, length = float(np.nansum(measured.nats[start:end])), end - start
        shown = text[start : start + min(length, MAX_TEXT)]
        before, after = text[max(0, start - CONTEXT) : start], text[end : end + CONTEXT]
        where = (*self._position(text, start), offset + start)
        return Span(*where, length, total, total - usual * length, shown, before, after, peak)

    def _position(self, text: str, index: int) -> tuple[int, int]:
        """Line and column of a character of the chunk, or of the first character after the chunk."""
        ends = text.count("\n", 0, index)
        return self._line + ends, index - text.rfind("\n", 0, index) if ends else self._column + index


def _candidates(
    text: str, nats: np.ndarray, usual: float, max_loss: float
) -> Iterator[tuple[bool, float, int, int, int]]:
    """The spans of a chunk that may be listed: whether it is a word, the negative of its score, start, end, peak."""
    for start, end in _stretches(nats - usual, max_loss):
        highest = nats[start:end].max()
        if highest < MIN_PEAK:
            continue
        is_word = end - start <= MAX_WORD
        peak = start + int(np.argmax(nats[start:end] >= (PEAK_SHARE if is_word else 1) * highest))
        start, end = _whole_words(text, peak, peak + 1) if is_word else _whole_words(text, start, end)
        score = float(nats[peak] if is_word else nats[start:end].sum() - usual * (end - start))
        if is_word or score >= MIN_EXCESS:
            yield is_word, -score, start, end, peak


def _stretches(gains: np.ndarray, max_loss: float) -> Iterator[tuple[int, int]]:
    """gains (n,), positive and negative -> (start, end) of the disjoint stretches of maximal sum.

    The algorithm of Ruzzo and Tompa 1999 ("A linear time algorithm for finding all maximal scoring subsequences"), on
    runs of gains of one sign; in addition, a loss of more than `max_loss` ends all stretches before it.
    """
    above = gains > 0
    edges = [0, *(np.flatnonzero(np.diff(above)) + 1).tolist(), len(gains)]
    sums = np.concatenate(([0.0], np.cumsum(gains)))
    open_: list[tuple[int, int, float, float]] = []  # start, end, sum of all gains before the start, and before the end
    highest = -np.inf
    for start, end in pairwise(edges):
        if start == end or not above[start]:
            continue
        before, after = float(sums[start]), float(sums[end])
        if highest - before > max_loss:
            yield from (stretch[:2] for stretch in open_)
            open_, highest = [], -np.inf
        while True:
            last = next((i for i in reversed(range(len(open_))) if open_[i][2] < before), None)
            if last is None or open_[last][3] >= after:
                break
            start, before = open_[last][0], open_[last][2]
            del open_[last:]
        if last is None:  # no later gain can extend the others
            yield from (stretch[:2] for stretch in open_)
            open_ = []
        open_.append((start, end, before, after))
        highest = max(highest, after)
    yield from (stretch[:2] for stretch in open_)


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Extends a stretch to whole words, by MAX_WORD at most, and removes white space at its ends."""
    if not text[start:end].isspace():
        while text[start].isspace():
            start += 1
        while text[end - 1].isspace():
            end -= 1
        first, last = max(0, start - MAX_WORD), min(len(text), end + MAX_WORD)
        while start > first and not text[start - 1].isspace():
            start -= 1
        while end < last and not text[end].isspace():
            end += 1
    return start, end


def _bare(word: str) -> str:
    """The word without surrounding punctuation; a word of nothing but punctuation stays as it is."""
    return re.sub(r"^\W+|\W+$", "", word) or word
