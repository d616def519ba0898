"""Memorisation: how much of a generated text occurs word for word in the text that the model was trained on.

The same figures of the validation text, in passages of the same length in all, show how much of the overlap is natural.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smallm.training.analysis.characters import Characters, as_text, spread
from smallm.training.analysis.windows import WindowSet, window_hashes
from smallm.training.data.corpus import Corpus

WIDTHS = 20, 50, 100  # characters of the windows whose share is counted
LONGEST = 1 << 14  # characters after which a copied passage is not followed further
MIN_VALIDATION, PASSAGES = 10_000, 8  # characters of the validation text to compare with, and passages of it
REMARKABLE = 3  # factor over the validation text from which on copying is reported ...
REMARKABLE_CHARACTERS = 50  # ... if the passage has at least so many characters
MIN_CHARACTERS = 1_000  # for a share to mean something; in a shorter text one turn of phrase is a tenth


@dataclass(frozen=True)
class Overlap:
    """What a text has in common with the training text."""

    characters: int
    """Length of the text."""
    longest: int
    """Length of the longest common passage; 0 if that is shorter than WIDTHS[0], at most LONGEST."""
    passage: str
    """The longest common passage."""
    shares: dict[int, float]
    """For each width, the share of the text's windows that occur in the training text, from 0 to 1."""


@dataclass(frozen=True)
class MemorisationReport:
    """The overlap of generated text with the training text, beside that of the validation text."""

    generated: Overlap
    validation: Overlap

    @property
    def is_remarkable(self) -> bool:
        """Whether the model copies more than new text in the same language does."""
        threshold = max(REMARKABLE_CHARACTERS, REMARKABLE * self.validation.longest)
        width = WIDTHS[1]
        more = self.generated.shares[width] > 0.1 + REMARKABLE * self.validation.shares[width]
        return self.generated.longest >= threshold or (more and self.generated.characters >= MIN_CHARACTERS)

    def rows(self) -> list[list[str]]:
        """The figures as a table: label, generated text, validation text."""
        both = self.generated, self.validation
        return [
            ["characters compared", *(f"{one.characters:,}" for one in both)],
            ["longest copied passage", *map(_length, both)],
            *([f"copied windows of {w} characters", *(f"{100 * one.shares[w]:.1f} %" for one in both)] for w in WIDTHS),
        ]

    def lines(self) -> list[str]:
        """The figures in words."""
        ours, theirs = self.generated, self.validation
        shares = [f"{100 * ours.shares[w]:.1f} % ({100 * theirs.shares[w]:.1f} %) of {w}" for w in WIDTHS]
        return [
            f"longest passage copied from the training text: {_length(ours)} (validation text: {_length(theirs)})",
            f"share of windows of so many characters that are copied (validation text): {', '.join(shares)}",
        ]


def measure_memorisation(
    generated: str | Sequence[str], training: str | Corpus, validation: str | None = None
) -> MemorisationReport:
    """Searches the training text, in one reading, for everything that `generated`, one text or several, contains.

    training: a text, or a corpus, whose validation text is the default for `validation`. As many characters of the
    validation text are compared as were generated, but at least MIN_VALIDATION, in PASSAGES evenly spaced passages.
    """
    if isinstance(training, str):
        source, tail = Characters.of(training), Characters.of(validation or "")
    else:
        source = Characters(training.train_ids, training.vocabulary)
        tail = Characters(training.val_ids, training.vocabulary) if validation is None else Characters.of(validation)
    samples = [Characters.of(text) for text in ([generated] if isinstance(generated, str) else generated)]
    ours = _Search([sample.between(0, len(sample)) for sample in samples])
    limit = max(MIN_VALIDATION, ours.characters)
    theirs = _Search([tail.between(*part) for part in spread(len(tail), limit, max(1, limit // PASSAGES))])
    for codes, _ in source.pieces(overlap=max(ours.reach, theirs.reach)):
        hashes = {width: window_hashes(codes, width) for width in WIDTHS}
        ours.look(codes, hashes)
        theirs.look(codes, hashes)
    return MemorisationReport(ours.overlap(), theirs.overlap())


class _Search:
    """The windows of some texts, and the longest passage of these texts, that a longer text contains."""

    def __init__(self, texts: Sequence[np.ndarray]):
        self._sets = [WindowSet(texts, width) for width in WIDTHS]
        self._texts = [as_text(text) for text in texts]
        self._passage = ""
        self.characters = sum(map(len, texts))
        self.reach = min(LONGEST, max([WIDTHS[-1], *map(len, texts)]))
        """The longest passage to expect in characters, by which pieces of the longer text must overlap."""

    def look(self, codes: np.ndarray, hashes: dict[int, np.ndarray]) -> None:
        """Searches the next piece of the longer text; hashes: those of its windows for each width."""
        starts, *_ = [windows.find(codes, hashes[windows.width]) for windows in self._sets]
        if len(starts):
            self._lengthen(codes, starts)

    def _lengthen(self, codes: np.ndarray, starts: np.ndarray) -> None:
        """Replaces the passage by longer ones, which begin at `starts`: there the narrowest windows were found."""
        lasts = starts[np.append(np.diff(starts) > 1, True)]  # the last of adjacent starts
        limits = np.minimum(lasts[np.searchsorted(lasts, starts)] - starts + WIDTHS[0], LONGEST)
        while True:
            length = max(WIDTHS[0], len(self._passage) + 1)
            starts, limits = starts[limits >= length], limits[limits >= length]
            _, first = np.unique(window_hashes(codes, length)[starts], return_index=True)  # each passage once
            found = (i for i in first.tolist() if self._contains(as_text(codes[starts[i] : starts[i] + length])))
            if (i := next(found, None)) is None:
                return
            passage = as_text(codes[starts[i] : starts[i] + limits[i]])
            while length < len(passage) and self._contains(passage[: length + 1]):
                length += 1
            self._passage = passage[:length]

    def _contains(self, passage: str) -> bool:
        return any(passage in text for text in self._texts)

    def overlap(self) -> Overlap:
        """What was found."""
        shares = {windows.width: windows.share for windows in self._sets}
        return Overlap(self.characters, len(self._passage), self._passage, shares)


def _length(overlap: Overlap) -> str:
    return f"{overlap.longest:,} characters" if overlap.longest else f"fewer than {WIDTHS[0]} characters"
