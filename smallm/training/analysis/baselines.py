"""Yardsticks: what compressors and a counter of letters need for the validation text, beside which to read a loss.

All of them learn from the end of the training part, as much as their windows or our patience hold, and are measured on
the beginning of the tail that follows it; the work is bounded, and done once for a text.
"""

import bz2
import json
import lzma
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from smallm.errors import UserError
from smallm.training.analysis.characters import Characters
from smallm.training.analysis.ngram import best_ngram
from smallm.training.cache import cached_json, read_cached_json
from smallm.training.config import check_types
from smallm.training.data.corpus import Corpus

VERSION = 1  # of what is kept
FILE = "baselines.json"
OLD_FILE = "yardsticks.json"  # its name in runs of earlier versions
MAX_TAIL = 1 << 20  # ids of the tail that are measured on
MAX_NGRAM = 1 << 22  # ids of the training part that the n-gram model learns from
DEFLATE_WINDOW = 1 << 15
BZIP2_BLOCK = 900_000
XZ_WINDOW = 1 << 22  # bytes of the training part; the dictionary holds these and the tail
MAX_SHARE = 0.04  # of the time of a run that has only so much
ALIKE = 0.005  # difference of two bits per character that says nothing, as a share
SECONDS_AT_LEAST, SECONDS_PER_ID = 0.5, 3e-6  # about what all of it takes, on a slow core


@dataclass(frozen=True)
class Baseline:
    """Something that can predict text, and how well it does."""

    name: str
    bits_per_char: float
    how: str
    """What it learnt from and was measured on."""


def baselines(corpus: Corpus) -> list[Baseline]:
    """gzip, bz2, xz and the best n-gram model on the validation text; known figures come from the cache."""
    file = corpus.cache_file("baselines")
    values = cached_json(file, VERSION, lambda: {"baselines": [asdict(one) for one in _measure(corpus)]})
    return _of(values)


def known_baselines(corpus: Corpus) -> list[Baseline] | None:
    """Those that were measured before."""
    values = read_cached_json(corpus.cache_file("baselines"), VERSION)
    return None if values is None else _of(values)


def seconds_needed(corpus: Corpus) -> float:
    """About how long measuring takes."""
    return SECONDS_AT_LEAST + SECONDS_PER_ID * (min(len(corpus.train_ids), MAX_NGRAM) + _tail_ids(corpus))


def seconds_kept(corpus: Corpus, seconds: float) -> float:
    """What to keep for measuring of a run that has so many seconds: nothing if that is done, or would be too much."""
    needed = seconds_needed(corpus)
    return 0.0 if needed > MAX_SHARE * seconds or known_baselines(corpus) else needed


def in_words(measured: list[Baseline], bits_per_char: float) -> str:
    """One line that sets a model's bits per character beside the yardsticks."""
    best = min(measured, key=lambda one: one.bits_per_char)
    others = ", ".join(f"{one.name} {one.bits_per_char:.3f}" for one in measured)
    return f"bits per character: the model {bits_per_char:.3f}; {others}: {verdict(best, bits_per_char)}"


def verdict(best: Baseline, bits_per_char: float) -> str:
    """What a model is worth beside the best of the yardsticks."""
    saved = 1 - bits_per_char / best.bits_per_char if best.bits_per_char > 0 else -math.inf
    if saved >= ALIKE:
        return f"it needs {100 * saved:.0f} % less than {best.name}"
    if saved > -ALIKE:
        return f"it needs about what {best.name} needs; train longer, or a larger model"
    return f"it needs more than {best.name}; train longer, or a larger model"


def write_baselines(run: Path, measured: list[Baseline], bits_per_char: float, characters: int) -> None:
    """`baselines.json` in a run folder: the model's best figure, over so many characters, and the yardsticks'."""
    how = f"the best checkpoint, on the whole validation text, {characters:,} characters"
    model = Baseline("model", bits_per_char, how)
    text = json.dumps([asdict(one) for one in (model, *measured)], indent=1)
    (run / FILE).write_text(text + "\n", encoding="utf-8")


def read_baselines(run: Path) -> list[Baseline]:
    """What `write_baselines` left in a run folder; nothing of a file that is missing or broken."""
    file = run / FILE if (run / FILE).exists() else run / OLD_FILE
    try:
        found = [Baseline(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
        for one in found:
            check_types(one)
        return found
    except (OSError, ValueError, TypeError, UserError, RecursionError):
        return []


def _of(values: dict) -> list[Baseline]:
    return [Baseline(**one) for one in values["baselines"]]


def _measure(corpus: Corpus) -> list[Baseline]:
    stop = _tail_ids(corpus)
    characters = len(Characters(corpus.val_ids, corpus.vocabulary).between(0, stop))
    tail = corpus.vocabulary.decode(corpus.val_ids[:stop]).encode()
    learnt = np.asarray(corpus.train_ids[max(0, len(corpus.train_ids) - MAX_NGRAM) :])
    before = corpus.vocabulary.decode_bytes(learnt)
    first = "" if stop == len(corpus.val_ids) else f"the first {characters:,} characters of "
    on = f"{first}the validation text"
    with ThreadPoolExecutor() as pool:  # the compressors let go of Python's lock
        sizes = [(name, pool.submit(size, before, tail), how) for name, size, how in COMPRESSORS]
        order, bits = best_ngram(learnt, np.asarray(corpus.val_ids[1:stop]), corpus.vocabulary.size)
        results = [Baseline(name, 8 * size.result() / characters, f"{how}; on {on}") for name, size, how in sizes]
    part = "the training part" if len(learnt) == len(corpus.train_ids) else f"its last {len(learnt):,} ids"
    how = (
        f"interpolated modified Kneser-Ney of order {order}, chosen on the end of the training part, "
        f"learnt from {part}; on {on}"
    )
    return [*results, Baseline(f"{order}-gram", bits / max(1, characters - 1), how)]


def _tail_ids(corpus: Corpus) -> int:
    return min(len(corpus.val_ids), MAX_TAIL)


def _gzip(before: bytes, tail: bytes) -> int:
    packer = zlib.compressobj(9, wbits=-15, zdict=before[-DEFLATE_WINDOW:])
    return len(packer.compress(tail)) + len(packer.flush())


def _bz2(before: bytes, tail: bytes) -> int:
    primer = before[len(before) - min(len(before), max(0, BZIP2_BLOCK - len(tail))) :]
    return len(bz2.compress(primer + tail)) - (len(bz2.compress(primer)) if primer else 0)


def _xz(before: bytes, tail: bytes) -> int:
    primer = before[-XZ_WINDOW:]
    settings = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2 * XZ_WINDOW}]
    with_tail, alone = (len(lzma.compress(data, lzma.FORMAT_RAW, filters=settings)) for data in (primer + tail, primer))
    return with_tail - alone


COMPRESSORS = (
    ("gzip", _gzip, "deflate, level 9, begun with its window of 32 KiB full of the end of the training part"),
    ("bz2", _bz2, "in blocks of 900 kB, the first begun with as much of the training part as leaves room for the tail"),
    ("xz", _xz, "LZMA2, preset 6, after the last 4 MiB at most of the training part, less those alone"),
)
