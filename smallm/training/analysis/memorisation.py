"""Memorisation: how much of a generated text occurs word for word in the text that the model was trained on.

The same figures of the validation text, in passages of the same length in all, show how much of the overlap is natural.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smallm.training.analysis.characters import code_points, spread
from smallm.training.analysis.windows import WindowSet

WIDTHS = 20, 50, 100  # characters of the windows whose share is counted
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
    """Length of the longest common passage; 0 if that is shorter than WIDTHS[0]."""
    shares: dict[int, float]
    """For each width, the share of the text's windows that occur in the training text, from 0 to 1."""

    @property
    def length(self) -> str:
        """The length of the longest common passage in words."""
        return f"{self.longest:,} characters" if self.longest else f"fewer than {WIDTHS[0]} characters"


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
            ["longest copied passage", *(one.length for one in both)],
            *([f"copied windows of {w} characters", *(f"{100 * one.shares[w]:.1f} %" for one in both)] for w in WIDTHS),
        ]


def measure_memorisation(generated: Sequence[str], training: str, validation: str) -> MemorisationReport:
    """Searches the training text for everything that the generated texts contain.

    As many characters of the validation text are compared as were generated, but at least MIN_VALIDATION, in PASSAGES
    evenly spaced passages.
    """
    source, limit = code_points(training), max(MIN_VALIDATION, sum(map(len, generated)))
    passages = [validation[start:stop] for start, stop in spread(len(validation), limit, limit // PASSAGES)]
    return MemorisationReport(_overlap(generated, source), _overlap(passages, source))


def _overlap(texts: Sequence[str], source: np.ndarray) -> Overlap:
    sets = [WindowSet(texts, width).search(source) for width in WIDTHS]
    longest, starts = 0, sets[0].starts()
    if len(starts):
        ends = starts[np.append(np.diff(starts) > 1, True)]  # of adjacent windows, within which a longer one lies
        limit = int((ends[np.searchsorted(ends, starts)] - starts).max()) + WIDTHS[0]
        lengths = range(WIDTHS[0] + 1, limit + 1)
        longest = WIDTHS[0] + bisect_left(
            lengths, True, key=lambda width: not len(WindowSet(texts, width).search(source).starts())
        )
    return Overlap(sum(map(len, texts)), longest, {windows.width: windows.share() for windows in sets})
