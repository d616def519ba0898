"""One text that is left, gone back to and branched; many texts in one batch: the same texts as one by one."""

from itertools import islice

import numpy as np
import pytest
from toys import TOY_VOCABULARY, random_model, save_onnx, torch_text

from smallm import LanguageModel, UserError
from smallm.export.draft_table import write_draft_table
from smallm.generation import batch
from smallm.generation.rng import Rng
from smallm.inference.kv_cache import KVCache
from smallm.model_file.sampling import Sampling

SEEDS = ["a", "", "é€" * 9, "the owl", "中🎉", "b" * 40]


@pytest.fixture(scope="module", params=["id by id", "drafts"])
def with_drafts(request) -> bool:
    """Whether the models have a draft table; all tests must give the same results with and without it."""
    return request.param == "drafts"


def load(path, with_drafts: bool) -> LanguageModel:
    """The model, and beside it a table from its own text."""
    if with_drafts:
        write_draft_table(path, "")
    return LanguageModel.load(path)


@pytest.fixture(scope="module")
def lm(tmp_path_factory, with_drafts) -> LanguageModel:
    """Random weights, 16 ids of context: these tests go past it."""
    return load(save_onnx(random_model(), tmp_path_factory.mktemp("toy") / "toy.onnx"), with_drafts)


@pytest.fixture(scope="module")
def models(lm, tmp_path_factory, with_drafts) -> dict[str, LanguageModel]:
    """Overflow -> a model that supports it; "slide" needs a window."""
    path = tmp_path_factory.mktemp("window") / "toy.onnx"
    return {"crop": lm, "shift": lm, "slide": load(save_onnx(random_model(window=6), path), with_drafts)}


@pytest.fixture
def prefilled(monkeypatch) -> list[int]:
    """Number of ids of each call of `KVCache.prefill`."""
    lengths, prefill = [], KVCache.prefill

    def spy(self, ids, stream=0):
        lengths.append(len(ids))
        return prefill(self, ids, stream)

    monkeypatch.setattr(KVCache, "prefill", spy)
    return lengths


# -- one text


@pytest.mark.parametrize("overflow", ["crop", "shift", "slide"])
def test_a_stream_that_is_left_and_continued(models, overflow):
    lm = models[overflow]
    whole = list(lm.stream("é", 60, rng_seed=3, overflow=overflow))
    stream, found = lm.stream("é", 60, rng_seed=3, overflow=overflow), []
    for piece in stream:
        found.append(piece)
        if len(found) == 7:
            break
    lm.generate("in between", 30)
    found += stream
    assert found == whole
    assert list(stream) == []


@pytest.mark.parametrize("overflow", ["crop", "shift", "slide"])
@pytest.mark.parametrize("taken", [0, 1, 5, 15, 16, 17, 40])
def test_branches(models, overflow, taken):
    lm = models[overflow]
    options = {"max_length": 90, "overflow": overflow, "stop": "zz", "temperature": 1.2}
    stream = lm.stream("Zoë", rng_seed=3, **options)
    begun = "".join(islice(stream, taken))
    same, other, again = stream.branch(), stream.branch(rng_seed=8), stream.branch(8, 1)
    texts = ["".join(each) for each in (again, same, stream, other)]
    assert begun + texts[1] == begun + texts[2] == "".join(lm.stream("Zoë", rng_seed=3, **options))
    assert len({texts[0], texts[1], texts[3]}) == 3
    if not taken:
        assert texts[3] == "".join(lm.stream("Zoë", rng_seed=8, **options))
        assert texts[0] == "".join(lm.stream("Zoë", rng_seed=8, stream_number=1, **options))


def test_branches_read_the_prompt_once(lm, prefilled):
    prompt = lm.stream("a prompt", 5)
    texts = ["".join(prompt.branch(rng_seed)) for rng_seed in range(4)]
    assert prefilled.count(len("a prompt")) == 1
    assert texts == [lm.generate("a prompt", 5, rng_seed=n)[8:] for n in range(4)]


def test_a_branch_of_a_finished_stream(lm):
    stream = lm.stream("a", 5)
    assert len("".join(stream)) == 5
    assert list(stream.branch(rng_seed=1)) == []
    with pytest.raises(UserError, match="rng_seed = -1 is out of range"):
        stream.branch(rng_seed=-1)


def test_log_probabilities_are_those_of_score(lm):
    """Within the context: log-probabilities are at temperature 1 for every temperature and filter."""
    options = {"temperature": 0.5, "top_k": 5, "allowed": "abcñ€", "repetition_penalty": 1.3, "rng_seed": 4}
    stream, text, logprobs = lm.stream("x", 5, logprobs=True, **options), "", []
    for piece in stream:
        assert len(stream.logprobs) == len(piece)
        text += piece
        logprobs += stream.logprobs
    assert set(text) <= set("abcñ€")
    by_own_ids = lm.score("x" + text)[1:]
    plain = [i for i, c in enumerate(text) if len(TOY_VOCABULARY.encode(c)) == 1]
    assert [logprobs[i] for i in plain[:1]] == pytest.approx([-by_own_ids[i] for i in plain[:1]], abs=1e-4)
    assert lm.stream("x", 5).logprobs == []


@pytest.mark.parametrize(
    "options", [{"allowed": "ab\n"}, {"banned": "abcé\ufffd"}, {"allowed": "中🎉", "banned": "中"}]
)
def test_only_allowed_characters(lm, options):
    for temperature in (0, 1.5):
        new = lm.generate("é", 80, temperature=temperature, rng_seed=1, **options)[1:]
        assert len(new) == 80
        assert not set(new) & set(options.get("banned", ""))
        assert set(new) <= set(options.get("allowed", new))


def test_a_penalty_of_one_and_nothing_banned_change_nothing(lm):
    plain = lm.generate("a", 60, rng_seed=2)
    assert lm.generate("a", 60, rng_seed=2, repetition_penalty=1.0, banned="", allowed=None, min_length=60) == plain
    assert lm.generate("a", 60, rng_seed=2, repetition_penalty=1.5) != plain
    assert lm.generate("a", 60, rng_seed=2, repetition_penalty=1.5, repetition_window=2) != plain


# -- many texts


@pytest.mark.parametrize("overflow", ["crop", "shift", "slide"])
@pytest.mark.parametrize("most", [1, 2, 4, 64])
def test_many_texts_equal_texts_one_by_one(models, monkeypatch, overflow, most):
    lm = models[overflow]
    monkeypatch.setattr(batch, "MAX_STREAMS", most)
    options = {"rng_seed": 5, "overflow": overflow, "stop": ["e", "zz", "\x07"], "max_length": 50}
    expected = [lm.generate(seed, stream_number=n, **options) for n, seed in enumerate(SEEDS)]
    assert lm.generate_many(SEEDS, **options) == expected
    assert len({len(text) for text in expected}) > 3  # some met a stop
    pieces = list(lm.stream_many(SEEDS, **options))
    assert all(p.text or p.last for p in pieces)
    for number, seed in enumerate(SEEDS):
        mine = [piece for piece in pieces if piece.number == number]
        assert seed + "".join(piece.text for piece in mine) == expected[number]
        assert [piece.last for piece in mine] == [False] * (len(mine) - 1) + [True]


@pytest.mark.parametrize("overflow", ["crop", "shift", "slide"])
def test_many_texts_equal_pytorchs(models, overflow):
    lm = models[overflow]
    options = Sampling(temperature=1.1, top_k=30, top_p=0.9, min_p=0.01)
    found = lm.generate_many(["é€", "abc"], 40, temperature=1.1, top_k=30, top_p=0.9, min_p=0.01, rng_seed=3,
                             overflow=overflow)  # fmt: skip
    model = random_model(window=6 if overflow == "slide" else 0)
    assert found == [torch_text(model, TOY_VOCABULARY, seed, 40, options, Rng(3, n), overflow)
                     for n, seed in enumerate(["é€", "abc"])]  # fmt: skip


@pytest.mark.parametrize("options", [{"stop": [chr(c) for c in range(256)]}, {"stop": "e"}, {"max_length": 0}, {}])
def test_one_text_in_a_batch_ends_once(lm, options):
    for rng_seed in range(5):
        options |= {"rng_seed": rng_seed, "logprobs": True}
        pieces = list(lm.stream_many(["a"], **{"max_length": 12} | options))
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all(len(piece.logprobs) == len(piece.text) and piece.number == 0 for piece in pieces)
        alone = lm.stream("a", **{"max_length": 12} | options)
        assert "".join(piece.text for piece in pieces) == "".join(alone)


def test_texts_of_one_seed_read_it_once(lm, prefilled):
    seeds = ["a seed", "another", "a seed", "a seed"]
    texts = lm.generate_many(seeds, 8, rng_seed=1)
    assert prefilled == [6, 7]
    assert texts == [lm.generate(seed, 8, rng_seed=1, stream_number=n) for n, seed in enumerate(seeds)]


def test_finished_texts_are_not_computed(lm, monkeypatch):
    widths, step = [], KVCache.decode_batch
    monkeypatch.setattr(KVCache, "decode_batch", lambda self, ids: (widths.append(len(ids)), step(self, ids))[1])
    texts = lm.generate_many(["a"] * 16, 14, stop=[chr(c) for c in range(0, 128, 5)], rng_seed=5)
    drawn = sum(min(len(text), 14) for text in texts)  # the characters of each, and the stop
    assert len({len(text) for text in texts}) > 4
    assert widths == sorted(widths, reverse=True)
    assert drawn - 16 <= sum(widths) <= drawn / batch.MIN_USED + 16


def test_more_texts_than_fit_in_a_batch(lm, monkeypatch):
    monkeypatch.setattr(batch, "MAX_STREAMS", 4)
    widths, step = [], KVCache.decode_batch
    monkeypatch.setattr(KVCache, "decode_batch", lambda self, ids: (widths.append(len(ids)), step(self, ids))[1])
    seeds = [chr(97 + n) for n in range(10)]
    assert lm.generate_many(seeds, 9, rng_seed=1) == [
        lm.generate(seed, 9, rng_seed=1, stream_number=n) for n, seed in enumerate(seeds)
    ]
    assert max(widths) == 4


def test_few_texts_are_computed_with_drafts_one_after_the_other(lm):
    """Below MIN_STREAMS; without drafts, a batch is faster from two texts up."""
    suits = [[n for n in range(8) if batch.suits_batch(lm.metadata, n, drafts)] for drafts in (5, 0)]
    assert suits == [[4, 5, 6, 7], [2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_seeds_may_come_from_an_iterator(models, n):
    lm, seeds = models["slide"], ["a", "é", "", "zz", "b", "c"][:n]  # with drafts
    expected = [lm.generate(seed, 20, rng_seed=1, stream_number=i) for i, seed in enumerate(seeds)]
    assert lm.generate_many((seed for seed in seeds), max_length=20, rng_seed=1) == expected
    texts = dict(enumerate(seeds))
    for chunk in lm.stream_many(iter(seeds), 20, rng_seed=1):
        texts[chunk.number] += chunk.text
    assert list(texts.values()) == expected


def test_memory_of_a_batch_is_bounded(lm, monkeypatch):
    assert batch.max_streams(lm.metadata) == batch.MAX_STREAMS
    monkeypatch.setattr(batch, "MAX_CACHE_BYTES", 3 * 8 * 2 * 2 * 16 * 16)
    assert batch.max_streams(lm.metadata) == 3
    monkeypatch.setattr(batch, "MAX_CACHE_BYTES", 1)
    assert batch.max_streams(lm.metadata) == 1


def test_no_texts_and_texts_of_no_length(lm):
    assert lm.generate_many([]) == []
    assert lm.generate_many(["a", "é"], 0) == ["a", "é"]
    found = sorted((p.number, p.text, p.last) for p in lm.stream_many(["a"] * 70, 0))
    assert found == [(n, "", True) for n in range(70)]


def test_mistakes_are_raised_before_the_first_chunk(lm):
    with pytest.raises(UserError, match="lone surrogate"):
        lm.stream_many(["a", "\ud800"])
    with pytest.raises(UserError, match="top_p = 0 is out of range"):
        lm.generate_many(["a"], top_p=0)
    with pytest.raises(UserError, match="stream_number = 4294967296 is out of range"):
        lm.generate_many(["a", "b"], rng_seed=1, stream_number=4294967295)


def test_log_probabilities_in_a_batch(lm):
    found = {n: [] for n in range(3)}
    for piece in lm.stream_many(["a", "bc", "d"], 30, logprobs=True, rng_seed=1):
        assert len(piece.logprobs) == len(piece.text)
        found[piece.number] += piece.logprobs
    for number, seed in enumerate(["a", "bc", "d"]):
        stream, alone = lm.stream(seed, 30, logprobs=True, rng_seed=1, stream_number=number), []
        for _ in stream:
            alone += stream.logprobs
        assert found[number] == pytest.approx(alone, abs=1e-4)
    assert all(p.logprobs == [] for p in lm.stream_many(["a"], 3))
    assert np.isfinite([x for values in found.values() for x in values]).all()
