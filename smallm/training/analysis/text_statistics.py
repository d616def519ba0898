"""The text doctor: reads a text's ids once, and finds what a reader of the loss and of the samples should know.

It looks at no more than MOST of the characters to train on and MAX_TAIL of those to validate on, evenly spread; what
was found is kept beside the ids. `advice` says in words what it means.
"""

import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from smallm.tokenizer.vocabulary import CODE_POINTS
from smallm.training.analysis.characters import Characters, as_text, spread
from smallm.training.analysis.windows import Sums, Windows
from smallm.training.cache import cached_json
from smallm.training.data.corpus import Corpus
from smallm.training.data.source import combines

VERSION = 1  # of what is kept; to be raised when a finding changes its meaning
MOST = 1 << 27  # characters of the training part that are looked at
MAX_TAIL = 1 << 24  # and of the tail
MAX_FORM = 1 << 22  # of each, whose Unicode form is looked at: that is slow
LEAK_WIDTH = 64  # characters that must stand together elsewhere
LEAK_CHARACTERS, LEAK_PIECE = 1 << 19, 1 << 10  # of the tail that are looked for, and how many lie together
REPEAT_SAMPLE = 1 << 20  # windows of the training part among which repeats are counted, at most
RARE = 10  # occurrences, below which a character is hardly learnt
LF, CR, MARK, DAMAGED = 0x0A, 0x0D, 0xFEFF, 0xFFFD
CONTROLS = [c for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n\r\f\x85"]


@dataclass(frozen=True)
class Checkup:
    """What was found. Shares are of what was looked at, from 0 to 1."""

    characters: int
    train_characters: int
    looked_at: int
    """Characters of the training part that were read."""
    distinct: int
    scripts: dict[str, float]
    """The scripts of the letters, the commonest first, with their shares of all letters."""
    rare: str
    """Characters that the training part has fewer than RARE times, the commonest first."""
    rare_share: float
    unseen: str
    """Characters of the tail that the training part does not have, the commonest first."""
    unseen_share: float
    """Of the tail."""
    marks: int
    """Byte order marks."""
    damaged: int
    """Replacement characters, U+FFFD: what a conversion before has lost."""
    misread: int
    """Pairs such as Ã© that come from UTF-8 read as Latin-1."""
    controls: dict[str, int]
    """Control characters by their names U+XXXX, but for tabulators and line and page ends."""
    crlf: int
    lf: int
    cr: int
    """CR that no LF follows."""
    longest_line: int
    longest_line_number: int
    """From 1; among the lines looked at."""
    composed: int
    """Letters that are one character with their accent."""
    decomposed: int
    """Letters whose accent stands as a character of its own, though Unicode has both in one."""
    repeated: float
    """Share of the windows of LEAK_WIDTH characters of the training part that stood in it before."""
    repeated_most: str
    """The window that occurs most often."""
    repeated_times: int
    """About how often."""
    leak: float
    """Share of the tail that lies in windows of LEAK_WIDTH characters which the training part has too."""
    leak_characters: int
    """Of the tail that were looked for."""
    leak_example: str


def examine(corpus: Corpus) -> Checkup:
    """The findings; known ones come from the cache."""
    values = cached_json(corpus.cache_file("text-statistics"), VERSION, lambda: asdict(_examine(corpus)))
    return Checkup(**values)


def _examine(corpus: Corpus) -> Checkup:
    train, tail = (Characters(ids, corpus.vocabulary) for ids in (corpus.train_ids, corpus.val_ids))
    leak, repeats, learnt = Leak(tail), Repeats(min(len(train), MOST)), Reading(min(len(train), MOST))
    for codes, carried in train.pieces(MOST, keep=LEAK_WIDTH - 1):
        sums = Sums(codes)
        leak.windows.look(sums)
        repeats.look(sums)
        learnt.look(codes[carried:])
    kept = Reading(min(len(tail), MAX_TAIL), after=learnt)
    for codes, _ in tail.pieces(MAX_TAIL):
        kept.look(codes)
    counts = learnt.counts + kept.counts
    unseen = np.where(learnt.counts == 0, kept.counts, 0)
    rare = np.where(learnt.counts < RARE, learnt.counts, 0)
    longest = max(learnt, kept, key=lambda reading: reading.longest_line)
    return Checkup(
        characters=corpus.train_characters + corpus.val_characters,
        train_characters=corpus.train_characters,
        looked_at=int(learnt.counts.sum()),
        distinct=int(np.count_nonzero(counts)),
        scripts=_scripts(counts),
        rare=_commonest(rare),
        rare_share=_share(rare, learnt.counts),
        unseen=_commonest(unseen),
        unseen_share=_share(unseen, kept.counts),
        marks=int(counts[MARK]),
        damaged=int(counts[DAMAGED]),
        misread=learnt.misread + kept.misread,
        controls={f"U+{c:04X}": int(counts[c]) for c in CONTROLS if counts[c]},
        **{kind: learnt.ends[kind] + kept.ends[kind] for kind in learnt.ends},
        longest_line=longest.longest_line,
        longest_line_number=longest.longest_line_number,
        composed=_composed(counts),
        decomposed=learnt.decomposed + kept.decomposed,
        **repeats.findings(),
        leak=leak.share,
        leak_characters=leak.windows.characters,
        leak_example=leak.example,
    )


class Reading:
    """One part of the text as it goes by: its characters and its lines."""

    def __init__(self, length: int, after: "Reading | None" = None):
        """length: about how many characters will come; after: the part before it."""
        self.counts = np.zeros(CODE_POINTS, np.int64)
        self.ends = Counter({"crlf": 0, "lf": 0, "cr": 0})
        self.misread = self.decomposed = self.longest_line = self.longest_line_number = 0
        self._number = after._number if after else 0  # of lines that are over
        self._line = after._line if after else 0  # characters of the line that is not over
        self._last = after._last if after else 0  # the character before
        self._every = -(-length // MAX_FORM)  # of so many pieces the form of one is looked at
        self._pieces = 0

    def look(self, codes: np.ndarray) -> None:
        """The next characters, (n,) uint32."""
        found = np.bincount(codes)
        self.counts[: len(found)] += found
        self._look_at_lines(codes)
        if len(found) > 128:
            before = codes[:-1]
            self.misread += int(np.count_nonzero(((before == 0xC2) | (before == 0xC3)) & (codes[1:] - 0x80 < 0x40)))
            self.misread += int(np.count_nonzero((before == 0xE2) & (codes[1:] == 0x20AC)))
        if len(found) > 0x300 and self._pieces % self._every == 0:
            text = as_text(codes)
            if not unicodedata.is_normalized("NFC", text):
                self.decomposed += self._every * (len(text) - len(unicodedata.normalize("NFC", text)))
        self._pieces += 1

    def _look_at_lines(self, codes: np.ndarray) -> None:
        ends = np.flatnonzero(codes == LF)
        returns = int(np.count_nonzero(codes == CR))
        pairs = int(np.count_nonzero(codes[ends[ends > 0] - 1] == CR)) if returns else 0
        pairs += int(len(codes) and codes[0] == LF and self._last == CR)
        self.ends.update(crlf=pairs, lf=len(ends) - pairs, cr=returns - pairs)  # a last CR may turn out to be of a pair
        lengths = np.diff(ends, prepend=-1 - self._line, append=len(codes)) - 1  # the last line may go on
        longest = int(lengths.argmax())
        if lengths[longest] > self.longest_line:
            self.longest_line, self.longest_line_number = int(lengths[longest]), self._number + longest + 1
        self._number += len(ends)
        self._line = int(lengths[-1])
        self._last = codes[-1] if len(codes) else self._last


class Leak:
    """How much of the tail the training part has word for word."""

    def __init__(self, tail: Characters):
        pieces = spread(len(tail), LEAK_CHARACTERS, LEAK_PIECE if len(tail) > LEAK_CHARACTERS else LEAK_CHARACTERS)
        self.windows = Windows([tail.between(*piece) for piece in pieces], LEAK_WIDTH, once=True)

    @property
    def share(self) -> float:
        """Of the characters looked for, that lie in a window which was found."""
        return float(np.count_nonzero(self.windows.covered())) / max(1, self.windows.characters)

    @property
    def example(self) -> str:
        """The beginning of the first passage found."""
        covered = self.windows.covered()
        start = int(np.argmax(covered))
        return as_text(self.windows.codes[start : start + LEAK_WIDTH]) if covered.any() else ""


class Repeats:
    """What the training part says more than once, judged by a sample of its windows: those with certain hashes.

    A passage that comes again has the same hashes again, so all of its occurrences are in the sample or none.
    """

    def __init__(self, length: int):
        self._others = np.uint64((1 << (length // REPEAT_SAMPLE).bit_length()) - 1)  # bits that are 0 in the sample
        self._hashes, self._examples = [], {}

    def look(self, sums: Sums) -> None:
        """The next piece of the text."""
        hashes = sums.windows(LEAK_WIDTH)
        if self._others:
            hashes = hashes[(hashes >> np.uint64(32)) & self._others == 0]
        self._hashes.append(hashes)
        different, times = np.unique(hashes, return_counts=True)
        if len(hashes) > len(different):  # the commonest of each piece will do for an example
            most = different[times.argmax()]
            if most not in self._examples:
                place = int(np.argmax(sums.windows(LEAK_WIDTH) == most))
                self._examples[most] = as_text(sums.codes[place : place + LEAK_WIDTH])

    def findings(self) -> dict:
        """The fields of a Checkup that are about repeats."""
        hashes = np.concatenate([*self._hashes, np.zeros(0, np.uint64)])
        different, times = np.unique(hashes, return_counts=True)
        times = {hash: int(times[np.searchsorted(different, hash)]) for hash in self._examples}
        most = max(times, key=times.get, default=None)
        return {
            "repeated": 1 - len(different) / len(hashes) if len(hashes) else 0.0,
            "repeated_most": self._examples.get(most, ""),
            "repeated_times": times.get(most, 0),
        }


def _scripts(counts: np.ndarray) -> dict[str, float]:
    """By the first word of the letters' names, which is their script."""
    letters = Counter()
    for code in np.flatnonzero(counts).tolist():
        name = unicodedata.name(chr(code), "?").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
        if unicodedata.category(chr(code))[0] == "L" and not name.endswith(" INDICATOR"):  # as of ordinal numbers: ª º
            letters[name.split()[0].replace("CJK", "HAN").capitalize()] += int(counts[code])
    total = letters.total()
    return {name: number / total for name, number in letters.most_common(6)}


def _composed(counts: np.ndarray) -> int:
    """How many characters would be several in the other form."""
    codes = np.flatnonzero(counts[0xC0:]) + 0xC0
    return sum(int(counts[code]) for code in codes.tolist() if _is_composed(chr(code)))


def _is_composed(character: str) -> bool:
    parts = unicodedata.normalize("NFD", character)
    return len(parts) > 1 and unicodedata.normalize("NFC", parts) == character and combines(parts[-1])


def _commonest(counts: np.ndarray, most: int = 12) -> str:
    codes = np.flatnonzero(counts)
    ranked = codes[np.argsort(-counts[codes], kind="stable")]
    return "".join(map(chr, islice(ranked.tolist(), most)))


def _share(some: np.ndarray, all: np.ndarray) -> float:
    return float(some.sum() / max(1, all.sum()))
