"""The most surprising places of a text: passages, such as a paragraph in another language, and words, such as a typo.

A place comes from a stretch whose characters have together most above what is usual, USUAL times the text's mean of
nats: a longer or a shorter one would have less. The factor is that of the test whether characters have that mean or
twice as much, if nats are spread as exponentials are, and they nearly are. Surprising characters with few usual ones
between them are so one stretch; a hundred usual ones part them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from smallm.surprisal.measure import NONE, NOTABLE, Measured, id_name
from smallm.tokenizer.vocabulary import Vocabulary

USUAL = 1.386  # 2 ln 2
PARTED = 40.0  # times the mean: what a stretch may lose before it is at its end; a hundred characters lose that much
CHAPTER = 1 << 18  # characters among which places are looked for at a time; none goes beyond
LONGEST_WORD = 30  # characters; a longer stretch is a passage
MIN_EXCESS = 10.0  # nats that a passage has to have above the usual
THROWN_OFF = 0.75  # in a word, the first with that share of the highest nats counts: it throws off what follows
MIN_PEAK = NOTABLE / THROWN_OFF  # nats that some character of a place has to have
CONTEXT = 30  # characters that are kept of what stands before and after a place
MAX_TEXT = 300  # and of itself


@dataclass(frozen=True)
class Peak:
    """The most surprising character of a passage; in a word, the first of those that have nearly the highest nats."""

    line: int
    column: int
    offset: int
    character: str
    nats: float
    expected: tuple[tuple[str, float], ...]
    """What the model expected most in its place, with the probabilities; see `id_name`."""


@dataclass(frozen=True)
class Place:
    """Some whole words of the text; lines and columns count characters from 1, offsets from 0."""

    line: int
    column: int
    offset: int
    characters: int
    nats: float
    excess: float
    """Nats above what is usual in the text."""
    text: str
    """Its first MAX_TEXT characters."""
    before: str
    after: str
    peak: Peak

    @property
    def end(self) -> int:
        """The offset of what follows it."""
        return self.offset + self.characters


def find_spans(
    parts: Iterable[Measured], vocabulary: Vocabulary, most: int = 10
) -> tuple[list[Place], list[Place]]:
    """A text as `measure` gives it -> its `most` most surprising passages and words, see `SpanFinder.finish`."""
    finder = SpanFinder(vocabulary, most)
    for part in parts:
        finder.add(part)
    return finder.finish()


class SpanFinder:
    """Takes a text part by part; keeps its figures and its most surprising places, in memory that is bounded."""

    def __init__(self, vocabulary: Vocabulary, most: int = 10):
        self._vocabulary, self._most = vocabulary, most
        self._parts: list[Measured] = []
        self._waiting = 0  # characters in them
        self._begins = (0, 1, 1)  # their offset, line and column
        self._passages: list[Place] = []
        self._words: dict[str, Place] = {}
        self.nats = 0.0
        """Of all characters that were looked at; all of them after `finish`."""
        self.characters = 0
        """How many those are, with the first, which is not predicted."""

    def add(self, part: Measured) -> None:
        """The next part of the text."""
        self._parts.append(part)
        self._waiting += len(part.text)
        while self._waiting >= CHAPTER:
            joined = Measured.join(self._parts)
            self._look(joined[:CHAPTER])
            self._parts, self._waiting = [joined[CHAPTER:]], self._waiting - CHAPTER

    def finish(self) -> tuple[list[Place], list[Place]]:
        """The passages, by what they have above the usual, and the words, by their most surprising character.

        What is usual is measured by the mean of the text up to the end of the CHAPTER that a place stands in; if there
        is only one, by that of the text. A word that is surprising in several places stands here once.
        """
        if self._waiting:
            self._look(Measured.join(self._parts))
            self._parts, self._waiting = [], 0
        return self._passages, list(self._words.values())

    def _look(self, chapter: Measured) -> None:
        """Finds the places of a chapter, and keeps the best of all so far."""
        nats = np.nan_to_num(chapter.nats)
        self.nats += float(nats.sum())
        self.characters += len(nats)
        usual = self.nats / max(1, self.characters - 1) * USUAL
        positions = _Positions(chapter.text, *self._begins)
        passages, words = [], []  # what orders them, negative, then start, end and the peak, or the peak alone
        for start, end in _stretches(nats - usual, usual * PARTED / USUAL):
            highest = nats[start:end].max()
            if highest >= MIN_PEAK and end - start > LONGEST_WORD:
                peak = start + int(nats[start:end].argmax())
                start, end = _whole_words(chapter.text, start, end)
                excess = float(nats[start:end].sum() - usual * (end - start))
                if excess >= MIN_EXCESS:
                    passages.append((-excess, start, end, peak))
            elif highest >= MIN_PEAK:
                peak = start + int(np.argmax(nats[start:end] >= THROWN_OFF * highest))
                words.append((-nats[peak], peak))

        def place(start: int, end: int, peak: int) -> Place:
            return self._place(chapter, nats, usual, positions, start, end, peak)

        taken: list[tuple[int, int]] = []  # so that no two places share a word
        for _, start, end, peak in sorted(passages):
            if len(taken) < self._most and _apart(start, end, taken):
                taken.append((start, end))
                self._passages.append(place(start, end, peak))
        self._passages = sorted(self._passages, key=lambda found: (-found.excess, found.offset))[: self._most]
        found: dict[str, Place] = {}
        for _, peak in sorted(words):
            start, end = _whole_words(chapter.text, peak, peak + 1)
            word = _bare(chapter.text[start:end])
            if word not in found and _apart(start, end, taken):
                found[word] = place(start, end, peak)
                taken.append((start, end))
            if len(found) == self._most:
                break
        self._words = self._merged(found)
        self._begins = positions.at(len(nats))

    def _merged(self, found: dict[str, Place]) -> dict[str, Place]:
        """The best of the words so far and of those found now, each at its most surprising place."""
        best = dict(self._words)
        for word, place in found.items():
            if word not in best or place.peak.nats > best[word].peak.nats:
                best[word] = place
        order = sorted(best.items(), key=lambda item: (-item[1].peak.nats, item[1].offset))
        return dict(order[: self._most])

    def _place(
        self, chapter: Measured, nats: np.ndarray, usual: float, positions: "_Positions", start: int, end: int, at: int
    ) -> Place:
        text, ids = chapter.text, chapter.expected[at]
        names = [id_name(self._vocabulary, id) for id in ids[ids != NONE].tolist()]
        expected = tuple(zip(names, chapter.probabilities[at].tolist(), strict=False))
        offset, line, column = positions.at(at)
        peak = Peak(line, column, offset, text[at], float(nats[at]), expected)
        offset, line, column = positions.at(start)
        total, length = float(nats[start:end].sum()), end - start
        shown = text[start : start + min(length, MAX_TEXT)]
        before, after = text[max(0, start - CONTEXT) : start], text[end : end + CONTEXT]
        return Place(line, column, offset, length, total, total - usual * length, shown, before, after, peak)


def _stretches(gains: np.ndarray, parted: float) -> Iterator[tuple[int, int]]:
    """gains (n,), above and below zero -> (start, end) of the disjoint stretches of maximal sum.

    After Ruzzo and Tompa 1999 ("A linear time algorithm for finding all maximal scoring subsequences"), on runs of
    gains; in addition, a loss of more than `parted` ends what came before it.
    """
    above = gains > 0
    edges = [0, *(np.flatnonzero(np.diff(above)) + 1).tolist(), len(gains)]
    sums = np.concatenate(([0.0], np.cumsum(gains)))
    open_: list[tuple[int, int, float, float]] = []  # start, end, sum of all before it, sum up to its end
    highest = -np.inf
    for start, end in pairwise(edges):
        if start == end or not above[start]:
            continue
        before, after = float(sums[start]), float(sums[end])
        if highest - before > parted:
            yield from (stretch[:2] for stretch in open_)
            open_, highest = [], -np.inf
        while True:
            last = next((i for i in range(len(open_) - 1, -1, -1) if open_[i][2] < before), None)
            if last is None:  # nothing that comes later can join them
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


def _apart(start: int, end: int, others: list[tuple[int, int]]) -> bool:
    return all(end <= first or last <= start for first, last in others)


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """The stretch without the spaces at its ends, but with the whole of the words in which it begins and ends."""
    part = text[start:end]
    if not part.isspace():
        start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
        first, last = max(0, start - LONGEST_WORD), end + LONGEST_WORD
        start = first + re.search(r"\S*\Z", text[first:start]).start()
        end += re.match(r"\S*", text[end:last]).end()
    return start, end


def _bare(word: str) -> str:
    """Without quotes and punctuation around it, unless it is nothing else."""
    return re.sub(r"^\W+|\W+$", "", word) or word


class _Positions:
    """Lines and columns in a part of a text that begins at this offset, line and column."""

    def __init__(self, text: str, offset: int, line: int, column: int):
        self._begins = offset, line, column
        self._line_ends = np.flatnonzero(np.frombuffer(text.encode("utf-32-le"), "<u4") == ord("\n"))

    def at(self, index: int) -> tuple[int, int, int]:
        """Offset, line and column of a character of the part, or of what follows it."""
        offset, line, column = self._begins
        ends = int(self._line_ends.searchsorted(index))
        column = column + index if ends == 0 else index - int(self._line_ends[ends - 1])
        return offset + index, line + ends, column
