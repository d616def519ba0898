"""The copy report: how much of what a model wrote stands word for word in the text that it learnt from.

The same figures of the real validation text, in passages as long in all, say how much of that is the language's nature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smallm.training.analysis.characters import Characters, as_text, spread
from smallm.training.analysis.windows import SEPARATOR, Sums, Windows, joined
from smallm.training.data.corpus import Corpus

WIDTHS = 20, 50, 100  # characters of the windows whose share is counted
LONGEST = 1 << 14  # characters of a run, beyond which it is not followed
MIN_VALIDATION, PASSAGES = 10_000, 8  # characters of the validation text to compare with, and pieces of it
REMARKABLE = 3  # times the validation text's longest run, from which on a copied run is worth a line ...
REMARKABLE_CHARACTERS = 50  # ... if it is as long as that
ENOUGH = 1_000  # characters of which a share says something; in fewer one turn of phrase is a tenth


@dataclass(frozen=True)
class Copied:
    """What of a text stands in the training text."""

    characters: int
    """Length of the text."""
    longest: int
    """Characters of its longest run that stands there; 0 if that is shorter than WIDTHS[0], at most LONGEST."""
    passage: str
    """That run."""
    shares: dict[int, float]
    """Of its windows of so many characters, the share that stands there, from 0 to 1."""


@dataclass(frozen=True)
class CopyReport:
    """What a model copied, beside what the real validation text has in common with the training text."""

    generated: Copied
    validation: Copied

    @property
    def is_remarkable(self) -> bool:
        """Whether the model copies more than anyone who writes in this language."""
        most = max(REMARKABLE_CHARACTERS, REMARKABLE * self.validation.longest)
        width = WIDTHS[1]
        more = self.generated.shares[width] > 0.1 + REMARKABLE * self.validation.shares[width]
        return self.generated.longest >= most or (more and self.generated.characters >= ENOUGH)

    def rows(self) -> list[list[str]]:
        """The figures as a table: what, generated, validation text."""
        both = self.generated, self.validation
        return [
            ["characters looked at", *(f"{one.characters:,}" for one in both)],
            ["longest run", *map(_length, both)],
            *([f"windows of {w} characters", *(f"{100 * one.shares[w]:.1f} %" for one in both)] for w in WIDTHS),
        ]

    def lines(self) -> list[str]:
        """The figures in words."""
        ours, theirs = self.generated, self.validation
        shares = [f"{100 * ours.shares[w]:.1f} % ({100 * theirs.shares[w]:.1f} %) of {w}" for w in WIDTHS]
        return [
            f"word for word from the training text: a run of {_length(ours)} (validation text: {_length(theirs)})",
            f"of its windows of so many characters (validation text): {', '.join(shares)}",
        ]


def copies(generated: str | Sequence[str], training: str | Corpus, validation: str | None = None) -> CopyReport:
    """Looks for all that is written in `generated`, one text or several, in the training text.

    training: a text, or a corpus whose validation text is taken if none is given. Of the validation text there are
    compared as many ids as characters were generated, or MIN_VALIDATION if that is more, in PASSAGES evenly spread.
    """
    if isinstance(training, str):
        source, tail = Characters.of(training), Characters.of(validation or "")
    else:
        source = Characters(training.train_ids, training.vocabulary)
        tail = Characters(training.val_ids, training.vocabulary) if validation is None else Characters.of(validation)
    written = [Characters.of(text) for text in ([generated] if isinstance(generated, str) else generated)]
    ours = Search([text.between(0, len(text)) for text in written])
    most = max(MIN_VALIDATION, ours.characters)
    theirs = Search([tail.between(*part) for part in spread(len(tail), most, max(1, most // PASSAGES))])
    for codes, _ in source.pieces(keep=max(ours.reach, theirs.reach)):
        sums = Sums(codes)
        ours.look(sums)
        theirs.look(sums)
    return CopyReport(ours.result(), theirs.result())


class Search:
    """Some texts that are looked for in a longer one as it goes by."""

    def __init__(self, texts: Sequence[np.ndarray]):
        self._windows = [Windows(texts, width) for width in WIDTHS]
        self._codes = joined(texts)
        self._sums = Sums(self._codes)
        self._apart = np.concatenate([[0], np.cumsum(self._codes == SEPARATOR)])
        self._hashes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._longest, self._start = 0, 0
        self.characters = sum(map(len, texts))
        self.reach = min(LONGEST, max([WIDTHS[-1], *map(len, texts)]))
        """The most characters that matter from one place on."""

    def look(self, sums: Sums) -> None:
        """Looks in the next piece of the long text; what stands in a wider window is where a narrower one is."""
        starts = None
        for windows in self._windows:
            if starts is not None:
                starts = starts[starts + windows.width <= len(sums.codes)]
            found = windows.look(sums, starts)
            starts = found
            if windows is self._windows[0]:
                candidates = found
        self._follow(sums, candidates)

    def _follow(self, sums: Sums, starts: np.ndarray) -> None:
        """Makes the longest run longer if one of those that begin at `starts` is: twice as long, then in the middle."""
        low = max(self._longest, WIDTHS[0] - 1)
        high = min(self.reach, len(sums.codes)) + 1
        step = 1
        while low + 1 < high:
            width = min(low + step, high - 1) if step else (low + high) // 2
            place = self._place(sums, starts, width)
            if place is None:
                high, step = width, 0
            else:
                low, self._longest, self._start, step = width, width, place, 2 * step

    def _place(self, sums: Sums, starts: np.ndarray, width: int) -> int | None:
        """Where a run of this width that begins at one of `starts` stands in our texts."""
        starts = starts[starts + width <= len(sums.codes)]
        hashes, places = self._of_width(width)
        if not len(starts) or not len(hashes):
            return None
        theirs = sums.windows(width, starts)
        which = np.minimum(np.searchsorted(hashes, theirs), len(hashes) - 1)
        for hit in np.flatnonzero(hashes[which] == theirs)[:1]:
            start, place = int(starts[hit]), int(places[which[hit]])
            if (sums.codes[start : start + width] == self._codes[place : place + width]).all():
                return place
        return None

    def _of_width(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of our windows of this width, sorted, and where they stand."""
        if width not in self._hashes:
            number = max(0, len(self._codes) - width + 1)
            places = np.flatnonzero(self._apart[width : width + number] == self._apart[:number])
            hashes = self._sums.windows(width, places)
            order = np.argsort(hashes)
            self._hashes = {width: (hashes[order], places[order])} | dict(list(self._hashes.items())[:15])
        return self._hashes[width]

    def result(self) -> Copied:
        """What was found."""
        passage = as_text(self._codes[self._start : self._start + self._longest])
        return Copied(self.characters, self._longest, passage, {one.width: one.share for one in self._windows})


def _length(copied: Copied) -> str:
    return f"{copied.longest:,} characters" if copied.longest else f"fewer than {WIDTHS[0]} characters"
