"""The most surprising spans of a text: passages, such as a paragraph in another language, and words, such as a typo.

The gain of a character is its surprisal minus a threshold, USUAL times the mean surprisal of the text. A span comes
from a stretch with the maximal sum of gains: a longer or a shorter stretch would have a smaller sum. Surprising
characters with few usual characters between them therefore form one stretch, and about a hundred usual characters
separate two. The factor is that of the likelihood-ratio test whether exponentially distributed values, which
surprisals nearly are, have this mean or twice this mean.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from smallm.surprisal.measure import UNKNOWN, Measured, id_name
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
        self._start = (0, 1, 1)  # offset, line and column of the first of these
        self._passages: list[Span] = []
        self._words: dict[str, Span] = {}
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
        return self._passages, list(self._words.values())

    def _search(self, measured: Measured) -> None:
        """Finds the spans of a chunk, and keeps the best of all so far."""
        nats = np.nan_to_num(measured.nats)
        self.nats += float(nats.sum())
        self.characters += len(nats)
        mean = self.nats / max(1, self.characters - 1)
        chunk = _Chunk(measured, nats, mean * USUAL, self._start, self._vocabulary)
        passages, peaks = chunk.candidates(mean * MAX_LOSS)
        taken: list[tuple[int, int]] = []  # no two spans share a word
        for _, start, end, peak in sorted(passages):
            if len(taken) < self._max_spans and _is_apart(start, end, taken):
                taken.append((start, end))
                self._passages.append(chunk.span(start, end, peak))
        self._passages = sorted(self._passages, key=lambda span: (-span.excess, span.offset))[: self._max_spans]
        words: dict[str, Span] = {}
        for _, peak in sorted(peaks):
            start, end = _whole_words(measured.text, peak, peak + 1)
            word = _bare(measured.text[start:end])
            if word not in words and _is_apart(start, end, taken):
                words[word] = chunk.span(start, end, peak)
                taken.append((start, end))
            if len(words) == self._max_spans:
                break
        self._words = self._merged(words)
        self._start = chunk.position(len(nats))

    def _merged(self, words: dict[str, Span]) -> dict[str, Span]:
        """The best of the words so far and of these, each where its peak is highest."""
        best = dict(self._words)
        for word, span in words.items():
            if word not in best or span.peak.nats > best[word].peak.nats:
                best[word] = span
        order = sorted(best.items(), key=lambda item: (-item[1].peak.nats, item[1].offset))
        return dict(order[: self._max_spans])


class _Chunk:
    """A part of a text that is searched at once; indices count from its first character.

    usual: the threshold in nats; start: offset, line and column of the first character.
    """

    def __init__(
        self, measured: Measured, nats: np.ndarray, usual: float, start: tuple[int, int, int], vocabulary: Vocabulary
    ):
        self._measured, self._nats, self._usual, self._start = measured, nats, usual, start
        self._vocabulary = vocabulary
        self._line_ends = np.flatnonzero(np.frombuffer(measured.text.encode("utf-32-le"), "<u4") == ord("\n"))

    def candidates(self, max_loss: float) -> tuple[list[tuple[float, int, int, int]], list[tuple[float, int]]]:
        """Passages as (-excess, start, end, peak), and the peaks of words as (-nats, peak)."""
        passages, peaks = [], []
        for start, end in _stretches(self._nats - self._usual, max_loss):
            highest = self._nats[start:end].max()
            if highest < MIN_PEAK:
                continue
            if end - start > MAX_WORD:
                peak = start + int(self._nats[start:end].argmax())
                start, end = _whole_words(self._measured.text, start, end)
                excess = float(self._nats[start:end].sum() - self._usual * (end - start))
                if excess >= MIN_EXCESS:
                    passages.append((-excess, start, end, peak))
            else:
                peak = start + int(np.argmax(self._nats[start:end] >= PEAK_SHARE * highest))
                peaks.append((-self._nats[peak], peak))
        return passages, peaks

    def span(self, start: int, end: int, at: int) -> Span:
        """The span from `start` to `end` with its peak `at`."""
        text, ids = self._measured.text, self._measured.expected[at]
        names = [id_name(self._vocabulary, id) for id in ids[ids != UNKNOWN].tolist()]
        expected = tuple(zip(names, self._measured.probabilities[at].tolist(), strict=False))
        offset, line, column = self.position(at)
        peak = Peak(line, column, offset, text[at], float(self._nats[at]), expected)
        offset, line, column = self.position(start)
        total, length = float(self._nats[start:end].sum()), end - start
        shown = text[start : start + min(length, MAX_TEXT)]
        before, after = text[max(0, start - CONTEXT) : start], text[end : end + CONTEXT]
        return Span(line, column, offset, length, total, total - self._usual * length, shown, before, after, peak)

    def position(self, index: int) -> tuple[int, int, int]:
        """Offset, line and column of a character of the chunk, or of the first character after the chunk."""
        offset, line, column = self._start
        ends = int(self._line_ends.searchsorted(index))
        column = column + index if ends == 0 else index - int(self._line_ends[ends - 1])
        return offset + index, line + ends, column


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
            last = next((i for i in range(len(open_) - 1, -1, -1) if open_[i][2] < before), None)
            if last is None:  # no later gain can extend them
                yield from (stretch[:2] for stretch in open_)
                open_ = []
            elif open_[last][3] < after:
                start, before = open_[last][0], open_[last][2]
                del open_[last:]
                continue
            open_.append((start, end, before, after))
            break
        highest = max(highest, after)
    yield from (stretch[:2] for stretch in open_)


def _is_apart(start: int, end: int, others: list[tuple[int, int]]) -> bool:
    return all(end <= first or last <= start for first, last in others)


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Extends a stretch to whole words, and removes white space at its ends."""
    part = text[start:end]
    if not part.isspace():
        start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
        first, last = max(0, start - MAX_WORD), end + MAX_WORD
        before, after = re.search(r"\S*\Z", text[first:start]), re.match(r"\S*", text[end:last])
        assert before is not None, part  # both patterns match even an empty string
        assert after is not None, part
        start, end = first + before.start(), end + after.end()
    return start, end


def _bare(word: str) -> str:
    """The word without surrounding punctuation; a word of nothing but punctuation stays as it is."""
    return re.sub(r"^\W+|\W+$", "", word) or word
