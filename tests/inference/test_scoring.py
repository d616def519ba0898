"""smallm.scoring: every character after the first is predicted exactly once, for all pieces and windows."""

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallm.errors import UserError
from smallm.inference.scoring import IGNORED, Perplexity, begins_character, nats, windows
from smallm.tokenizer.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_characters("é€")
TEXTS = st.text(alphabet="ab\n\x00é€ñ中🎉", max_size=60)  # ids of their own: é, €; in bytes: ñ, 中, 🎉


def naive(ids, block_size, stride):
    """(position of the target, ids of the context that it is predicted from), one for each target."""
    first = next((i for i in range(1, len(ids)) if not 0x80 <= ids[i] < 0xC0), len(ids))
    found, seen, start = [], first - 1, 0
    while start + 1 < len(ids):
        for t in range(start + 1, min(start + block_size, len(ids) - 1) + 1):
            if t > seen:
                found.append((t, tuple(ids[start:t])))
                seen = t
        if start + block_size >= len(ids) - 1:
            break
        start += stride
    return found


def unfolded(batches):
    """The same of what `windows` gives, but for the position, which a batch does not know."""
    found = []
    for inputs, targets in batches:
        assert inputs.shape == targets.shape
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.min() >= 0
        for row, goals in zip(inputs.tolist(), targets.tolist(), strict=True):
            found += [(goal, tuple(row[: t + 1])) for t, goal in enumerate(goals) if goal != IGNORED]
    return found


def split(ids, cuts):
    """Pieces, some of them empty."""
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


@settings(max_examples=400)
@given(TEXTS, st.integers(1, 12), st.data(), st.lists(st.integers(0, 10_000), max_size=8))
def test_every_target_once_from_the_right_context(text, block_size, data, cuts):
    stride = data.draw(st.none() | st.integers(1, block_size))
    ids = VOCABULARY.encode(text)
    expected = naive(ids.tolist(), block_size, stride or block_size)
    found = unfolded(windows(split(ids, cuts), block_size, stride))
    assert found == [(ids[t], context) for t, context in expected]
    # and so, by the way: all ids but those of the first character, in their order
    first = len(VOCABULARY.encode(text[:1]))
    assert [target for target, _ in found] == ids[first:].tolist()


@given(st.integers(0, 400), st.integers(1, 20), st.integers(1, 20), st.integers(1, 60))
def test_batches_are_as_big_as_allowed_and_no_bigger(n, block_size, stride, ids_per_batch):
    stride = min(stride, block_size)
    ids = np.arange(n, dtype=np.uint16) % 100
    batches = list(windows([ids], block_size, stride, ids_per_batch))
    sizes = [len(inputs) for inputs, _ in batches]
    assert max(sizes, default=1) <= max(1, ids_per_batch // block_size)
    assert all(inputs.shape[1] == block_size for inputs, _ in batches)
    assert unfolded(batches) == [(ids[t], context) for t, context in naive(ids.tolist(), block_size, stride)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("character", ["a", "é", "ñ", "中", "🎉"])
def test_the_rest_of_the_first_character_does_not_count(block_size, character):
    ids = VOCABULARY.encode(character + "🎉xñ")
    for pieces in ([ids], [ids[:1], ids[1:2], ids[2:]], list(ids[:, None])):
        counted = [target for target, _ in unfolded(windows(pieces, block_size, 1))]
        assert counted == VOCABULARY.encode("🎉xñ").tolist()


def test_adjacent_windows_by_hand():
    (inputs, targets), (last_inputs, last_targets) = windows([np.arange(65, 73)], 3)
    assert inputs.tolist() == [[65, 66, 67], [68, 69, 70]]
    assert targets.tolist() == [[66, 67, 68], [69, 70, 71]]
    assert last_inputs.tolist() == [[71, 72, 0]]
    assert last_targets.tolist() == [[72, IGNORED, IGNORED]]


def test_overlapping_by_hand():
    (inputs, targets), (last_inputs, last_targets) = windows([np.arange(65, 72)], 3, 2)
    assert inputs.tolist() == [[65, 66, 67], [67, 68, 69]]
    assert targets.tolist() == [[66, 67, 68], [IGNORED, 69, 70]]
    assert last_inputs.tolist() == [[69, 70, 71]]
    assert last_targets.tolist() == [[IGNORED, 71, IGNORED]]


@pytest.mark.parametrize("text", ["", "a", "é", "🎉"])
def test_nothing_to_predict(text):
    assert unfolded(windows([VOCABULARY.encode(text)], 4)) == []
    assert unfolded(windows([], 4)) == []


@given(st.text(min_size=1))
def test_begins_character_finds_each_beginning(text):
    ids = VOCABULARY.encode(text)
    lengths = [len(VOCABULARY.encode(character)) for character in text]
    assert np.flatnonzero(begins_character(ids)).tolist() == (np.cumsum(lengths) - lengths).tolist()


def test_perplexity_in_its_three_units():
    found = Perplexity.of(nats=6 * math.log(8), characters=6)
    assert found == Perplexity(math.log(8), pytest.approx(3.0), pytest.approx(8.0), 6)
    assert Perplexity.of(1e6, 10).perplexity == math.exp(700)  # finite: JSON has no infinity


def test_memory_does_not_grow_with_the_text():
    piece, peaks = np.arange(1 << 14, dtype=np.uint16) % 100, []
    for pieces in (8, 80):
        tracemalloc.start()
        assert sum(len(inputs) for inputs, _ in windows((piece for _ in range(pieces)), 64, 64)) == pieces * 256
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_nats_by_hand():
    logits = np.log(np.float32([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], [[1, 1, 2], [3, 4, 5]]]))
    found = nats(logits, np.array([[1, IGNORED], [2, 0]]))
    assert found.dtype == np.float64
    assert found.tolist() == [[pytest.approx(math.log(4)), 0], [pytest.approx(math.log(2)), pytest.approx(math.log(4))]]


def test_nats_over_the_whole_range_of_float32():
    assert nats(np.float32([[[3e38, -3e38]]]), np.array([[0]])).tolist() == [[0.0]]
    assert nats(np.float32([[[0, -math.inf]]]), np.array([[0]])).tolist() == [[0.0]]  # a probability of zero


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 1, 2)])
def test_nats_of_logits_that_are_not_finite(bad, place):
    logits = np.zeros((2, 2, 3), np.float32)
    logits[place] = bad
    for targets in (np.zeros((2, 2), np.int64), np.full((2, 2), IGNORED)):
        with pytest.raises(UserError, match="not finite"):
            nats(logits.copy(), targets)
    with pytest.raises(UserError, match="not finite"):
        nats(np.float32([[[0, -math.inf]]]), np.array([[1]]))
