"""Statistics of a training text: what affects the loss and the samples, found in one reading of its ids.

At most MAX_TRAIN ids of the training part and MAX_VAL of the validation part are read, evenly spread. The results are
cached beside the ids. `text_check` explains them in words.
"""

import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from smallm.tokenizer.vocabulary import CODE_POINTS
from smallm.training.analysis.characters import Characters, as_text, spread
from smallm.training.analysis.windows import WindowSet, window_hashes
from smallm.training.cache import cached_json
from smallm.training.data.corpus import Corpus
from smallm.training.data.source import combines

VERSION = 2  # of the cached results; raise when a field changes its meaning
MAX_TRAIN = 1 << 27  # ids of the training part to read
MAX_VAL = 1 << 24  # ids of the validation part to read
MAX_NORMALISED = 1 << 22  # ids of each part whose Unicode form is examined, which is slow
LEAK_WIDTH = 64  # characters of a window; shorter windows are often turns of phrase
LEAK_CHARACTERS, LEAK_PIECE = 1 << 19, 1 << 10  # ids of the validation part to search for, and of one passage of these
REPEAT_SAMPLE = 1 << 20  # upper limit of the windows of the training part among which repeats are counted
RARE = 10  # occurrences below which a model hardly learns a character
LF, CR, BYTE_ORDER_MARK, REPLACEMENT = 0x0A, 0x0D, 0xFEFF, 0xFFFD
CONTROLS = [c for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n\r\f\x85"]


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of a text. Shares lie between 0 and 1 and refer to the part of the text that was read."""

    characters: int
    train_characters: int
    characters_read: int
    """Characters of the training part that were read."""
    distinct: int
    scripts: dict[str, float]
    """The scripts of the letters, most frequent first, with their shares of all letters."""
    rare: str
    """Characters that occur fewer than RARE times in the training part, most frequent first."""
    rare_share: float
    unseen: str
    """Characters of the validation part that do not occur in the training part, most frequent first."""
    unseen_share: float
    """Share of the validation part."""
    byte_order_marks: int
    replacements: int
    """Characters U+FFFD, which an earlier conversion wrote for characters that it could not read."""
    misread: int
    """Pairs such as Ã©, which come from UTF-8 read as Latin-1."""
    controls: dict[str, int]
    """Counts of control characters by their names U+XXXX, except tabs, line ends and form feeds."""
    crlf: int
    lf: int
    cr: int
    """CR without a following LF."""
    longest_line: int
    longest_line_number: int
    """From 1, among the lines that were read."""
    composed: int
    """Letters that are one character together with their accent."""
    decomposed: int
    """Letters whose accent is a separate character, although Unicode has one for both."""
    repeated: float
    """Share of the windows of LEAK_WIDTH characters of the training part that repeat an earlier one."""
    repeated_most: str
    """The most frequent window."""
    repeated_times: int
    """About how often it occurs."""
    leak: float
    """Share of the validation part that lies in windows of LEAK_WIDTH characters which the training part contains."""
    leak_characters: int
    """Characters of the validation part that were searched for."""
    leak_example: str


def compute_statistics(corpus: Corpus) -> TextStatistics:
    """The statistics of a text; from the cache if they were computed before."""
    file = corpus.cache_file("text-statistics")
    return TextStatistics(**cached_json(file, VERSION, lambda: asdict(_compute(corpus))))


def _compute(corpus: Corpus) -> TextStatistics:
    train, val = (Characters(ids, corpus.vocabulary) for ids in (corpus.train_ids, corpus.val_ids))
    length = min(len(train), MAX_TRAIN)
    leak, repeats, trained = Leak(val), Repeats(length), PartStatistics(length)
    for codes, repeated in train.pieces(MAX_TRAIN, overlap=LEAK_WIDTH - 1):
        hashes = window_hashes(codes, LEAK_WIDTH)
        leak.windows.find(codes, hashes)
        repeats.add(codes, hashes)
        trained.add(codes[repeated:])
    held_out = PartStatistics(min(len(val), MAX_VAL), after=trained)
    for codes, _ in val.pieces(MAX_VAL):
        held_out.add(codes)
    counts = trained.counts + held_out.counts
    unseen = np.where(trained.counts == 0, held_out.counts, 0)
    rare = np.where(trained.counts < RARE, trained.counts, 0)
    longest = max(trained, held_out, key=lambda part: part.longest_line)
    return TextStatistics(
        characters=corpus.train_characters + corpus.val_characters,
        train_characters=corpus.train_characters,
        characters_read=int(trained.counts.sum()),
        distinct=int(np.count_nonzero(counts)),
        scripts=_scripts(counts),
        rare=_most_frequent(rare),
        rare_share=_share(rare, trained.counts),
        unseen=_most_frequent(unseen),
        unseen_share=_share(unseen, held_out.counts),
        byte_order_marks=int(counts[BYTE_ORDER_MARK]),
        replacements=int(counts[REPLACEMENT]),
        misread=trained.misread + held_out.misread,
        controls={f"U+{c:04X}": int(counts[c]) for c in CONTROLS if counts[c]},
        crlf=trained.ends["crlf"] + held_out.ends["crlf"],
        lf=trained.ends["lf"] + held_out.ends["lf"],
        cr=trained.ends["cr"] + held_out.ends["cr"],
        longest_line=longest.longest_line,
        longest_line_number=longest.longest_line_number,
        composed=_composed(counts),
        decomposed=trained.decomposed + held_out.decomposed,
        **repeats.fields(),
        leak=leak.share,
        leak_characters=leak.windows.characters,
        leak_example=leak.example,
    )


class PartStatistics:
    """Characters and lines of one part of the text, which is added piece by piece."""

    def __init__(self, length: int, after: "PartStatistics | None" = None):
        """length: about how many characters will be added; after: the part before this one."""
        self.counts = np.zeros(CODE_POINTS, np.int64)
        self.ends = {"crlf": 0, "lf": 0, "cr": 0}
        self.misread = self.decomposed = self.longest_line = self.longest_line_number = 0
        self._complete_lines: int = after._complete_lines if after else 0
        self._open_line: int = after._open_line if after else 0  # characters of the line that may go on
        self._last: int = after._last if after else 0  # the code point before the next piece
        self._normalise_every = -(-length // MAX_NORMALISED)  # pieces
        self._pieces = 0

    def add(self, codes: np.ndarray) -> None:
        """Adds the next characters, (n,) uint32."""
        found = np.bincount(codes)
        self.counts[: len(found)] += found
        self._add_lines(codes)
        if len(found) > 128:
            before = codes[:-1]
            self.misread += int(np.count_nonzero(((before == 0xC2) | (before == 0xC3)) & (codes[1:] - 0x80 < 0x40)))
            self.misread += int(np.count_nonzero((before == 0xE2) & (codes[1:] == 0x20AC)))
        if len(found) > 0x300 and self._pieces % self._normalise_every == 0:
            text = as_text(codes)
            if not unicodedata.is_normalized("NFC", text):
                self.decomposed += self._normalise_every * (len(text) - len(unicodedata.normalize("NFC", text)))
        self._pieces += 1

    def _add_lines(self, codes: np.ndarray) -> None:
        ends = np.flatnonzero(codes == LF)
        returns = int(np.count_nonzero(codes == CR))
        pairs = int(np.count_nonzero(codes[ends[ends > 0] - 1] == CR)) if returns else 0
        pairs += int(len(codes) and codes[0] == LF and self._last == CR)
        self.ends["crlf"] += pairs
        self.ends["lf"] += len(ends) - pairs
        self.ends["cr"] += returns - pairs  # a CR at the end of a piece is corrected by the LF of the next piece
        lengths = np.diff(ends, prepend=-1 - self._open_line, append=len(codes)) - 1  # the last line may go on
        longest = int(lengths.argmax())
        if lengths[longest] > self.longest_line:
            self.longest_line, self.longest_line_number = int(lengths[longest]), self._complete_lines + longest + 1
        self._complete_lines += len(ends)
        self._open_line = int(lengths[-1])
        self._last = codes[-1] if len(codes) else self._last


class Leak:
    """How much of the validation part the training part contains word for word."""

    def __init__(self, val: Characters):
        size = LEAK_PIECE if len(val) > LEAK_CHARACTERS else LEAK_CHARACTERS
        passages = [val.between(*piece) for piece in spread(len(val), LEAK_CHARACTERS, size)]
        self.windows = WindowSet(passages, LEAK_WIDTH, once=True)

    @property
    def share(self) -> float:
        """The share of the characters searched for that lie in a window which was found."""
        return float(np.count_nonzero(self.windows.covered())) / max(1, self.windows.characters)

    @property
    def example(self) -> str:
        """The beginning of the first passage that was found."""
        covered = self.windows.covered()
        start = int(np.argmax(covered))
        return as_text(self.windows.codes[start : start + LEAK_WIDTH]) if covered.any() else ""


class Repeats:
    """Repeats within the training part, estimated from a sample of its windows: those with certain hashes.

    All occurrences of a window have the same hash, so either all of them are in the sample or none.
    """

    def __init__(self, length: int):
        self._mask = np.uint64((1 << (length // REPEAT_SAMPLE).bit_length()) - 1)  # bits that are 0 in the sample
        self._hashes: list[np.ndarray] = []
        self._examples: dict[int, str] = {}

    def add(self, codes: np.ndarray, hashes: np.ndarray) -> None:
        """Adds the next piece of the text with the hashes of its windows."""
        sample = hashes[(hashes >> np.uint64(32)) & self._mask == 0] if self._mask else hashes
        self._hashes.append(sample)
        distinct, counts = np.unique(sample, return_counts=True)
        if len(sample) > len(distinct):  # the most frequent window of each piece is enough for an example
            most = int(distinct[counts.argmax()])
            if most not in self._examples:
                place = int(np.argmax(hashes == np.uint64(most)))
                self._examples[most] = as_text(codes[place : place + LEAK_WIDTH])

    def fields(self) -> dict[str, Any]:
        """The fields of `TextStatistics` about repeats."""
        hashes = np.concatenate([*self._hashes, np.zeros(0, np.uint64)])
        distinct, counts = np.unique(hashes, return_counts=True)
        times = {most: int(counts[np.searchsorted(distinct, np.uint64(most))]) for most in self._examples}
        most = max(times, key=lambda most: times[most], default=-1)
        return {
            "repeated": 1 - len(distinct) / len(hashes) if len(hashes) else 0.0,
            "repeated_most": self._examples.get(most, ""),
            "repeated_times": times.get(most, 0),
        }


def _scripts(counts: np.ndarray) -> dict[str, float]:
    """The shares of scripts, which are the first words of the letters' Unicode names."""
    letters: Counter[str] = Counter()
    for code in np.flatnonzero(counts).tolist():
        name = unicodedata.name(chr(code), "?").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
        if unicodedata.category(chr(code))[0] == "L" and not name.endswith(" INDICATOR"):  # as ª and º do
            letters[name.split()[0].replace("CJK", "HAN").capitalize()] += int(counts[code])
    total = letters.total()
    return {name: number / total for name, number in letters.most_common(6)}


def _composed(counts: np.ndarray) -> int:
    """How many characters NFD would split."""
    codes = np.flatnonzero(counts[0xC0:]) + 0xC0
    return sum(int(counts[code]) for code in codes.tolist() if _is_composed(chr(code)))


def _is_composed(character: str) -> bool:
    parts = unicodedata.normalize("NFD", character)
    return len(parts) > 1 and unicodedata.normalize("NFC", parts) == character and combines(parts[-1])


def _most_frequent(counts: np.ndarray, limit: int = 12) -> str:
    codes = np.flatnonzero(counts)
    ranked = codes[np.argsort(-counts[codes], kind="stable")]
    return "".join(map(chr, islice(ranked.tolist(), limit)))


def _share(some: np.ndarray, all: np.ndarray) -> float:
    return float(some.sum() / max(1, all.sum()))
