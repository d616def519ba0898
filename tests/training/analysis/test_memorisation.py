"""Memorisation and windows: copied text is reported as copied, new text is not, and the figures are exact."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallm.training.analysis import memorisation, windows
from smallm.training.analysis.characters import Characters
from smallm.training.analysis.memorisation import WIDTHS, _Search, measure_memorisation
from smallm.training.analysis.windows import WindowSet, window_hashes
from smallm.training.data.corpus import open_corpus

rng = random.Random(5)
LEARNT = "".join(rng.choices("abcdefgh éß€中\n", k=30_000))
FRESH = "".join(rng.choices("abcdefgh éß€中\n", k=10_000))


def codes(text):
    return Characters.of(text).between(0, len(text))


def windows_of(text, width):
    return [text[i : i + width] for i in range(len(text) - width + 1)]


def longest_by_hand(text, learnt):
    return max((n for n in range(len(text) + 1) if any(w in learnt for w in windows_of(text, n))), default=0)


# -- copied or new text


def test_copied_text_is_reported_as_copied():
    report = measure_memorisation(LEARNT[700:1900], LEARNT, FRESH)
    assert (report.generated.longest, report.generated.passage) == (1200, LEARNT[700:1900])
    assert report.generated.shares == {20: 1.0, 50: 1.0, 100: 1.0}
    assert report.is_remarkable
    assert "1,200 characters" in report.lines()[0]


def test_new_text_is_not():
    report = measure_memorisation(FRESH[:5000], LEARNT, FRESH[5000:])
    for part in (report.generated, report.validation):
        assert (part.longest, part.passage, part.shares) == (0, "", {20: 0.0, 50: 0.0, 100: 0.0})
    assert not report.is_remarkable
    assert "fewer than 20 characters" in report.lines()[0]


def test_a_passage_within_new_text_is_measured_exactly():
    report = measure_memorisation(FRESH[:1000] + LEARNT[5000:5120] + FRESH[1000:1880], LEARNT, FRESH[2000:])
    assert 120 <= report.generated.longest <= 124  # a character at either end may match by chance
    assert LEARNT[5000:5120] in report.generated.passage
    for width in WIDTHS:
        assert report.generated.shares[width] * (2000 - width + 1) == pytest.approx(121 - width, abs=4)


def test_formulas_that_the_validation_text_contains_too_are_not_memorisation():
    """A formula in the training text, the validation text and the generated text."""
    formula = "This program comes with absolutely no warranty, to the extent of the law.\n"
    parts = [formula + text + formula for text in (LEARNT, FRESH[:5000], FRESH[5000:])]
    assert not measure_memorisation(parts[1], parts[0], parts[2]).is_remarkable
    found = measure_memorisation(parts[1], parts[0], FRESH[5000:])
    assert found.generated.longest == pytest.approx(len(formula), abs=4)


def test_phrases_in_a_short_sample_are_not_memorisation():
    validation = LEARNT[1000:1083] + FRESH[2000:]
    written = "".join(FRESH[i : i + 120] + LEARNT[5 * i : 5 * i + 80] for i in range(200, 2000, 120))
    assert not measure_memorisation(written[:600], LEARNT, validation).is_remarkable
    assert measure_memorisation(written, LEARNT, validation).is_remarkable


def test_passages_of_several_texts_are_not_joined():
    a, b = LEARNT[100:160], LEARNT[160:220]
    assert measure_memorisation([a, b], LEARNT, "").generated.longest == 60
    assert measure_memorisation(a + b, LEARNT, "").generated.longest == 120


@pytest.mark.parametrize("generated", ["", "a", "ab" * 9, ["", ""], "\udc80" * 30])
def test_texts_that_are_too_short_or_unusual(generated):
    report = measure_memorisation(generated, LEARNT, "x")
    assert (report.generated.longest, set(report.generated.shares.values())) == (0, {0.0})
    assert not report.is_remarkable
    assert measure_memorisation(generated, "", "").generated.longest == 0


def test_a_corpus_gives_the_same_report_as_its_text(tmp_path):
    (tmp_path / "a.txt").write_bytes((LEARNT + FRESH).encode())
    generated, options = LEARNT[300:900] + "zzz" * 100, {"val_fraction": 0.25, "cache": tmp_path}
    whole = measure_memorisation(generated, open_corpus(str(tmp_path / "a.txt"), min_count=1, **options))
    assert whole == measure_memorisation(generated, LEARNT, FRESH)
    assert whole.validation.characters == 10_000
    in_bytes = open_corpus(str(tmp_path / "a.txt"), min_count=10**6, **options)
    spelled = measure_memorisation(generated, in_bytes)
    assert spelled.generated == whole.generated


def test_passages_are_followed_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(memorisation, "LONGEST", 128)
    assert measure_memorisation(LEARNT[:1000], LEARNT, "").generated.longest == 128


# -- exactness across pieces


@pytest.mark.parametrize("size", [300, 1000, 30_000])
def test_passages_and_windows_across_pieces(monkeypatch, size):
    monkeypatch.setattr(Characters.pieces, "__defaults__", (None, size, 0))
    generated = LEARNT[980:1013] + FRESH[:50] + LEARNT[200:450]
    found = measure_memorisation(generated, LEARNT, "").generated
    assert (found.longest, found.passage) == (250, LEARNT[200:450])
    for width in WIDTHS:
        by_hand = [window in LEARNT for window in windows_of(generated, width)]
        assert found.shares[width] == pytest.approx(sum(by_hand) / len(by_hand))


@given(st.text("ab", max_size=60), st.text("ab", max_size=200))
def test_the_longest_passage_is_exact(generated, learnt):
    wanted = longest_by_hand(generated, learnt)
    assert measure_memorisation(generated, learnt, "").generated.longest == (wanted if wanted >= WIDTHS[0] else 0)


@given(st.lists(st.text("abc", max_size=30), max_size=4), st.text("abc", max_size=80), st.integers(1, 12))
def test_windows_that_another_text_contains(texts, other, width):
    windows = WindowSet([codes(text) for text in texts], width)
    places = windows.find(codes(other), window_hashes(codes(other), width))
    ours = [window for text in texts for window in windows_of(text, width)]
    assert len(windows) == len(ours)
    once = WindowSet([codes(text) for text in texts], width, once=True)
    for start in range(0, len(other), 7):
        piece = codes(other[start : start + 6 + width])
        once.find(piece, window_hashes(piece, width))
    assert once.covered().tolist() == windows.covered().tolist()
    assert windows.share == pytest.approx(np.mean([window in other for window in ours]) if ours else 0)
    assert places.tolist() == [i for i, window in enumerate(windows_of(other, width)) if window in ours]
    by_hand = [
        any(text[j : j + width] in other and j + width <= len(text) for j in range(max(0, i - width + 1), i + 1))
        for text in texts for i in [*range(len(text)), len(text)]
    ]  # fmt: skip
    by_hand = np.array(by_hand, bool)
    assert windows.covered()[windows.codes < 0x110000].tolist() == by_hand[windows.codes < 0x110000].tolist()


@given(st.text("ab", max_size=60), st.integers(1, 30))
def test_windows_are_equal_where_their_hashes_are(text, width):
    hashes, windows = window_hashes(codes(text), width).tolist(), windows_of(text, width)
    assert len(hashes) == len(windows)
    assert len(set(hashes)) == len(set(windows)) == len(set(zip(hashes, windows, strict=True)))


def test_equal_hashes_are_not_equal_windows(monkeypatch):
    """Each hit is compared: if all hashes are equal, nothing is found that the text does not contain."""
    def all_equal(codes, width):
        return np.zeros(max(0, len(codes) - width + 1), np.uint64)

    for module in (memorisation, windows):
        monkeypatch.setattr(module, "window_hashes", all_equal)
    found = measure_memorisation("x" * 200, LEARNT, "").generated
    assert (found.longest, found.shares[20]) == (0, 0.0)


@pytest.mark.parametrize("learnt", [LEARNT, LEARNT[:300] * 500, "ab" * 100_000], ids=["text", "repeats", "period"])
def test_the_longest_passage_is_found_in_few_steps(monkeypatch, learnt):
    steps = []
    contains = _Search._contains
    monkeypatch.setattr(_Search, "_contains", lambda *args: (steps.append(len(args[-1])), contains(*args))[1])
    generated = learnt[:150] + "x" + learnt[:100] + "y" + learnt[50:140]
    assert measure_memorisation(generated, learnt, "").generated.longest == 150
    assert len(steps) < 1000
