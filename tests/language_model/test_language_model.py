"""LanguageModel: what the exported model writes and scores is what PyTorch would, and every mistake is one line."""

import itertools
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from toys import GREEDY, TOY_VOCABULARY, random_model, save_onnx, torch_text

from smallm import GenerationConfig, LanguageModel, UserError
from smallm.generation import sequence_state
from smallm.generation.rng import Rng
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Binding
from smallm.language_model import MODEL_FILE
from smallm.model_file.sampling import Sampling
from smallm.training.checkpoint.format import STATE_FILE, load_model
from smallm.training.checkpoint.manager import best_checkpoint

BLOCK_SIZE = 32  # of the trained model
DEFAULTS = Sampling(temperature=0.8, top_k=40)
SEEDS = ["a", "the café", "Zoë", "", "\n", "中🎉", "10 € " * 40, "\x00\ufffd"]


@pytest.fixture(scope="module")
def lm(exported) -> LanguageModel:
    return LanguageModel.load(exported)


@pytest.fixture(scope="module")
def model(tiny_run):
    """The same model in PyTorch."""
    return load_model(best_checkpoint(tiny_run))


@pytest.fixture(scope="module")
def val_text(tiny_run) -> str:
    return (tiny_run / "validation.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory) -> Path:
    """A model of random weights and 16 ids of context, which writes bytes that are no text, too."""
    return save_onnx(random_model(), tmp_path_factory.mktemp("toy") / "toy.onnx")


@pytest.fixture(scope="module")
def toy(toy_file) -> LanguageModel:
    return LanguageModel.load(toy_file)


def nats_by_pytorch(model, vocabulary, text):
    """Nats of each id, in windows of block_size side by side."""
    ids, size = torch.from_numpy(vocabulary.encode(text).astype(np.int64)), model.config.block_size
    nats = [math.nan]
    for start in range(0, len(ids) - 1, size):
        window = ids[start : start + size + 1]
        with torch.no_grad():
            logits = model(window[None, :-1])[0].double()
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    return nats


# -- the text is PyTorch's


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_text_equals_pytorch(lm, model, seed):
    text = lm.generate(seed, 200, temperature=0)
    assert text[len(seed) :] == torch_text(model, lm.vocabulary, seed or "\n", 200)[len(seed or "\n") :]
    assert text.startswith(seed)
    assert len(text) == len(seed) + 200


@pytest.mark.parametrize("overflow", ["crop", "shift"])
@pytest.mark.parametrize("seed", ["a", "Zoë remembers ten euros (10 €) and much more than fits"])
def test_sampled_text_equals_pytorch(lm, model, seed, overflow):
    length = 3 * BLOCK_SIZE + 5
    found = lm.generate(seed, length, rng_seed=5, overflow=overflow)
    assert found == torch_text(model, lm.vocabulary, seed, length, DEFAULTS, Rng(5), overflow)


@pytest.mark.parametrize("overflow", ["crop", "shift"])
@pytest.mark.parametrize("config", [{}, {"block_size": 1}, {"block_size": 2}, {"block_size": 5, "n_kv_head": 1}])
def test_random_weights_and_windows_of_any_size(tmp_path, config, overflow):
    model = random_model(**config)
    lm = LanguageModel.load(save_onnx(model, tmp_path / "model.onnx"))
    options = Sampling(temperature=1.1, top_k=30, top_p=0.9, min_p=0.01)
    text = lm.generate("é€", 60, temperature=1.1, top_k=30, top_p=0.9, min_p=0.01, rng_seed=3, overflow=overflow)
    assert text == torch_text(model, TOY_VOCABULARY, "é€", 60, options, Rng(3), overflow)


@pytest.mark.parametrize("config", [{"window": 1}, {"window": 16}, {"window": 5, "n_kv_head": 1, "rope_theta": 30.0}])
def test_a_model_with_a_window_generates_without_limit(tmp_path, config):
    model = random_model(**config)
    lm = LanguageModel.load(save_onnx(model, tmp_path / "model.onnx"))
    assert lm.metadata.window == config["window"]
    options = Sampling(temperature=1.1)
    text = lm.generate("é€", 150, temperature=1.1, top_k=0, top_p=1, min_p=0, rng_seed=3)
    assert text == torch_text(model, TOY_VOCABULARY, "é€", 150, options, Rng(3), "slide")


def test_crop_sees_exactly_the_last_block_size_ids(lm, model, val_text, monkeypatch):
    """The logits of every step over more than three windows."""
    seed, seen = val_text[: 3 * BLOCK_SIZE], []

    def spy(logits, u, sampling):
        seen.append(logits.copy())
        return ids[len(seen) - 1]

    ids = lm.vocabulary.encode(val_text[: 6 * BLOCK_SIZE]).tolist()
    past = len(lm.vocabulary.encode(seed))
    history, ids = ids[:past], ids[past:]
    monkeypatch.setattr(sequence_state, "sample", spy)
    list(itertools.islice(lm.stream(seed, len(ids), overflow="crop"), len(ids)))
    assert len(seen) == len(ids) >= 3 * BLOCK_SIZE
    for logits, id in zip(seen, ids, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([history])[:, -BLOCK_SIZE:])[0, -1].numpy()
        assert np.abs(logits - expected).max() < 1e-4
        history.append(id)


def test_shift_keeps_the_newest_half(lm, model, val_text, monkeypatch):
    ids, seen = lm.vocabulary.encode(val_text[: 5 * BLOCK_SIZE]).tolist(), []

    def spy(logits, u, sampling):
        seen.append(logits.copy())
        return ids[len(seen)]

    monkeypatch.setattr(sequence_state, "sample", spy)
    list(LanguageModel(lm._session).stream(val_text[0], 4 * BLOCK_SIZE, overflow="shift"))  # id by id
    start = 0
    for t, logits in enumerate(seen):  # logits after ids[0..t]
        if t + 1 - start > BLOCK_SIZE:
            start = t + 1 - BLOCK_SIZE // 2
        with torch.no_grad():
            expected = model(torch.tensor([ids[start : t + 1]]))[0, -1].numpy()
        assert np.abs(logits - expected).max() < 1e-4
    assert start > 2 * BLOCK_SIZE


def test_cached_logits_equal_uncached_ones(lm, val_text):
    ids = lm.vocabulary.encode(val_text[:BLOCK_SIZE])[:BLOCK_SIZE].astype(np.int64)
    whole = lm._session.logits(ids[None])[0]
    decoder = KVCache(lm._session)
    for t, id in enumerate(ids):
        assert np.abs(decoder.prefill(np.array([id])) - whole[t]).max() < 1e-5
    decoder.reset()
    assert np.abs(decoder.prefill(ids[:7]) - whole[6]).max() < 1e-5
    assert np.abs(decoder.prefill(ids[7:]) - whole[-1]).max() < 1e-5


# -- perplexity and scores


def test_perplexity_is_the_number_of_the_trainer(lm, tiny_run, val_text):
    state = json.loads((best_checkpoint(tiny_run) / STATE_FILE).read_text(encoding="utf-8"))
    found = lm.perplexity(val_text)
    assert found.nats_per_char == pytest.approx(state["val_loss"], abs=1e-4)
    assert found.characters == len(val_text) - 1
    assert found.bits_per_char == pytest.approx(found.nats_per_char / math.log(2))
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_char))


@settings(max_examples=30)
@given(st.text(alphabet="abñ€中🎉\n\x00", min_size=2, max_size=90), st.lists(st.integers(0, 90), max_size=6), st.data())
def test_perplexity_and_score_of_any_text_are_pytorchs(toy, text, cuts, data):
    model = random_model()
    nats = nats_by_pytorch(model, TOY_VOCABULARY, text)
    lengths = [len(TOY_VOCABULARY.encode(character)) for character in text]
    starts = np.cumsum(lengths) - lengths
    expected = np.add.reduceat(nats, starts)
    expected[0] = math.nan
    score = toy.score(text)
    assert score.shape == (len(text),)
    assert score.dtype == np.float64
    np.testing.assert_allclose(score, expected, atol=1e-4)
    whole = toy.perplexity(text)
    assert whole.nats_per_char == pytest.approx(score[1:].mean(), abs=1e-6)
    edges = sorted(cut % (len(text) + 1) for cut in cuts)
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *edges, len(text)])]
    assert toy.perplexity(pieces).nats_per_char == pytest.approx(whole.nats_per_char, abs=1e-6)
    assert toy.perplexity(iter(pieces)).characters == len(text) - 1


def test_score_of_a_long_text_whose_windows_begin_alike(toy):
    for text in ("a" * 100, "ab" * 50, "中" * 30, "a" * 17, "a" * 18):  # 16 ids of context
        score = toy.score(text)
        assert np.isnan(score).tolist() == [True] + [False] * (len(text) - 1)
        assert score[1:].mean() == pytest.approx(toy.perplexity(text).nats_per_char, abs=1e-6)


@pytest.mark.parametrize("text", ["", "a", "é", "🎉", "中"])
def test_score_without_anything_to_predict(toy, text):
    score = toy.score(text)
    assert score.shape == (len(text),)
    assert np.isnan(score).all()


@pytest.mark.parametrize("stride", [1, 7, BLOCK_SIZE // 2, BLOCK_SIZE - 1, BLOCK_SIZE, None])
def test_stride_gives_each_id_a_longer_context(lm, model, val_text, stride):
    text, step, nats = val_text[:150], stride or BLOCK_SIZE, 0.0
    ids = torch.from_numpy(lm.vocabulary.encode(text).astype(np.int64))
    for t in range(1, len(ids)):
        start = max(0, -(-(t - BLOCK_SIZE) // step)) * step  # of the first window that reaches t
        with torch.no_grad():
            nats -= model(ids[None, start:t])[0, -1].double().log_softmax(-1)[ids[t]].item()
    for given_text in (text, [text[:70], text[70:]]):
        found = lm.perplexity(given_text, stride=stride)
        assert found.characters == 149
        assert found.nats_per_char == pytest.approx(nats / 149, abs=1e-5)


@pytest.mark.parametrize("stride", [0, -1, BLOCK_SIZE + 1])
def test_stride_out_of_range(lm, stride):
    with pytest.raises(UserError, match=f"stride = {stride} is out of range; it must be from 1 to 32"):
        lm.perplexity("some text", stride=stride)


@pytest.mark.parametrize("text", ["", "a", "🎉", [], ["", ""], ["a", ""]])
def test_perplexity_needs_two_characters(lm, text):
    with pytest.raises(UserError, match="perplexity needs at least 2"):
        lm.perplexity(text)


# -- the next character


def test_next_characters_are_sorted_and_their_probabilities_add_up(lm, model):
    text = "the small caf"
    found = lm.next_characters(text, 800)
    probabilities = [p for _, p in found]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len({c for c, _ in found}) == len(found)
    assert all(len(c) == 1 for c, _ in found)
    assert lm.next_characters(text, 3) == found[:3]
    assert len(lm.next_characters(text)) == 10
    assert lm.next_characters(text, 0) == []
    # All ids that are a character, and some of those that begin one; the others would not decode to text.
    with torch.no_grad():
        by_id = model(torch.from_numpy(lm.vocabulary.encode(text).astype(np.int64))[None])[0, -1].softmax(-1).numpy()
    whole = [i for i in range(lm.vocab_size) if lm.vocabulary.decode([i]) != "\ufffd"]
    assert by_id[whole].sum() < sum(probabilities) < 1 - by_id[0x80:0xC0].sum()


@pytest.mark.parametrize("seed", ["the small caf", "", "Zo", "10 € " * 40])
def test_next_characters_agree_with_pytorch(lm, model, seed):
    ids = lm.vocabulary.encode(seed or "\n").astype(np.int64)[-BLOCK_SIZE:]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None])[0, -1].double().softmax(-1).numpy()
    spelled = [(lm.vocabulary.encode(c).tolist(), p) for c, p in lm.next_characters(seed, 20)]
    found = {ids[0]: p for ids, p in spelled if len(ids) == 1}
    assert found == pytest.approx({id: expected[id] for id in found}, rel=1e-3)
    assert max(found, key=found.get) == expected.argmax()


def test_next_characters_agree_with_score(toy):
    for character, probability in toy.next_characters("ab", 300):
        assert math.exp(-toy.score("ab" + character)[-1]) == pytest.approx(probability, rel=1e-3)


def test_a_next_character_of_several_bytes(toy):
    """Its probability is the product over its ids, each predicted after the ones before."""
    model, context = random_model(), TOY_VOCABULARY.encode("ab").tolist()
    found = dict(toy.next_characters("ab", 1500))
    for character in "ß¼ü":
        path, expected = TOY_VOCABULARY.encode(character).tolist(), 1.0
        assert len(path) == 2
        for i, id in enumerate(path):
            with torch.no_grad():
                logits = model(torch.tensor([context + path[:i]]))[0, -1].double()
            expected *= logits.softmax(-1)[id].item()
        assert found.get(character, 0.0) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert any(len(TOY_VOCABULARY.encode(c)) > 1 for c in found)


def test_the_replacement_character_is_a_character_too(tmp_path):
    vocabulary = type(TOY_VOCABULARY).from_characters("\ufffd")
    model = random_model(vocabulary)
    lm = LanguageModel.load(save_onnx(model, tmp_path / "model.onnx", vocabulary))
    assert "\ufffd" in dict(lm.next_characters("a", 300))
    assert np.isfinite(lm.score("a\ufffdb\ufffd")[1:]).all()


# -- streaming, length, stops


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stream_is_the_text_in_whole_characters(lm, toy, seed):
    for each in (lm, toy):  # the toy writes bytes that are no UTF-8
        pieces = list(each.stream(seed, 90, rng_seed=3))
        assert all(pieces)
        assert seed + "".join(pieces) == each.generate(seed, 90, rng_seed=3)
        assert len("".join(pieces)) == 90
        "".join(pieces).encode()  # no surrogates


@pytest.mark.parametrize("length", [0, 1, 2, 31, 32, 33, 100])
def test_max_length_counts_new_characters(lm, toy, length):
    for each in (lm, toy):
        text = each.generate("Zoë", length, rng_seed=1)
        assert text.startswith("Zoë")
        assert len(text) == 3 + length
        assert each.generate("Zoë", length + 7, rng_seed=1).startswith(text)


def test_a_stream_computes_no_more_than_it_is_asked_for(lm, monkeypatch):
    draws, uniform = [], Rng.uniform
    monkeypatch.setattr(Rng, "uniform", lambda rng: (draws.append(rng), uniform(rng))[1])
    stream = lm.stream("a", 50, allowed="abc")  # each a piece of its own
    assert draws == []
    next(stream)
    assert len(draws) == 1
    assert len(list(stream)) == 49


def cut_at(text, stops):
    """The beginning of text before the first stop to be complete, the longest of several that end together."""
    for end in range(1, len(text) + 1):
        cuts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if cuts:
            return text[: min(cuts)]
    return text


@pytest.mark.parametrize(
    "stops",
    ["\n", ["\n"], (), "", ["", "\n"], ["e", "the"], ["the", "e"], ["re", "r", "rem"], [".\n"], ["é", "ë"],
     ["not there"],     ["ember"], ["member", "ember"], ["mem", "ember"], ["x" * 1_000_000], ["\n" * 1_000_000, "."]],
)  # fmt: skip
def test_stops(lm, stops):
    for seed, rng_seed in (("the ", 1), ("Zoë rem", 2), ("\n", 3)):
        full = lm.generate(seed, 60, rng_seed=rng_seed)[len(seed) :]
        listed = [stops] if isinstance(stops, str) else list(stops)
        expected = cut_at(full, listed)
        assert "".join(lm.stream(seed, 60, rng_seed=rng_seed, stop=stops)) == expected
        assert not any(stop in expected for stop in listed if stop)


def test_some_stop_strings_were_found(lm):
    text = lm.generate("the ", 60, rng_seed=1)
    assert lm.generate("the ", 60, rng_seed=1, stop=text[20:23]) == text[: text.index(text[20:23], 4)]


def test_a_stop_string_holds_back_no_more_than_necessary(lm):
    pieces = list(lm.stream("the ", 100, rng_seed=1, stop=["zzzzzz"]))
    assert max(map(len, pieces)) <= 3


# -- randomness and defaults


def test_the_seed_decides_the_text(lm):
    text = lm.generate("the ", 80, rng_seed=7)
    assert lm.generate("the ", 80, rng_seed=7) == text
    assert lm.generate("the ", 80, rng_seed=7, stream_number=0) == text
    others = [lm.generate("the ", 80, rng_seed=7, stream_number=n) for n in (1, 2)]
    others += [lm.generate("the ", 80, rng_seed=n) for n in (0, 8, 4294967295)]
    others += [lm.generate("the ", 80) for _ in range(2)]
    assert len({text, *others}) == 8


def test_defaults_are_those_of_the_export(lm, toy):
    assert lm.metadata.sampling == {"temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.0}
    assert lm.generate("a", 60, rng_seed=2) == lm.generate("a", 60, rng_seed=2, temperature=0.8, top_k=40)
    assert lm.generate("a", 60, rng_seed=2) != lm.generate("a", 60, rng_seed=2, temperature=1.2, top_k=0)
    own = {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "min_p": 0.01}
    assert toy.metadata.sampling == own
    assert toy.generate("a", 60, rng_seed=2) == toy.generate("a", 60, rng_seed=2, **own)
    assert toy.generate("a", 60, rng_seed=2) != toy.generate("a", 60, rng_seed=2, **own | {"top_k": 0, "top_p": 1})
    nothing = dict.fromkeys(own)
    assert toy.generate("a", 60, rng_seed=2) == toy.generate("a", 60, rng_seed=2, **nothing)


def test_properties_of_the_model(lm):
    assert (lm.vocab_size, lm.block_size) == (lm.vocabulary.size, 32)
    assert lm.metadata.training["text"] == "owls.txt"


def test_a_very_long_seed_costs_little(lm):
    seed = "an old owl paints ten euros (10 €).\n" * 2800
    begin = time.process_time()
    assert len(lm.generate(seed, 5)) == len(seed) + 5
    assert time.process_time() - begin < 2


def test_models_and_streams_do_not_disturb_each_other(lm, toy, exported):
    other = LanguageModel.load(exported, threads=2)
    alone = [list(each.stream(seed, 70, rng_seed=4)) for each in (lm, other, toy) for seed in ("a", "Zoë ")]
    streams = [each.stream(seed, 70, rng_seed=4) for each in (lm, other, toy) for seed in ("a", "Zoë ")]
    together = [[] for _ in streams]
    for turn in itertools.zip_longest(*streams):
        lm.perplexity("between the others")
        for pieces, piece in zip(together, turn, strict=True):
            pieces += [piece] if piece is not None else []
    assert together == alone
    assert alone[0] == alone[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": -1}, "max_length = -1 is out of range; it must be 0 or more"),
        ({"temperature": -0.1}, "temperature = -0.1 is out of range"),
        ({"top_k": -1}, "top_k = -1 is out of range"),
        ({"top_p": 0}, "top_p = 0 is out of range"),
        ({"min_p": 2}, "min_p = 2 is out of range"),
        ({"rng_seed": -1}, "rng_seed = -1 is out of range"),
        ({"rng_seed": 1 << 32}, "rng_seed = 4294967296 is out of range"),
        ({"stream_number": -1}, "stream_number = -1 is out of range"),
        ({"overflow": "wrap"}, "overflow = 'wrap' is unknown"),
        ({"overflow": "slide"}, "overflow = 'slide' needs a model that was trained with model.window"),
        ({"seed": "a\ud800b"}, "lone surrogate"),
        ({"max_length": 2.5}, "max_length = 2.5 is not a whole number; it must be 0 or more"),
        ({"min_length": -1}, "min_length = -1 is out of range; it must be 0 or more"),
        ({"min_length": 9, "max_length": 8}, "min_length = 9 is more than max_length = 8"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0 is out of range; it must be from 0.01 to 100"),
        ({"repetition_penalty": math.nan}, "repetition_penalty = nan is out of range"),
        ({"repetition_penalty": 101.0}, "repetition_penalty = 101.0 is out of range"),
        ({"repetition_penalty": "x"}, "repetition_penalty = 'x' is not a number; it must be from 0.01 to 100"),
        ({"repetition_window": -1}, "repetition_window = -1 is out of range; it must be 0 or more"),
        ({"repetition_window": 33}, "repetition_window = 33 is out of range"),
        ({"allowed": ""}, "allowed and banned leave no character"),
        ({"allowed": "ab", "banned": "ab"}, "allowed and banned leave no character"),
        ({"banned": "\udcff"}, "banned = .* has a lone surrogate"),
        ({"stop": "a\ud800"}, "stop = .* has a lone surrogate, which no text can hold; leave it out"),
        ({"stop": ["b", "\udcff"]}, "stop = .* has a lone surrogate"),
    ],
)
def test_options_out_of_range(lm, options, message):
    for method in (lm.generate, lm.stream):  # a stream complains before its first piece
        with pytest.raises(UserError, match=message):
            method(**options)


def test_extreme_valid_options(lm):
    """temperature next to nothing is the likeliest; next to infinity, any of the k likeliest; top_k = 0 is all ids."""
    greedy = lm.generate("the ", 40, temperature=0)
    assert lm.generate("the ", 40, temperature=1e-9, rng_seed=1) == greedy
    assert lm.generate("the ", 40, top_k=1, rng_seed=1) == greedy
    assert lm.generate("the ", 40, top_p=1e-9, rng_seed=1) == greedy
    assert len(lm.generate("the ", 40, temperature=1e9, rng_seed=1)) == 44
    everything = lm.generate("the ", 40, top_k=0, rng_seed=1)
    assert everything == lm.generate("the ", 40, top_k=10**6, rng_seed=1)


def test_a_million_characters_of_seed(lm):
    seed = "an old owl paints ten euros (10 €).\n" * 28_000
    assert len(seed) > 1_000_000
    text = lm.generate(seed, 5, rng_seed=1)
    assert text[len(seed) :] == lm.generate(seed[-100:], 5, rng_seed=1)[100:]
    assert len(lm.generate_many([seed] * 3, 5)[2]) == len(seed) + 5
    assert lm.next_characters(seed, 3) == lm.next_characters(seed[-100:], 3)


# -- opening


def test_paths_that_can_be_opened(exported, tiny_run, tmp_path, monkeypatch):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with pytest.raises(UserError, match=f"^{run} is not exported yet; run: python -m smallm export {run}$"):
        LanguageModel.load(run)
    shutil.copytree(exported, run / "export")
    text = LanguageModel.load(exported).generate("a", 20, temperature=0)
    monkeypatch.chdir(run)
    shutil.copy(exported / MODEL_FILE, tmp_path / "größer.bin")
    for path in (run, str(run), run / "export", run / "export" / MODEL_FILE, ".", "export", tmp_path / "größer.bin"):
        assert LanguageModel.load(path).generate("a", 20, temperature=0) == text


def foreign_model(path):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "foreign", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated or not an ONNX model"),
        (b"\x00\x01\x02\x03" * 999, "is truncated or not an ONNX model"),
        (b"PK\x03\x04 a zip file", "is truncated or not an ONNX model"),
        ("text of another kind\n".encode("utf-16"), "is truncated or not an ONNX model"),
        (foreign_model, "is not a smallm model; write one with: python -m smallm export"),
        (lambda path: path.mkdir(), "there is no model in"),
        (lambda path: None, "there is no model in"),
    ],
)
def test_paths_that_cannot_be_opened(tmp_path, content, message):
    path = tmp_path / "model.bin"
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        LanguageModel.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99, 0.999])
def test_a_truncated_file(toy_file, tmp_path, share):
    data, path = toy_file.read_bytes(), tmp_path / "model.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"^[^\n]*(truncated or not an ONNX model|is not a smallm model|broken)[^\n]*$"):
        LanguageModel.load(path)


def test_a_path_too_long_to_exist():
    with pytest.raises(UserError, match=r"^cannot read x+: File name too long$"):
        LanguageModel.load("x" * 5000)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_out_of_range(exported, threads):
    with pytest.raises(UserError, match=f"threads = {threads} is out of range; it must be from 1 to 1024"):
        LanguageModel.load(exported, threads=threads)


def with_metadata(source, target, key, value):
    proto = onnx.load(source)
    kept = {p.key: p.value for p in proto.metadata_props} | {f"smallm.{key}": value}
    helper.set_model_props(proto, {k: v for k, v in kept.items() if v is not None})
    onnx.save(proto, target)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # what no host could use
        ("block_size", "0"), ("block_size", '"16"'), ("block_size", "{broken"), ("block_size", "16.0"),
        ("n_layer", "0"), ("n_layer", "999999999"), ("n_head", "-4"), ("n_head", "3"), ("n_kv_head", "null"),
        ("n_embd", '"x"'), ("head_dim", "true"), ("vocab_size", "261"), ("vocab_size", "[]"), ("vocab_size", None),
        ("tokens", '"c3"'), ("tokens", '"zz"'), ("tokens", "7"), ("tokens", '""'), ("tokens", "["),
        ("start_text", '""'), ("start_text", "null"), ("start_text", r'"\ud800"'),
        ("start_text", '"' + "x" * 5000 + '"'),
        ("sampling", "[]"), ("sampling", '{"temperature": -1}'), ("sampling", '{"top_k": "many"}'),
        ("sampling", '{"top_p": null}'), ("training", '"none"'), ("precision", "32"),
        ("format_version", "2"), ("format_version", None), ("format_version", "[" * 100_000),
        # what the graph does not bear out
        ("n_layer", "1"), ("n_layer", "3"), ("n_kv_head", "4"), ("head_dim", "32"),
    ],
)  # fmt: skip
def test_broken_metadata(toy_file, tmp_path, key, value):
    path = tmp_path / "model.onnx"
    with_metadata(toy_file, path, key, value)
    with pytest.raises(UserError, match=r"metadata|format version") as caught:
        LanguageModel.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_failures_in_the_middle_of_the_work(toy_file, tmp_path):
    """A longer context than the graph has positions for: ONNX Runtime notices when it runs."""
    path = tmp_path / "model.onnx"
    with_metadata(toy_file, path, "block_size", "100")
    lm = LanguageModel.load(path)
    message = r"model.onnx is broken, export the model again; ONNX Runtime says: .*cos_cache"
    for call in (lambda: lm.generate("a", 50), lambda: lm.perplexity("ab" * 60), lambda: lm.next_characters("ab" * 60)):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.ln_f.weight[0] = math.inf
    lm = LanguageModel.load(save_onnx(model, tmp_path / "model.onnx"))
    for call in (lm.generate, lm.next_characters, lm.perplexity, lm.score):
        with pytest.raises(UserError, match="logits are not finite"):
            call("a text")


def test_greedy_sampling_of_the_toy_model():
    assert GREEDY.temperature == 0


# -- arguments, interrupts, closing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.generate(5), "seed = 5 is not a string; pass the text to continue"),
        (lambda lm: lm.stream("a", topk=3), "there is no option topk; did you mean top_k?"),
        (lambda lm: lm.generate("a", "b"), "max_length = 'b' is not a whole number"),
        (lambda lm: lm.generate_many("abc"), "seeds = 'abc' is a single string; pass a list of seed texts"),
        (lambda lm: lm.generate(None), "seed = None is not a string; pass the text to continue"),
        (lambda lm: lm.generate(b"x"), "seed = b'x' is not a string; pass the text to continue"),
        (lambda lm: lm.generate("a", stop=None), "stop = None is not a string; it must be a string or a list of"),
        (lambda lm: lm.generate("a", stop=[1]), "stop = 1 is not a string; it must be a string or a list of strings"),
        (lambda lm: lm.generate("a", max_lenght=5), "there is no option max_lenght; did you mean max_length?"),
        (lambda lm: lm.generate("a", max_length="5"), "max_length = '5' is not a whole number; it must be 0 or more"),
        (lambda lm: lm.generate_many(5), "seeds = 5 is not a list; pass a list of seed texts"),
        (lambda lm: lm.next_characters("a", "2"), "n = '2' is not a whole number; it must be 0 or more"),
        (lambda lm: lm.next_characters("a", -3), "n = -3 is out of range; it must be 0 or more"),
        (lambda lm: lm.next_characters(None), "text = None is not a string; pass a text"),
        (lambda lm: lm.score(b"ab"), "text = b'ab' is not a string; pass a text"),
        (lambda lm: lm.perplexity("abc", stride="3"), "stride = '3' is not a whole number; it must be from 1 to 32"),
        (lambda lm: lm.perplexity(None), "text = None is not a text; pass a string, or an iterable of strings"),
        (lambda lm: lm.perplexity(b"abc"), "text = b'abc' is not a text; pass a string, or an iterable of strings"),
        (lambda lm: lm.perplexity([5]), "a piece of the text = 5 is not a string; pass a text"),
        (lambda lm: LanguageModel.load(5), "path = 5 is not a path; pass a string or a Path"),
        (lambda lm: lm.generate("a", config={}), "config = {} is not a GenerationConfig"),
        (lambda lm: lm.logits(np.array([[9999]])), "ids must be from 0 to "),
        (lambda lm: lm.logits(np.array([[-1]])), "ids must be from 0 to "),
        (lambda lm: lm.logits(np.zeros((0, 3), int)), "ids of shape (0, 3) and type int64 do not fit"),
        (lambda lm: lm.logits(np.array([1, 2])), "ids of shape (2,) and type int64 do not fit"),
        (lambda lm: lm.logits(np.zeros((1, BLOCK_SIZE + 1), int)), "ids of shape (1, 33) and type int64 do not fit"),
        (lambda lm: lm.logits(np.array([[1.5]])), "ids of shape (1, 1) and type float64 do not fit"),
    ],
)
def test_wrong_arguments(lm, call, message):
    with pytest.raises(UserError) as caught:
        call(lm)
    assert str(caught.value).startswith(message)


def test_options_come_from_a_config_or_from_the_call(lm):
    config = GenerationConfig(max_length=30, temperature=1.3, rng_seed=3)
    assert lm.generate("a", config=config) == lm.generate("a", 30, temperature=1.3, rng_seed=3)
    assert lm.generate("a", 9, config=config, rng_seed=4) == lm.generate("a", 9, temperature=1.3, rng_seed=4)
    assert lm.generate_many(["a"], config=config) == [lm.generate("a", config=config)]


@pytest.mark.parametrize("overflow", ["crop", "shift"])
@pytest.mark.parametrize("table", [True, False])
def test_an_interrupt_while_onnx_runtime_computes(exported, monkeypatch, overflow, table):
    """The text continues as if nothing had happened."""
    lm = LanguageModel.load(exported)
    if not table:
        lm = LanguageModel(lm._session)
    options = {"max_length": 100, "rng_seed": 5, "overflow": overflow}
    expected, run, passes = "".join(lm.stream("a", **options)), Binding.run, 0

    def interrupted(self):
        nonlocal passes
        passes -= 1
        run(self)
        if passes == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Binding, "run", interrupted)
    for interrupted_pass in range(1, 25, 2):
        passes = interrupted_pass
        stream, text = lm.stream("a", **options), ""
        try:
            for piece in stream:
                text += piece
        except KeyboardInterrupt:
            assert text in expected
        assert text + "".join(stream) == expected


def test_an_interrupt_between_the_pass_and_the_choice(toy, monkeypatch):
    expected = list(toy.stream("a", 50, rng_seed=1))
    stream = toy.stream("a", 50, rng_seed=1)
    begun = [next(stream), next(stream)]
    with monkeypatch.context() as patch:
        patch.setattr(sequence_state.SequenceState, "choose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                next(stream)
    assert begun + list(stream) == expected


def test_a_model_is_closed_at_the_end_of_its_block(exported):
    with LanguageModel.load(exported) as lm:
        assert len(lm.generate("a", 5)) == 6
    lm.close()
    for call in (lm.generate, lm.score, lm.next_characters):
        with pytest.raises(UserError, match="was closed; load the model again"):
            call("some text")
