"""Statistics of a training text: what affects the loss and the samples, found in one reading of its ids.

At most MAX_TRAIN ids of the training part and MAX_VAL of the validation part are read, evenly spread. The results are
cached beside the ids. `text_check` explains them in words.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from smallm.tokenizer.vocabulary import CODE_POINTS
from smallm.training.analysis.characters import code_points, pieces
from smallm.training.analysis.tail import compare_tail
from smallm.training.analysis.windows import WindowSet, window_hashes
from smallm.training.cache import cached_json
from smallm.training.data.corpus import Corpus

VERSION = 3  # of the cached results; raise when a field changes its meaning
MAX_TRAIN = 1 << 27  # ids of the training part to read
MAX_VAL = 1 << 24  # ids of the validation part to read
LEAK_WIDTH = 64  # characters of a window; shorter windows are often turns of phrase
LEAK_IDS, LEAK_PIECE = 1 << 19, 1 << 10  # ids of the validation part to search for, and of one passage of these
REPEAT_SAMPLE = 1 << 20  # upper limit of the windows of the training part among which repeats are counted
RARE = 10  # occurrences below which a model hardly learns a character
LF, CR, BYTE_ORDER_MARK, REPLACEMENT = 0x0A, 0x0D, 0xFEFF, 0xFFFD
MISREAD_PAIR = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac")  # UTF-8 read as Latin-1 or cp1252
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
    sorted_lines: float
    """Share of the lines that begin with a letter and follow their predecessor in alphabetical order."""
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
    middle_bits: float
    """Bits per character that an n-gram model of the rest needs for stretches of the training part; 0 if unknown."""
    tail_bits: float
    """The same for the validation part, which is the end of the text."""
    tail_distance: float
    """By how many standard deviations the validation part is harder to predict than these stretches."""


def compute_statistics(corpus: Corpus) -> TextStatistics:
    """The statistics of a text; from the cache if they were computed before."""
    file = corpus.cache_file("text-statistics")
    return TextStatistics(**cached_json(file, VERSION, lambda: asdict(_compute(corpus))))


def _compute(corpus: Corpus) -> TextStatistics:
    vocabulary, val_ids = corpus.vocabulary, corpus.val_ids
    passages = pieces(val_ids, vocabulary, LEAK_IDS, LEAK_PIECE if len(val_ids) > LEAK_IDS else LEAK_IDS)
    leak, repeats, reading = WindowSet(list(passages), LEAK_WIDTH), Repeats(len(corpus.train_ids)), Reading()
    train, val = np.zeros((2, CODE_POINTS), np.int64)
    before = ""
    for text in pieces(corpus.train_ids, vocabulary, MAX_TRAIN):
        if len(corpus.train_ids) > MAX_TRAIN:
            reading.open_line = 0  # the pieces are not adjacent
        reading.add(text, train)
        joined = before + text  # a window may begin in the piece before
        hashes = window_hashes(code_points(joined), LEAK_WIDTH)
        leak.find(hashes)
        repeats.add(joined, hashes)
        before = joined[1 - LEAK_WIDTH :]
    for text in pieces(val_ids, vocabulary, MAX_VAL):
        reading.add(text, val)
    counts, found = train + val, leak.starts()[:1]
    unseen, rare = np.where(train == 0, val, 0), np.where(train < RARE, train, 0)
    return TextStatistics(
        characters=corpus.train_characters + corpus.val_characters,
        train_characters=corpus.train_characters,
        characters_read=int(train.sum()),
        distinct=int(np.count_nonzero(counts)),
        scripts=_scripts(counts),
        rare=_most_frequent(rare),
        rare_share=_share(rare, train),
        unseen=_most_frequent(unseen),
        unseen_share=_share(unseen, val),
        byte_order_marks=int(counts[BYTE_ORDER_MARK]),
        replacements=int(counts[REPLACEMENT]),
        misread=reading.misread,
        controls={f"U+{c:04X}": int(counts[c]) for c in CONTROLS if counts[c]},
        crlf=reading.crlf,
        lf=int(counts[LF]) - reading.crlf,
        cr=int(counts[CR]) - reading.crlf,
        longest_line=reading.longest_line,
        longest_line_number=reading.longest_line_number,
        decomposed=reading.decomposed,
        leak=leak.covered() / max(1, leak.characters),
        leak_characters=leak.characters,
        leak_example="".join(leak.text[start : start + LEAK_WIDTH] for start in found),
        sorted_lines=reading.sorted_lines / max(1, int(counts[LF])),
        **repeats.fields(),
        **compare_tail(corpus),
    )


class Reading:
    """What is counted while a text is read piece by piece."""

    def __init__(self) -> None:
        self.crlf = self.misread = self.decomposed = 0
        self.sorted_lines = self.longest_line = self.longest_line_number = 0
        self.open_line = 0  # characters of the line that may go on
        self._complete_lines = 0
        self._last = ""  # character

    def add(self, text: str, counts: np.ndarray) -> None:
        """Adds the next piece of the text; its characters are counted in `counts`, (CODE_POINTS,)."""
        found = np.bincount(code_points(text))
        counts[: len(found)] += found
        self.crlf += text.count("\r\n") + (self._last == "\r" and text.startswith("\n"))
        self._last = text[-1:] or self._last
        lines = text.split("\n")
        self.sorted_lines += sum(a <= b and b[:1].isalpha() for a, b in pairwise(map(str.casefold, lines)))
        lengths = list(map(len, lines))
        lengths[0] += self.open_line
        if (longest := max(lengths)) > self.longest_line:
            self.longest_line, self.longest_line_number = longest, self._complete_lines + lengths.index(longest) + 1
        self._complete_lines += len(lengths) - 1
        self.open_line = lengths[-1]
        if any(found[mark : mark + 1].any() for mark in map(ord, "ÂÃâ")):
            self.misread += len(MISREAD_PAIR.findall(text))
        if not unicodedata.is_normalized("NFC", text):
            self.decomposed += len(text) - len(unicodedata.normalize("NFC", text))


class Repeats:
    """Repeats within the training part, estimated from a sample of its windows: those with certain hashes.

    All occurrences of a window have the same hash, so either all of them are in the sample or none.
    """

    def __init__(self, length: int):
        self._mask = np.uint64((1 << (min(length, MAX_TRAIN) // REPEAT_SAMPLE).bit_length()) - 1)  # 0 in the sample
        self._hashes = [np.zeros(0, np.uint64)]
        self._examples: dict[int, str] = {}

    def add(self, text: str, hashes: np.ndarray) -> None:
        """Adds the next piece of the text with the hashes of its windows."""
        places = np.flatnonzero((hashes >> np.uint64(32)) & self._mask == 0)
        self._hashes.append(hashes[places])
        distinct, first, counts = np.unique(hashes[places], return_index=True, return_counts=True)
        if len(distinct) < len(places):  # the most frequent window of each piece is enough for an example
            start = int(places[first[counts.argmax()]])
            self._examples[int(distinct[counts.argmax()])] = text[start : start + LEAK_WIDTH]

    def fields(self) -> dict[str, Any]:
        """The fields of `TextStatistics` about repeats."""
        hashes = np.concatenate(self._hashes)
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


def _most_frequent(counts: np.ndarray, limit: int = 12) -> str:
    codes = np.flatnonzero(counts)
    ranked = codes[np.argsort(-counts[codes], kind="stable")]
    return "".join(map(chr, islice(ranked.tolist(), limit)))


def _share(some: np.ndarray, all: np.ndarray) -> float:
    return float(some.sum() / max(1, all.sum()))
