"""Each character is measured once, and planted passages and typos are found at their positions."""

import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smallm import LanguageModel, UserError
from smallm.surprisal import spans
from smallm.surprisal.measure import EXPECTED, UNKNOWN, Measured, id_name, measure
from smallm.surprisal.spans import CONTEXT, MAX_TEXT, MAX_WORD, SpanFinder, _stretches
from smallm.tokenizer.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_characters("é€")
TEXTS = st.text(alphabet="ab\n\x00é€ñ中🎉", max_size=60)  # ids of their own: é, €; in bytes: ñ, 中, 🎉
FOREIGN = """Es war einmal ein Mann, der hatte sieben Söhne und immer noch kein Töchterchen;
so sehr er sich's auch wünschte, endlich gab ihm seine Frau wieder gute Hoffnung."""


class Bigram:
    """A model that sees one id: logits are a table, so all is known by hand."""

    def __init__(self, vocabulary=VOCABULARY, block_size=8):
        self.vocabulary, self.vocab_size, self.block_size = vocabulary, vocabulary.size, block_size
        self.table = np.random.default_rng(3).normal(0, 3, (vocabulary.size, vocabulary.size)).astype(np.float32)

    def logits(self, ids):
        return self.table[ids]

    def probabilities(self, id):
        weights = np.exp(self.table[id].astype(np.float64))
        return weights / weights.sum()


@pytest.fixture(scope="module")
def lm(exported):
    return LanguageModel.load(exported)


@pytest.fixture(scope="module")
def owls(text_file):
    """The last 150 lines: what the model has not seen, in the manner of what it has."""
    return "".join(text_file.read_text("utf-8").splitlines(keepends=True)[-150:])


def split(text, cuts):
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def find_spans(parts, vocabulary, max_spans=10):
    finder = SpanFinder(vocabulary, max_spans)
    for part in parts:
        finder.add(part)
    return finder.finish()


def one(parts):
    return Measured.join([of({}, ""), *parts])


@settings(max_examples=200)
@given(TEXTS, st.integers(1, 12), st.lists(st.integers(0, 1000), max_size=6))
def test_each_character_once_by_hand(text, block_size, cuts):
    model = Bigram(block_size=block_size)
    found = one(measure(model, split(text, cuts)))
    assert found.text == text
    assert np.isnan(found.nats[:1]).all()
    assert (found.expected[:1] == UNKNOWN).all()
    before = VOCABULARY.encode(text[:1]).tolist()[-1:]
    for i, character in enumerate(text[1:], start=1):
        ids = VOCABULARY.encode(character).tolist()
        path = [*before, *ids]
        assert found.nats[i] == pytest.approx(-sum(np.log(model.probabilities(a)[b]) for a, b in pairwise(path)))
        best = np.argsort(-model.table[path[0]], kind="stable")[:EXPECTED]
        assert found.expected[i].tolist() == best.tolist()
        assert found.probabilities[i] == pytest.approx(model.probabilities(path[0])[best], rel=1e-5)
        before = ids[-1:]


def test_of_a_real_model_the_sum_is_that_of_perplexity(lm, owls):
    text = owls[:3000] + FOREIGN + "🎉中"
    whole = one(measure(lm, [text]))
    expected = lm.perplexity(text, stride=lm.block_size // 2)
    assert np.nansum(whole.nats) == pytest.approx(expected.nats_per_char * expected.characters, rel=1e-9)
    assert np.nansum(whole.nats) != pytest.approx(np.nansum(lm.score(text)), rel=1e-4)  # windows side by side
    for size in (1, 77, 1000):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        found = one(measure(lm, pieces))
        assert found.text == text
        assert found.nats == pytest.approx(whole.nats, abs=1e-4, nan_ok=True)


def test_no_character_is_surprising_because_its_window_begins(lm, owls):
    """Those at the beginning of a window are, on the average, as surprising as all."""
    nats = one(measure(lm, [owls])).nats
    half = lm.block_size // 2
    starts = np.arange(2 * half + 1, len(nats), half)
    assert nats[starts].mean() < 1.15 * np.nanmean(nats)
    side_by_side = lm.score(owls)[np.arange(lm.block_size + 1, len(nats), lm.block_size)]
    assert side_by_side.mean() > 1.3 * np.nanmean(nats)


@pytest.mark.parametrize(("text", "n"), [("", 0), ("a", 1), ("é", 1), ("🎉", 1)])
def test_texts_without_anything_to_predict(text, n):
    found = one(measure(Bigram(), [text[:1], "", text[1:]]))
    assert (found.text, len(found.nats), found.expected.shape) == (text, n, (n, EXPECTED))
    assert np.isnan(found.nats).all()


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UserError, match="lone surrogate"):
        one(measure(Bigram(), ["ab\ud800"]))


def test_names_of_ids():
    assert id_name(VOCABULARY, ord("a")) == "a"
    assert id_name(VOCABULARY, 0) == "\0"
    assert id_name(VOCABULARY, 0xE4) == "<e4>"
    names = [id_name(VOCABULARY, id) for id in range(256, VOCABULARY.size)]
    assert sorted(names) == ["<e2 82>", "é", "€"]


# -- spans


@settings(max_examples=300)
@given(st.lists(st.integers(-4, 4), max_size=40))
def test_stretches_are_the_maximal_ones(gains):
    """Against the definition: take the best stretch, and the same to its left and to its right."""

    def best(start, end):
        sums = [(sum(gains[a:b]), a - b, a, b) for a in range(start, end) for b in range(a + 1, end + 1)]
        total, _, a, b = max(sums, default=(0, 0, 0, 0))
        return total, a, b

    def expected(start, end):
        total, a, b = best(start, end)
        return [*expected(start, a), total, *expected(b, end)] if total > 0 else []

    found = list(_stretches(np.array(gains, np.float64), np.inf))
    assert all(0 <= a < b <= len(gains) for a, b in found)
    assert all(b <= c for (_, b), (c, _) in pairwise(sorted(found)))
    assert sorted(sum(gains[a:b]) for a, b in found) == sorted(expected(0, len(gains)))


def test_a_long_usual_part_ends_a_stretch():
    gains = np.array([5.0] * 10 + [-1.0] * 30 + [5.0] * 10)
    assert list(_stretches(gains, 40)) == [(0, 50)]
    assert list(_stretches(gains, 20)) == [(0, 10), (40, 50)]


def of(nats_of, text):
    """A text measured by decree: {offset: nats}, all else 1."""
    nats = np.ones(len(text))
    nats[:1] = np.nan
    for offset, value in nats_of.items():
        nats[offset] = value
    expected = np.full((len(text), EXPECTED), ord("x"), np.int32)
    return Measured(text, nats, expected, np.full(expected.shape, 0.2, np.float32))


def test_a_word_by_hand():
    text = "one two three.\nfour, fixve six\nseven " * 3
    at = text.index("fixve") + 2
    passages, (word,) = find_spans([of({at: 9.0}, text)], VOCABULARY)
    assert passages == []
    assert (word.text, word.line, word.column, word.offset, word.characters) == ("fixve", 2, 7, at - 2, 5)
    assert (word.before, word.after) == (text[: at - 2], text[at + 3 : at + 3 + CONTEXT])
    peak = word.peak
    assert (peak.line, peak.column, peak.offset, peak.character, peak.nats) == (2, 9, at, "x", 9.0)
    assert peak.expected == (("x", pytest.approx(0.2)),) * EXPECTED
    assert word.nats == 13.0
    usual = 1.386 * (len(text) + 7) / (len(text) - 1)
    assert word.excess == pytest.approx(13.0 - 5 * usual, abs=0.1)


def test_a_word_is_listed_once_where_its_peak_is_highest():
    text = "a (Gonzalo) b, c Gonzalo: d and e " * 4
    first, second = text.index("zalo"), text.index("zalo", 20)
    _, words = find_spans([of({first: 8.0, second: 9.0, 100: 7.0}, text)], VOCABULARY)
    assert [word.peak.offset for word in words] == [second, 100]


def test_a_passage_by_hand():
    text = "usual words in a row, " * 20 + "\nHIC IBAT SIMOIS; HIC EST SIGEIA TELLUS\n" + "usual words in a row, " * 20
    start, end = text.index("HIC"), text.index("TELLUS") + 6
    (passage,), words = find_spans([of({i: 3.0 + 2 * (i == start + 5) for i in range(start, end)}, text)], VOCABULARY)
    assert words == []
    assert (passage.offset, passage.end, passage.line, passage.column) == (start, end, 2, 1)
    assert passage.text == text[start:end]
    assert passage.peak.offset == start + 5
    assert passage.excess == pytest.approx(passage.nats - len(passage.text) * 1.386 * 1.13, rel=0.05)


def test_no_two_spans_share_a_word():
    text = "usual words in a row, " * 200
    start = text.index("usual", 1000)
    high = [*range(start + 2, start + 40), *range(start + 200, start + 240), start + 246]
    passages, words = find_spans([of(dict.fromkeys(high, 6.0) | {start: 9.0}, text)], VOCABULARY)
    bounds = sorted((span.offset, span.end) for span in [*passages, *words])
    assert len(passages) == 2
    assert all(end <= first for (_, end), (first, _) in pairwise(bounds))


def test_long_passages_are_cut_where_they_are_kept():
    text = "usual words in a row, " * 200 + "中" * 1000
    start = text.index("中")
    (passage,), _ = find_spans([of(dict.fromkeys(range(start, len(text)), 5.0), text)], VOCABULARY)
    assert passage.characters == 1000
    assert passage.text == "中" * MAX_TEXT
    assert passage.after == ""


@given(st.lists(st.integers(0, 2000), max_size=8), st.integers(40, 500))
def test_pieces_of_any_size_give_the_same_spans(cuts, chunk):
    rng = random.Random(5)
    text = "".join(rng.choice("abc de\n") for _ in range(1200))
    measured = of({rng.randrange(1, 1200): rng.uniform(2, 12) for _ in range(90)}, text)
    edges = [0, *sorted(cut % 1201 for cut in cuts), 1200]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "CHUNK", chunk)
        whole = find_spans([measured], VOCABULARY, max_spans=7)
        assert find_spans([measured[a:b] for a, b in pairwise(edges)], VOCABULARY, max_spans=7) == whole
    found = sorted((span.offset, span.end) for span in [*whole[0], *whole[1]])
    assert len(set(found)) == len(found)
    lines = text.split("\n")
    for span in [*whole[0], *whole[1]]:
        assert text[span.offset : span.end] == span.text
        assert lines[span.peak.line - 1][span.peak.column - 1 :][:1] in (span.peak.character, "")
        assert text[span.peak.offset] == span.peak.character
        assert sum(len(line) + 1 for line in lines[: span.line - 1]) + span.column - 1 == span.offset
    assert len(whole[1]) == 7


def test_memory_does_not_grow_with_the_text(monkeypatch):
    """Counted, not timed: of ten times the text no more is held."""
    monkeypatch.setattr(spans, "CHUNK", 1 << 10)
    model, piece, peaks = Bigram(block_size=64), "usual words in a row é\n" * 20, []
    for n in (10, 60):
        finder = SpanFinder(VOCABULARY)
        tracemalloc.start()
        for part in measure(model, (piece for _ in range(n))):
            finder.add(part)
        finder.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert finder.characters == n * len(piece)
    assert peaks[1] < 1.1 * peaks[0]


def test_the_mean_is_that_of_the_text_so_far(monkeypatch):
    text = "usual words in a row, " * 100
    finder = SpanFinder(VOCABULARY)
    finder.add(of({}, text))
    finder.finish()
    assert (finder.nats, finder.characters) == (len(text) - 1, len(text))
    assert finder.finish() == ([], [])


# -- what was planted


def planted(owls, what, line):
    lines = owls.splitlines(keepends=True)
    return "".join([*lines[: line - 1], what, *lines[line - 1 :]])


def test_a_foreign_paragraph_is_the_most_surprising_span(lm, owls):
    text = planted(owls, FOREIGN + "\n", 71)
    passages, _ = find_spans(measure(lm, [text]), lm.vocabulary)
    start = text.index(FOREIGN)
    assert start <= passages[0].offset < start + MAX_WORD
    assert abs(passages[0].end - start - len(FOREIGN)) < MAX_WORD
    assert passages[0].line == 71
    assert passages[0].excess > 5 * max((span.excess for span in passages[1:]), default=0)
    assert all(span.end <= start or span.offset >= start + len(FOREIGN) for span in passages[1:])  # it comes up once


@pytest.mark.parametrize(
    ("right", "wrong", "at"),
    [("the long", "the loxng", 6), ("remembers", "rememqbers", 5), ("nothing at all", "nothing qt all", 8)],
)
def test_a_typo_is_the_most_surprising_word(lm, owls, right, wrong, at):
    offset = owls.index(right, len(owls) // 2)
    text = owls[:offset] + wrong + owls[offset + len(right) :]
    passages, words = find_spans(measure(lm, [text]), lm.vocabulary)
    line = text[: offset + at].count("\n") + 1
    column = offset + at - text.rindex("\n", 0, offset + at)
    assert passages == []
    assert (words[0].peak.line, words[0].peak.column) == (line, column)
    assert words[0].peak.character == wrong[at]
    assert words[0].peak.expected[0][0] == right[at]
