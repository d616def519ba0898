"""smallm.training.analysis.baselines and ngram: results that can be checked by hand, and the lines that show them."""

import gzip
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from toys import open_corpus

from smallm.errors import quoted
from smallm.runs.baselines_file import Baseline, read_baselines, write_baselines
from smallm.training.analysis import baselines, ngram
from smallm.training.analysis.baselines import comparison_line
from smallm.training.analysis.ngram import NGram, best_ngram
from smallm.training.cli import main

rng = random.Random(3)
SYLLABLES = ["ba", "do", "ki", "lu", "me", "né", "ro", "sa"]
TEXT = "".join(rng.choice(SYLLABLES) + rng.choice(["", "", " "]) for _ in range(20_000))


def opened(tmp_path, text, **options):
    (tmp_path / "a.txt").write_bytes(text.encode())
    settings = {"min_count": 1, "val_fraction": 0.1, "cache": tmp_path / "cache"} | options
    return open_corpus(str(tmp_path / "a.txt"), **settings)


def figures(corpus):
    return {one.name.split("-")[-1]: one.bits_per_char for one in baselines.measure_baselines(corpus)}


# -- the n-gram model


def kneser_ney(train, context, symbol, order, size, top=True):
    """The textbook's recursion over dictionaries."""
    if not order:
        return 1 / size
    grams = Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))
    if not top:
        longer = {tuple(train[i : i + order + 1]) for i in range(len(train) - order)}
        grams = Counter(gram[1:] for gram in longer)
    n = [max(1, sum(count == times for count in grams.values())) for times in (1, 2, 3, 4)]
    y = n[0] / (n[0] + 2 * n[1])
    discount = [0, 1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
    discount = np.clip(discount, [0, 0.05, 0.05, 0.05], [0, 0.95, 1.95, 2.95])
    before = tuple(context[len(context) - order + 1 :])
    after = {gram[-1]: count for gram, count in grams.items() if gram[:-1] == before}
    shorter = kneser_ney(train, context, symbol, order - 1, size, top=False)
    if not after:
        return shorter
    total, left = sum(after.values()), sum(discount[min(count, 3)] for count in after.values())
    count = after.get(symbol, 0)
    return (count - discount[min(count, 3)]) / total + left / total * shorter


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_model_follows_kneser_ney(order):
    """Compared with the recursion; the counts of the lower orders may lack the last few ids."""
    train = [rng.randrange(5) for _ in range(300)]
    model = NGram(np.array(train), 6, order)
    for symbol in range(6):  # 5 never occurs
        *_, bits = model.bits(np.array(train), np.array([symbol]))
        assert 2**-bits == pytest.approx(kneser_ney(train, train, symbol, order, 6), rel=0.02)


def test_probabilities_add_up_to_one():
    train = np.array([rng.randrange(7) for _ in range(2000)])
    model = NGram(train, 10)
    for order in range(model.max_order):
        for before in (train, train[:3], np.array([9, 9, 9])):
            total = sum(2 ** -list(model.bits(before, np.array([symbol])))[order] for symbol in range(10))
            assert total == pytest.approx(1)


def test_the_best_order_reaches_the_entropy():
    period = np.array([0, 1, 2, 1] * 5000)
    assert best_ngram(period, period[:400], 256)[1] < 10  # almost none
    noise = np.random.default_rng(1).integers(0, 16, 60_000)
    order, bits = best_ngram(noise[:50_000], noise[50_000:], 256)
    assert order <= 2
    assert bits / 10_000 == pytest.approx(4, abs=0.02)  # the entropy of the source


def test_many_distinct_ids_limit_the_order():
    ids = np.arange(5000) % 3000
    assert NGram(ids, 4000).max_order == 5  # of 12 bits each
    assert NGram(ids % 200, 4000).max_order == 8


@pytest.mark.parametrize("train", [[1, 2], [7] * 100, [0, 255, 0]])
def test_tiny_training_texts(train):
    _, bits = best_ngram(np.array(train), np.array([1, 2, 300]), 512)
    assert 0 < bits < math.inf


# -- the baselines of a text


def test_figures_of_noise_and_of_a_repeated_text(tmp_path):
    """Eight equally likely letters need 3 bits each, and a text that occurred before needs almost none."""
    noise = "".join(rng.choices("abcdefgh", k=60_000))
    for name, bits in figures(opened(tmp_path, noise)).items():
        assert 2.99 < bits < 3.6, name
    for name, bits in figures(opened(tmp_path, noise[:2_000] * 5)).items():
        assert bits < (1.6 if name == "bz2" else 0.8), name  # bz2 sorts blocks and finds no distant repeats


def test_what_the_figures_are(tmp_path):
    corpus = opened(tmp_path, TEXT)
    found = figures(corpus)
    tail = corpus.val_text()
    assert found["gzip"] < 8 * len(gzip.compress(tail.encode())) / len(tail)  # it was primed with the training text
    entropy = -sum(n / len(tail) * math.log2(n / len(tail)) for n in Counter(tail).values())
    assert found["gram"] < found["xz"] < entropy
    source = (3 + math.log2(3) - 2 / 3) / (2 + 1 / 3)  # a syllable of eight, a space after a third of them
    assert source < found["gram"] < 1.1 * source
    *_, last = baselines.measure_baselines(corpus)
    assert last.name.endswith("-gram")
    assert "Kneser-Ney" in last.how


def test_compressors_do_not_depend_on_the_vocabulary(tmp_path):
    whole, spelled = figures(opened(tmp_path, TEXT)), figures(opened(tmp_path, TEXT, min_count=10**6))
    for name in ("gzip", "bz2", "xz"):
        assert whole[name] == pytest.approx(spelled[name], rel=1e-3)
    assert spelled["gram"] == pytest.approx(whole["gram"], rel=0.05)


def test_the_work_on_long_texts_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "MAX_VAL", 1000)
    monkeypatch.setattr(baselines, "MAX_NGRAM", 5000)
    learnt = []
    monkeypatch.setattr(baselines, "best_ngram", lambda train, val, size: (
        learnt.append((len(train), len(val))), best_ngram(train, val, size))[1])  # fmt: skip
    *_, last = baselines.measure_baselines(opened(tmp_path, TEXT))
    assert learnt == [(5000, 999)]
    assert "its last 5,000 ids" in last.how
    assert "the first 1,000 characters of the validation text" in last.how


def test_baselines_of_blocks_learn_from_the_whole_text(tmp_path, monkeypatch):
    """Of a text whose second half is of another kind, which alone would be learnt from."""
    monkeypatch.setattr("smallm.training.data.split.MIN_BLOCK_BYTES", 1000)
    text = TEXT[:20_000] + TEXT[:20_000].swapcase()
    whole = figures(opened(tmp_path, text, split="blocks"))
    monkeypatch.setattr(baselines, "PASSAGE", 500)
    monkeypatch.setattr(baselines, "MAX_VAL", 2000)
    monkeypatch.setattr(baselines, "MAX_NGRAM", 18_000)
    corpus = opened(tmp_path, text, split="blocks", cache=tmp_path / "other")
    *_, last = baselines.measure_baselines(corpus)
    assert last.bits_per_char == pytest.approx(whole["gram"], rel=0.2)
    assert "trained on a sample of 18,000 ids; on a sample of 2,000 characters of the validation text" in last.how
    monkeypatch.setattr(baselines, "_passages", lambda ids, limit, mixed=False: ids[-limit:] if mixed else ids[:limit])
    assert baselines._measure(corpus)[-1].bits_per_char > 1.5 * whole["gram"]


@pytest.mark.parametrize("text", ["abcd", "aaaa", "a" * 100, "é€中🎉", "\n\n\n\n\n"])
def test_tiny_texts_have_baselines_too(tmp_path, text):
    for bits in figures(opened(tmp_path, text, val_fraction=0.5)).values():
        assert 0 <= bits < 200


def test_results_are_cached(tmp_path, monkeypatch):
    corpus = opened(tmp_path, TEXT)
    assert baselines.cached_baselines(corpus) is None
    first = baselines.measure_baselines(corpus)
    monkeypatch.setattr(baselines, "_measure", lambda corpus: pytest.fail("measured again"))
    assert baselines.measure_baselines(corpus) == baselines.cached_baselines(corpus) == first
    corpus.cache_file("baselines").write_text("{", encoding="utf-8")
    assert baselines.cached_baselines(corpus) is None


def test_a_run_with_a_time_budget_reserves_time_for_them(tmp_path):
    corpus = opened(tmp_path, TEXT)
    needed = baselines.seconds_needed(corpus)
    assert baselines.seconds_to_reserve(corpus, 26 * needed) == needed
    assert baselines.seconds_to_reserve(corpus, 24 * needed) == 0  # too much of the budget
    assert baselines.seconds_to_reserve(corpus, 0) == 0  # no time budget
    baselines.measure_baselines(corpus)
    assert baselines.seconds_to_reserve(corpus, 26 * needed) == 0


# -- beside a model


@pytest.mark.parametrize(("bits", "words"), [
    (1.6, "the model beats all of them, and needs 20 % less than 5-gram"),
    (1.989, "the model beats all of them, and needs 1 % less than 5-gram"),
    (2.001, "the model beats bz2 and gzip, and is about as good as 5-gram"),
    (2.2, "the model beats gzip, is about as good as bz2, and needs 10 % more than 5-gram"),
    (2.5, "the model beats gzip, and needs 25 % more than 5-gram and 14 % more than bz2"),
    (3.98, "the model needs 99 % more than 5-gram, 81 % more than bz2 and 33 % more than gzip"),
    (4.0, "the model needs 2.0 times the bits of 5-gram, 82 % more than bz2 and 33 % more than gzip"),
    (11.74, "the model needs 5.9 times the bits of 5-gram, 5.3 times the bits of bz2 and 3.9 times the bits of gzip"),
    (24.0, "the model needs 12 times the bits of 5-gram, 11 times the bits of bz2 and 8.0 times the bits of gzip"),
])  # fmt: skip
def test_the_model_is_compared_with_each_baseline(bits, words):
    line = comparison_line([Baseline("gzip", 3.0, ""), Baseline("bz2", 2.2, ""), Baseline("5-gram", 2.0, "")], bits)
    assert line == f"bits per character: the model {bits:.3f}; gzip 3.000, bz2 2.200, 5-gram 2.000: {words}"


def test_a_baseline_of_a_text_of_one_letter_needs_no_bits():
    assert comparison_line([Baseline("xz", 0.0, "")], 0.1).endswith(": the model needs more than xz")


def test_a_run_writes_them_at_its_end(tiny_run):
    model, *others = json.loads((tiny_run / "baselines.json").read_text(encoding="utf-8"))
    assert model["name"] == "model"
    evaluations = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text("utf-8").splitlines()]
    best = min(values["bits_per_character"] for values in evaluations if values["kind"] == "eval")
    assert model["bits_per_char"] == pytest.approx(best)
    assert [one["name"] for one in others][:3] == ["gzip", "bz2", "xz"]
    assert all(0 < one["bits_per_char"] < 8 for one in others)


def test_baselines_of_earlier_runs_are_read(tmp_path):
    (tmp_path / "yardsticks.json").write_text('[{"name": "gzip", "bits_per_char": 2.5, "how": ""}]')
    assert read_baselines(tmp_path) == [Baseline("gzip", 2.5, "")]
    write_baselines(tmp_path, [], 1.5, 100)
    assert [one.name for one in read_baselines(tmp_path)] == ["model"]


@pytest.mark.parametrize("needed", [0.1, 1000.0])
@pytest.mark.slow
def test_a_run_with_a_time_budget_measures_them_if_they_take_little_of_it(tmp_path, monkeypatch, capsys, needed):
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(baselines, "seconds_needed", lambda corpus: needed)
    monkeypatch.setattr("smallm.training.budget.configure.HANDFUL", 0)  # a busy machine has no time left
    (tmp_path / "a.txt").write_text(TEXT[:20_000], encoding="utf-8")
    shape = ["--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "32", "--model.block_size", "32"]
    run = tmp_path / "run"
    assert main(["--data", str(tmp_path / "a.txt"), "--minutes", "0.2", "--out", str(run), *shape]) == 0
    out = capsys.readouterr().out
    assert ("gzip" in out) == (needed < 1) or "--check" in out
    assert (run / "baselines.json").exists() == (needed < 1)


def test_ctrl_c_skips_them_in_a_finished_run(tmp_path, monkeypatch, capsys):
    def interrupted(corpus, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("smallm.training.callbacks.affordable_baselines", interrupted)
    (tmp_path / "a.txt").write_text(TEXT[:20_000], encoding="utf-8")
    shape = ["--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "32", "--model.block_size", "32"]
    run = tmp_path / "run"
    assert main(["--data", str(tmp_path / "a.txt"), "--train.max_steps", "2", "--out", str(run), *shape]) == 0
    assert "--check" in capsys.readouterr().out
    assert (run / "report.html").exists()


def test_a_model_that_copies_is_reported(tmp_path, monkeypatch, capsys):
    """A training text that repeats one line, and a validation part without that line."""
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    line = "the quick brown fox jumps over the lazy dog while seven wizards look on.\n"
    text = line * 400 + "".join(rng.choices("abcdefgh", k=4000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    settings = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 32, "model.block_size": 32,
                "train.max_steps": 150, "train.eval_every": 150, "sample.temperature": 0.0}  # fmt: skip
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert main(["--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), *argv]) == 0
    out = capsys.readouterr().out
    assert "the samples repeat the training text" in out
    assert f" train --data {quoted(str(tmp_path / 'a.txt'))} --minutes 5\n" in out
    assert "In bits per character, the model needs " in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_order_is_chosen_without_the_validation_part():
    """A high order would suit the validation part alone, but the training part suits a low one."""
    noise = np.random.default_rng(2).integers(0, 8, 30_000)
    tail = np.array([0, 1, 2, 3, 4, 5, 6, 7] * 100)
    assert best_ngram(noise, tail, 256)[0] == best_ngram(noise, noise[:800], 256)[0]
    assert ngram.HELD_OUT < 0.5
