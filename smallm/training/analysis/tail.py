"""Whether the validation part, the end of a text, is of another kind than the training part."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from smallm.inference.scoring import begins_character
from smallm.training.analysis.characters import spread
from smallm.training.analysis.ngram import NGram
from smallm.training.data.corpus import Corpus
from smallm.training.data.store import MappedIds

MIN_IDS = 1000  # of the validation part; a shorter one is not compared
MAX_IDS, MAX_REST = 1 << 16, 1 << 19  # ids to predict of each part, and ids from which the n-gram model learns
ORDER = 5  # of the n-gram model
MIDDLES = 0.2, 0.45, 0.7  # where the three stretches of the training part begin with which the end is compared
BLOCK = 1024  # ids over which the bits are averaged


def compare_tail(corpus: Corpus) -> dict[str, Any]:
    """The fields of `TextStatistics` about the end of the text.

    An n-gram model of the rest of the training part predicts the validation part and three stretches of the training
    part. The difference of their means is measured in standard deviations of the blocks of these stretches (Cohen's d).
    """
    train, val = corpus.train_ids, corpus.val_ids
    length = min(len(val), len(train) // 4) // 3
    if 3 * length < MIN_IDS:
        return {"middle_bits": 0.0, "tail_bits": 0.0, "tail_distance": 0.0}
    starts = [int(share * len(train)) for share in MIDDLES]
    rests = zip([0, *(start + length for start in starts)], [*starts, len(train)], strict=True)
    rest = _sample(train, list(rests), MAX_REST)
    middle = _sample(train, [(start, start + length) for start in starts], MAX_IDS)
    ids = np.concatenate([middle, _sample(val, [(0, len(val))], MAX_IDS)])
    bits = min(NGram(rest, corpus.vocabulary.size, ORDER).bits(rest, ids), key=lambda bits: bits[: len(middle)].sum())
    block = min(BLOCK, len(middle) // 8)
    deviation = bits[: len(middle) // block * block].reshape(-1, block).mean(axis=1).std()
    distance = (bits[len(middle) :].mean() - bits[: len(middle)].mean()) / max(deviation, 1e-3)
    parts = (bits[: len(middle)], ids[: len(middle)]), (bits[len(middle) :], ids[len(middle) :])
    in_middle, in_tail = (float(part.sum() / begins_character(of).sum()) for part, of in parts)
    return {"middle_bits": in_middle, "tail_bits": in_tail, "tail_distance": float(distance)}


def _sample(ids: MappedIds, parts: Sequence[tuple[int, int]], limit: int) -> np.ndarray:
    """The ids of some parts [start, stop), or about `limit` of these in evenly spaced blocks."""
    total = sum(stop - start for start, stop in parts)
    pieces = [(start + a, start + b) for start, stop in parts
              for a, b in spread(stop - start, max(1, limit * (stop - start) // total), BLOCK)]  # fmt: skip
    return np.concatenate([ids[start:stop] for start, stop in pieces])
