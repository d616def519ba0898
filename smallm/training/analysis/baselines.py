"""Baselines: bits per character that compressors and an n-gram model need for the validation text, beside a model's.

All of them learn from the end of the training part, as much as their windows or limits hold, and are measured on the
beginning of the validation part. Under `data.split blocks`, where the end of the training part is the end of the text,
passages of the training part are shuffled first, and passages of a long validation part are chosen from all of it. The
work is bounded; the results are cached.
"""

import bz2
import lzma
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from smallm.inference.scoring import begins_character
from smallm.runs.baselines_file import Baseline
from smallm.training.analysis.characters import spread
from smallm.training.analysis.ngram import best_ngram
from smallm.training.cache import cached_json, read_cached_json
from smallm.training.data.corpus import Corpus
from smallm.training.data.store import MappedIds

VERSION = 2  # of the cached results
MAX_VAL = 1 << 20  # ids of the validation part that are measured on
MAX_NGRAM = 1 << 22  # ids of the training part that the n-gram model learns from
PASSAGE = 1 << 16  # ids
DEFLATE_WINDOW = 1 << 15
BZIP2_BLOCK = 900_000
XZ_WINDOW = 1 << 22  # bytes of the training part; the dictionary holds them and the validation part
MAX_TIME_SHARE = 0.04  # of the time budget of a run
EQUAL = 0.005  # relative difference of bits per character that is not significant
MIN_SECONDS, SECONDS_PER_ID = 0.5, 3e-6  # rough cost of all baselines on a slow core


def measure_baselines(corpus: Corpus) -> list[Baseline]:
    """gzip, bz2, xz and the best n-gram model on the validation text; from the cache if they were measured before."""
    values = cached_json(_cache(corpus), VERSION, lambda: {"baselines": [asdict(one) for one in _measure(corpus)]})
    return [Baseline(**one) for one in values["baselines"]]


def affordable_baselines(corpus: Corpus, seconds: float) -> list[Baseline] | None:
    """The baselines; None if they are not cached and take too much of a time budget of `seconds` (0: no budget)."""
    too_long = 0 < MAX_TIME_SHARE * seconds < seconds_needed(corpus)
    return cached_baselines(corpus) if too_long else measure_baselines(corpus)


def cached_baselines(corpus: Corpus) -> list[Baseline] | None:
    """The baselines if they were measured before; otherwise None."""
    values = read_cached_json(_cache(corpus), VERSION)
    return None if values is None else [Baseline(**one) for one in values["baselines"]]


def seconds_needed(corpus: Corpus) -> float:
    """About how many seconds the measurement takes."""
    return MIN_SECONDS + SECONDS_PER_ID * (min(len(corpus.train_ids), MAX_NGRAM) + min(len(corpus.val_ids), MAX_VAL))


def seconds_to_reserve(corpus: Corpus, seconds: float) -> float:
    """Seconds that a run with a time budget of `seconds` reserves: 0 if the results are cached or cost too much."""
    needed = seconds_needed(corpus)
    return 0.0 if needed > MAX_TIME_SHARE * seconds or cached_baselines(corpus) else needed


def comparison_line(baselines: list[Baseline], bits_per_char: float) -> str:
    """One line that compares a model's bits per character with the baselines."""
    others = ", ".join(f"{one.name} {one.bits_per_char:.3f}" for one in baselines)
    return f"bits per character: the model {bits_per_char:.3f}; {others}: the model {verdict(baselines, bits_per_char)}"


def verdict(baselines: list[Baseline], bits_per_char: float, every: str = "all of them") -> str:
    """Where a model stands against each baseline, as the predicate of a sentence about the model.

    every: what to call all baselines; by default they are named before the sentence.
    """
    ordered = sorted(baselines, key=lambda one: one.bits_per_char)
    excess = {one.name: bits_per_char / one.bits_per_char - 1 if one.bits_per_char > 0 else math.inf for one in ordered}
    beaten = [name for name, more in excess.items() if more <= -EQUAL]
    equal = [name for name, more in excess.items() if -EQUAL < more < EQUAL]
    ahead = [_excess(more, name) for name, more in excess.items() if more >= EQUAL]
    if len(beaten) == len(excess):
        beats = f"beats {every}, and " if len(beaten) > 1 else ""
        return f"{beats}needs {_percent(-excess[beaten[0]])} less than {beaten[0]}"
    parts = [("beats", beaten), ("is about as good as", equal), ("needs", ahead)]
    clauses = [f"{verb} {_joined(names)}" for verb, names in parts if names]
    return ", and ".join([*filter(None, [", ".join(clauses[:-1])]), clauses[-1]])


def _excess(more: float, name: str) -> str:
    """How much more than a baseline a model needs: in percent, from 100 % on as a factor.

    more: the excess as a fraction of the baseline; infinite for a baseline that needs no bits.
    """
    if more == math.inf:
        return f"more than {name}"
    if round(100 * more) < 100:
        return f"{_percent(more)} more than {name}"
    return f"{1 + more:,.{0 if more >= 9 else 1}f} times the bits of {name}"


def _percent(share: float) -> str:
    return f"{max(1, round(100 * share))} %"


def _joined(names: list[str]) -> str:
    """`a`, `a and b` or `a, b and c`."""
    return " and ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def _cache(corpus: Corpus) -> Path:
    return corpus.cache_file("baselines")


def _measure(corpus: Corpus) -> list[Baseline]:
    if corpus.split == "blocks":
        val_ids, train_ids = _passages(corpus.val_ids, MAX_VAL), _passages(corpus.train_ids, MAX_NGRAM, mixed=True)
        first = last = "a sample of"
    else:
        first, last = "the first", "its last"
        val_ids = np.asarray(corpus.val_ids[:MAX_VAL])
        train_ids = np.asarray(corpus.train_ids[max(0, len(corpus.train_ids) - MAX_NGRAM) :])
    characters = int(np.count_nonzero(begins_character(val_ids)))
    before, val = corpus.vocabulary.decode_bytes(train_ids), corpus.vocabulary.decode(val_ids).encode()
    part = "" if len(val_ids) == len(corpus.val_ids) else f"{first} {characters:,} characters of "
    measured_on = f"on {part}the validation text"
    with ThreadPoolExecutor() as pool:  # the compressors release Python's lock
        sizes = [(name, pool.submit(size, before, val), how) for name, size, how in COMPRESSORS]
        order, bits = best_ngram(train_ids, val_ids[1:], corpus.vocabulary.size)
        results = [Baseline(name, 8 * size.result() / characters, f"{how}; {measured_on}") for name, size, how in sizes]
    part = "the training text" if len(train_ids) == len(corpus.train_ids) else f"{last} {len(train_ids):,} ids"
    how = (
        f"character n-gram model (interpolated modified Kneser-Ney) of order {order}, which was chosen on the end of "
        f"the training text; trained on {part}; {measured_on}"
    )
    return [*results, Baseline(f"{order}-gram", bits / max(1, characters - 1), how)]


def _passages(ids: MappedIds, limit: int, mixed: bool = False) -> np.ndarray:
    """The ids, or about `limit` of them in evenly spaced passages; mixed: in a random order, always the same one."""
    passages = spread(len(ids), limit, PASSAGE)
    order = np.random.RandomState(0).permutation(len(passages)) if mixed else range(len(passages))
    return np.concatenate([ids[slice(*passages[each])] for each in order])


def _gzip(before: bytes, val: bytes) -> int:
    packer = zlib.compressobj(9, wbits=-15, zdict=before[-DEFLATE_WINDOW:])
    return len(packer.compress(val)) + len(packer.flush())


def _bz2(before: bytes, val: bytes) -> int:
    primer = before[len(before) - min(len(before), max(0, BZIP2_BLOCK - len(val))) :]
    return max(0, len(bz2.compress(primer + val)) - (len(bz2.compress(primer)) if primer else 0))


def _xz(before: bytes, val: bytes) -> int:
    primer = before[-XZ_WINDOW:]
    settings = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2 * XZ_WINDOW}]
    with_val, alone = (len(lzma.compress(data, lzma.FORMAT_RAW, filters=settings)) for data in (primer + val, primer))
    return max(0, with_val - alone)


COMPRESSORS = (
    ("gzip", _gzip, "deflate, level 9, primed with the last 32 KiB of the training text"),
    ("bz2", _bz2, "bzip2, its first block of 900 kB filled up with the end of the training text"),
    ("xz", _xz, "LZMA2, preset 6, primed with at most 4 MiB of the end of the training text"),
)
