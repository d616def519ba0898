"""Memorisation and windows: copied text is reported as copied, new text is not, and the figures are exact."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallm.training.analysis import windows
from smallm.training.analysis.characters import code_points
from smallm.training.analysis.memorisation import WIDTHS, measure_memorisation
from smallm.training.analysis.windows import WindowSet, window_hashes

rng = random.Random(5)
LEARNT = "".join(rng.choices("abcdefgh éß€中\n", k=30_000))
FRESH = "".join(rng.choices("abcdefgh éß€中\n", k=10_000))


def windows_of(text, width):
    return [text[i : i + width] for i in range(len(text) - width + 1)]


def longest_by_hand(text, learnt):
    return max((n for n in range(len(text) + 1) if any(w in learnt for w in windows_of(text, n))), default=0)


# -- copied or new text


def test_copied_text_is_reported_as_copied():
    report = measure_memorisation([LEARNT[700:1900]], LEARNT, FRESH)
    assert report.generated.longest == 1200
    assert report.generated.shares == {20: 1.0, 50: 1.0, 100: 1.0}
    assert report.is_remarkable
    assert ["longest copied passage", "1,200 characters", "fewer than 20 characters"] in report.rows()


def test_new_text_is_not():
    report = measure_memorisation([FRESH[:5000]], LEARNT, FRESH[5000:])
    for part in (report.generated, report.validation):
        assert (part.longest, part.shares) == (0, {20: 0.0, 50: 0.0, 100: 0.0})
    assert not report.is_remarkable
    assert report.generated.length == "fewer than 20 characters"


def test_a_passage_within_new_text_is_measured_exactly():
    report = measure_memorisation([FRESH[:1000] + LEARNT[5000:5120] + FRESH[1000:1880]], LEARNT, FRESH[2000:])
    assert 120 <= report.generated.longest <= 124  # a character at either end may match by chance
    for width in WIDTHS:
        assert report.generated.shares[width] * (2000 - width + 1) == pytest.approx(121 - width, abs=4)


def test_formulas_that_the_validation_text_contains_too_are_not_memorisation():
    """A formula in the training text, the validation text and the generated text."""
    formula = "This program comes with absolutely no warranty, to the extent of the law.\n"
    parts = [formula + text + formula for text in (LEARNT, FRESH[:5000], FRESH[5000:])]
    assert not measure_memorisation([parts[1]], parts[0], parts[2]).is_remarkable
    found = measure_memorisation([parts[1]], parts[0], FRESH[5000:])
    assert found.generated.longest == pytest.approx(len(formula), abs=4)


def test_phrases_in_a_short_sample_are_not_memorisation():
    validation = LEARNT[1000:1083] + FRESH[2000:]
    written = "".join(FRESH[i : i + 120] + LEARNT[5 * i : 5 * i + 80] for i in range(200, 2000, 120))
    assert not measure_memorisation([written[:600]], LEARNT, validation).is_remarkable
    assert measure_memorisation([written], LEARNT, validation).is_remarkable


def test_passages_of_several_texts_are_not_joined():
    a, b = LEARNT[100:160], LEARNT[160:220]
    assert measure_memorisation([a, b], LEARNT, "").generated.longest == 60
    assert measure_memorisation([a + b], LEARNT, "").generated.longest == 120


@pytest.mark.parametrize("generated", [[], [""], ["a"], ["ab" * 9], ["", ""], ["\udc80" * 30]])
def test_texts_that_are_too_short_or_unusual(generated):
    report = measure_memorisation(generated, LEARNT, "x")
    assert (report.generated.longest, set(report.generated.shares.values())) == (0, {0.0})
    assert not report.is_remarkable
    assert measure_memorisation(generated, "", "").generated.longest == 0


# -- exactness across pieces


@pytest.mark.parametrize("size", [300, 1000, 30_000])
def test_passages_and_windows_across_pieces(monkeypatch, size):
    monkeypatch.setattr(windows, "PIECE", size)
    generated = LEARNT[980:1013] + FRESH[:50] + LEARNT[200:450]
    found = measure_memorisation([generated], LEARNT, "").generated
    assert found.longest == 250
    for width in WIDTHS:
        by_hand = [window in LEARNT for window in windows_of(generated, width)]
        assert found.shares[width] == pytest.approx(sum(by_hand) / len(by_hand))


@given(st.text("ab", max_size=60), st.text("ab", max_size=200))
def test_the_longest_passage_is_exact(generated, learnt):
    wanted = longest_by_hand(generated, learnt)
    assert measure_memorisation([generated], learnt, "").generated.longest == (wanted if wanted >= WIDTHS[0] else 0)


@given(st.lists(st.text("abc", max_size=30), max_size=4), st.text("abc", max_size=80), st.integers(1, 12))
def test_windows_that_another_text_contains(texts, other, width):
    windows = WindowSet(texts, width)
    for start in range(0, len(other), 7):  # piece by piece
        windows.find(window_hashes(code_points(other[start : start + 6 + width]), width))
    ours = [window for text in texts for window in windows_of(text, width)]
    assert windows.share() == pytest.approx(np.mean([window in other for window in ours]) if ours else 0)
    assert [windows.text[start : start + width] for start in windows.starts()] == [w for w in ours if w in other]
    by_hand = [
        any(text[j : j + width] in other and j + width <= len(text) for j in range(max(0, i - width + 1), i + 1))
        for text in texts for i in range(len(text))
    ]  # fmt: skip
    assert windows.covered() == sum(by_hand)


@given(st.text("ab", max_size=60), st.integers(1, 30))
def test_windows_are_equal_where_their_hashes_are(text, width):
    hashes, windows = window_hashes(code_points(text), width).tolist(), windows_of(text, width)
    assert len(hashes) == len(windows)
    assert len(set(hashes)) == len(set(windows)) == len(set(zip(hashes, windows, strict=True)))


@pytest.mark.parametrize("learnt", [LEARNT, LEARNT[:300] * 500, "ab" * 100_000], ids=["text", "repeats", "period"])
def test_the_longest_passage_is_found_in_few_steps(monkeypatch, learnt):
    searches = []
    search = WindowSet.search
    monkeypatch.setattr(WindowSet, "search", lambda *args: (searches.append(args), search(*args))[1])
    generated = learnt[:150] + "x" + learnt[:100] + "y" + learnt[50:140]
    assert measure_memorisation([generated], learnt, "").generated.longest == 150
    assert len(searches) <= 14
