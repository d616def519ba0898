"""SequenceState: stop strings, lengths and log-probabilities, with handmade logits instead of a model."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TOY_VOCABULARY, manifest_of, random_model

from smallm.generation.config import GenerationConfig
from smallm.generation.logits_processors import LogitsProcessor
from smallm.generation.rng import Rng
from smallm.generation.sequence_state import SequenceState

MANIFEST = manifest_of(random_model())
SIZE = TOY_VOCABULARY.size


def new_state(logprobs=False, **options) -> SequenceState:
    config = GenerationConfig(**{"max_length": 100, "temperature": 0, "rng_seed": 1} | options).resolve(MANIFEST)
    processor = LogitsProcessor(TOY_VOCABULARY, config)
    return SequenceState(TOY_VOCABULARY, [10], 16, config, processor, logprobs=logprobs)


def pieces(ids, **options) -> list[str]:
    """What comes out when the model is sure of these ids, one after the other; at the end nothing is held back."""
    state, found = new_state(**{"max_length": 10**6} | options), []
    for id in ids:
        if state.done:
            break
        state.choose(np.eye(SIZE, dtype=np.float32)[id])
        found.append(state.take())
    return [piece for piece in [*found, "" if state.done else state._held] if piece]


def cut_at(text, stops, min_length=0):
    """The beginning of text before the first stop to be complete, the longest of several that end together."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop) and end - len(stop) >= min_length]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=200)
@given(
    st.text(alphabet="abñ中", max_size=30),
    st.lists(st.text(alphabet="abñ中", min_size=1, max_size=5), max_size=4),
    st.integers(0, 12),
)
def test_stop_strings_follow_the_specification(text, stops, min_length):
    found = pieces(TOY_VOCABULARY.encode(text), stop=stops, min_length=min_length)
    assert "".join(found) == cut_at(text, stops, min_length)
    if not stops:
        assert found == list(text)


@pytest.mark.parametrize(
    ("min_length", "expected"),
    [(0, ""), (1, "ab"), (2, "ab"), (3, "ababc"), (4, "ababc"), (5, "ababc"), (6, "ababcabab"), (8, "ababcabab")],
)  # "ab": at 0, 2, 5, 7
def test_minimum_length(min_length, expected):
    options = {"stop": "ab", "min_length": min_length}
    found = "".join(pieces(TOY_VOCABULARY.encode("ababcabab"), **options))
    assert found == cut_at("ababcabab", ["ab"], min_length)
    assert len(found) >= min(min_length, 9)


def test_a_stop_that_overlaps_the_minimum_does_not_count():
    assert "".join(pieces(b"xxaab", stop="aab", min_length=3)) == "xxaab"
    assert "".join(pieces(b"xxaab", stop="aab", min_length=2)) == "xx"


def test_max_length_releases_the_held_back_text():
    state = new_state(max_length=3, stop="bcd")
    for id in b"abc":
        state.choose(np.eye(SIZE, dtype=np.float32)[id])
    assert (state.done, state.take()) == (True, "abc")


def test_one_id_that_completes_several_characters():
    ids = [97, 0xC3, 98]  # a, the beginning of a character, b: a, U+FFFD, b
    assert pieces(ids) == ["a", "\ufffdb"]
    assert pieces(ids, max_length=2) == ["a", "\ufffd"]
    assert pieces(ids, stop="\ufffd") == ["a"]
    assert pieces(ids, stop="b") == ["a", "\ufffd"]


def test_log_probabilities_are_sums_over_the_ids_of_a_character():
    state, rows, total = new_state(logprobs=True), {}, 0.0
    text, taken, logprobs = "aß中🎉b", "", []
    for n, id in enumerate(TOY_VOCABULARY.encode(text).tolist()):
        logits = np.random.default_rng(n).normal(size=SIZE).astype(np.float32)
        logits[id] = 5
        shifted = logits.astype(np.float64)
        total += 5 - math.log(np.exp(shifted).sum())
        state.choose(logits)
        piece = state.take()
        logprobs += state.take_logprobs(len(piece))
        taken += piece
        if piece:
            rows[piece], total = total, 0.0
    assert taken == text
    assert logprobs == pytest.approx([rows[c] for c in text])


def test_log_probabilities_beside_stops_and_broken_bytes():
    state = new_state(logprobs=True, stop="xyz")
    logprobs, text = [], ""
    for id in [97, 0xC3, 98, 120, 121, 99]:
        state.choose(np.eye(SIZE, dtype=np.float32)[id])
        piece = state.take()
        text += piece
        logprobs += state.take_logprobs(len(piece))
    one = 1 - math.log(SIZE - 1 + math.e)
    assert text == "a\ufffdbxyc"
    assert logprobs == pytest.approx([one, 0, 2 * one, one, one, one])


def test_the_penalty_looks_at_the_window():
    logits = np.zeros(SIZE, np.float32)
    logits[[97, 98, 99]] = 3, 2.9, 2.8
    for window, expected in ((1, "abab"), (2, "abca"), (0, "abca")):
        state = new_state(repetition_penalty=1.2, repetition_window=window)
        state.rng = Rng(1)
        text = ""
        for _ in range(4):
            state.choose(logits)
            text += state.take()
        assert text == expected


def test_the_seed_counts_for_the_penalty():
    logits = np.zeros(SIZE, np.float32)
    logits[[10, 97]] = 3, 2.9  # 10 is the seed
    state = new_state(repetition_penalty=1.2)
    assert state.choose(logits) == 97


def test_memory_does_not_grow_with_the_text():
    state = new_state(max_length=10**6, stop="never")
    row = np.eye(SIZE, dtype=np.float32)[97]
    for _ in range(1000):
        state.choose(row)
        state.take()
    assert 16 <= len(state.history) <= 32
    assert state.history[-16:] == [97] * 16
    assert state._held == ""


def test_a_copy_is_independent():
    first = new_state(stop="bbb", logprobs=True)
    for id in (97, 98, 0xC3):
        first.choose(np.eye(SIZE, dtype=np.float32)[id])
    second = first.copy()
    for state, ids in ((first, b"\xa9c"), (second, b"\xb1d")):
        for id in ids:
            state.choose(np.eye(SIZE, dtype=np.float32)[id])
    assert (first.take(), second.take()) == ("abéc", "abñd")
    assert (first.history[-1], second.history[-1]) == (99, 100)
    assert len(first.take_logprobs(4)) == len(second.take_logprobs(4)) == 4
