"""The kits for JavaScript, in Node and in Chromium: they write the texts that Python writes, and say what is wrong.

What they need is installed by `npm ci --ignore-scripts --prefix tests/js`, and Chromium by the system's packages.
SMALLM_SHOTS names a folder for screenshots of the page.
"""

import http.server
import json
import math
import os
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from toys import random_model, save_onnx

from smallm import LanguageModel, UserError
from smallm.export import kit_js
from smallm.export.kit_js import KITS, write_node, write_web
from smallm.manifest import Manifest
from smallm.runtime import MODEL_FILE

JS = Path(__file__).parent / "js"
PACKAGES = JS / "node_modules"
MODULE = KITS / "js" / "smallm.js"
GOLDEN_FILE = Path(__file__).parent / "golden.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
HOSTS = ("onnxruntime-node", "onnxruntime-web/wasm")
CHARACTERS = 300  # of each golden text here; benchmarks go on to 2,000
INSTALL = "npm ci --ignore-scripts --prefix tests/js"
OPTIONS = [
    {"overflow": "shift"},
    {"stop": ["moon", "\n"], "min_length": 5},
    {"stop": "e", "min_length": 40},
    {"stop": ["the long", "the moon."], "temperature": 0.0},
    {"repetition_penalty": 1.5, "repetition_window": 10},
    {"repetition_penalty": 0.7, "temperature": 1.2},
    {"min_p": 0.2, "top_k": 7, "top_p": 0.9},
    {"stream_number": 4294967295},
    {"top_p": 1e-9},
    {"temperature": 1e-300},
    {"temperature": 2.0},
]


def names_in_js(options: dict) -> dict:
    """top_k -> topK, and so on."""
    return {name.split("_")[0] + name.title().replace("_", "")[len(name.split("_")[0]) :]: value
            for name, value in options.items()}  # fmt: skip


def golden_calls(characters: int) -> list[list]:
    """What to ask of a host for the golden texts."""
    cases = [dict(case) for case in GOLDEN["texts"]]
    return [["generate", case.pop("seed"), names_in_js(case) | {"maxLength": characters}] for case in cases]


def golden_texts(model: LanguageModel, characters: int) -> list[str]:
    return [model.generate(**case, max_length=characters) for case in GOLDEN["texts"]]


@pytest.fixture(scope="session")
def node() -> str:
    """Node, where everything that the tests need is installed."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")
    if not (PACKAGES / ".package-lock.json").is_file():
        pytest.skip(f"the packages for these tests are not installed; run: {INSTALL}")
    return found


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed; on Debian: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def model(exported) -> LanguageModel:
    """The trained one, as Python sees it."""
    return LanguageModel.load(exported)


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> Path:
    """A model of random weights: most of what it writes is not UTF-8."""
    return save_onnx(random_model(), tmp_path_factory.mktemp("noise") / MODEL_FILE)


@pytest.fixture
def ask(node, tmp_path):
    """Puts calls to a model in Node and returns the answers."""

    def ask(host: str, path: Path, calls: list[list]) -> list[dict]:
        file = tmp_path / "calls.json"
        file.write_text(json.dumps(calls))
        return json.loads(run_node(node, JS / "node_host.mjs", MODULE, host, path, file))

    return ask


def run_node(node: str, *arguments, cwd: Path = JS) -> str:
    done = subprocess.run([node, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def values(answers: list[dict]) -> list:
    assert not [answer["error"] for answer in answers if "error" in answer]
    return [answer["value"] for answer in answers]


# -- the numbers, in Node


def test_golden_draws_and_ids(node):
    found = json.loads(run_node(node, JS / "golden.mjs", MODULE, GOLDEN_FILE))
    assert found["draws"] == [[(x >> 8) / 16777216 for x in case["x"]] for case in GOLDEN["draws"]]
    assert found["ids"] == [case["ids"] for case in GOLDEN["ids"]]


@pytest.mark.parametrize("host", HOSTS)
def test_golden_texts(ask, exported, model, host):
    assert values(ask(host, exported / MODEL_FILE, golden_calls(CHARACTERS))) == golden_texts(model, CHARACTERS)


@pytest.mark.parametrize("host", HOSTS)
def test_every_option(ask, exported, model, host):
    asked = [["generate", "the small café ", {"rngSeed": 3, "maxLength": 90} | names_in_js(o)] for o in OPTIONS]
    expected = [model.generate("the small café ", 90, rng_seed=3, **o) for o in OPTIONS]
    assert values(ask(host, exported / MODEL_FILE, asked)) == expected
    assert len(set(expected)) > len(expected) / 2


def test_bytes_that_are_not_utf8_become_the_same_characters(ask, noise):
    """Byte for byte: the two decoders have to agree on what one invalid sequence is."""
    python = LanguageModel.load(noise)
    seeds = range(12)
    asked = [["generate", "é", {"rngSeed": s, "maxLength": 150, "temperature": 2.0}] for s in seeds]
    expected = [python.generate("é", 150, rng_seed=s, temperature=2.0) for s in seeds]
    assert values(ask("onnxruntime-node", noise, asked)) == expected
    assert sum(text.count("\ufffd") for text in expected) > 500


def test_a_byte_order_mark_is_text(ask, noise):
    asked = [["score", "\ufeffa\ufeff"], ["generate", "\ufeff", {"maxLength": 1, "rngSeed": 1}]]
    nats, text = values(ask("onnxruntime-node", noise, asked))
    assert len(nats) == 3
    assert text == LanguageModel.load(noise).generate("\ufeff", 1, rng_seed=1)


@pytest.mark.parametrize("host", HOSTS)
def test_scores_and_next_characters(ask, exported, model, host):
    texts = ["", "a", "the moon", "Zoë paints ten euros (10 €).\n" * 5, "日本語 😀", "x" * 33, "x" * 65]
    asked = [["score", text] for text in texts] + [["nextCharacters", text, 5] for text in texts]
    found = values(ask(host, exported / MODEL_FILE, asked))
    for text, nats in zip(texts, found[: len(texts)], strict=True):
        expected = [None if math.isnan(x) else pytest.approx(x, abs=1e-4) for x in model.score(text)]
        assert nats == expected
    for text, likeliest in zip(texts, found[len(texts) :], strict=True):
        expected = [{"character": c, "probability": pytest.approx(p, abs=1e-5)} for c, p in model.next_characters(text, 5)]
        assert likeliest == expected


def test_pieces_are_characters_with_their_surprise(ask, exported, model):
    """Also those held back for a stop, which come later and at once."""
    options = {"stop": "the long winter forever", "rng_seed": 2, "temperature": 1.0}
    (pieces,) = values(ask("onnxruntime-node", exported / MODEL_FILE, [["pieces", "Zoë ", names_in_js(options)]]))
    stream = model.stream("Zoë ", 500, logprobs=True, **options)
    expected = [(piece, list(stream.logprobs)) for piece in stream]
    assert "".join(piece["text"] for piece in pieces) == "".join(text for text, _ in expected)
    assert all(len(piece["text"]) == 1 for piece in pieces)
    surprises = [piece["surprise"] for piece in pieces]
    assert surprises == pytest.approx([-p for _, logprobs in expected for p in logprobs], abs=1e-4)
    assert sum(surprises) / len(surprises) > 0.1


def test_texts_side_by_side_and_left_early(ask, exported, model):
    asked = [["together", *([f"{i} ", {"rngSeed": i, "maxLength": 50}] for i in range(4))]]
    asked += [["first", 7, "a", {"maxLength": 2**53 - 1, "rngSeed": 1}], ["facts"]]
    together, first, facts = values(ask("onnxruntime-node", exported / MODEL_FILE, asked))
    assert together == [model.generate(f"{i} ", 50, rng_seed=i) for i in range(4)]
    assert first == model.generate("a", 7, rng_seed=1)[1:]
    sizes = {"blockSize": model.block_size, "vocabSize": model.vocab_size}
    assert facts == sizes | {"metadata": json.loads((exported / "smallm.json").read_text())}


def test_a_seed_longer_than_the_context(ask, exported, model):
    seeds = ["😀" * 40 + "é", "a" * 31 + "😀" * 31 + "b", "ab" * 5000]
    asked = [["generate", seed, {"maxLength": 20, "rngSeed": 1}] for seed in seeds]
    expected = [model.generate(seed, 20, rng_seed=1) for seed in seeds]
    assert values(ask("onnxruntime-node", exported / MODEL_FILE, asked)) == expected


# -- mistakes, in Node

MISTAKES = {
    "lone surrogate in a seed": (["generate", "a\ud800"], "the seed text has a lone surrogate (U+D800)"),
    "lone surrogate in a text": (["score", "\udc00"], "the text has a lone surrogate (U+DC00)"),
    "lone surrogate in a stop": (["generate", "a", {"stop": ["b", "\ud800"]}], "stop has a lone surrogate"),
    "no string": (["generate", 5], "the seed text is no string"),
    "huge length": (["generate", "a", {"maxLength": 1e300}], "maxLength = 1e+300 is out of range"),
    "negative length": (["generate", "a", {"maxLength": -1}], "maxLength = -1 is out of range"),
    "length of half a character": (["generate", "a", {"maxLength": 0.5}], "maxLength = 0.5 is out of range"),
    "least length above the most": (["generate", "a", {"minLength": 9, "maxLength": 8}], "minLength = 9 is more than"),
    "temperature": (["generate", "a", {"temperature": -0.1}], "temperature = -0.1 is out of range"),
    "temperature in words": (["generate", "a", {"temperature": "hot"}], "temperature = hot is out of range"),
    "topK": (["generate", "a", {"topK": 2.5}], "topK = 2.5 is out of range"),
    "topP": (["generate", "a", {"topP": 0}], "topP = 0 is out of range"),
    "minP": (["generate", "a", {"minP": 1.1}], "minP = 1.1 is out of range"),
    "repetitionPenalty": (["generate", "a", {"repetitionPenalty": 0}], "repetitionPenalty = 0 is out of range"),
    "repetitionWindow": (["generate", "a", {"repetitionWindow": 33}], "it must be from 0 to block_size = 32"),
    "rngSeed": (["generate", "a", {"rngSeed": 2**32}], "rngSeed = 4294967296 is out of range"),
    "streamNumber": (["generate", "a", {"streamNumber": -1}], "streamNumber = -1 is out of range"),
    "overflow": (["generate", "a", {"overflow": "wrap"}], "overflow = wrap is out of range"),
    "unknown option": (["generate", "a", {"top_k": 3}], "option top_k is unknown; there are maxLength, temperature"),
    "number of next characters": (["nextCharacters", "a", -1], "n = -1 is out of range"),
}


@pytest.mark.parametrize("host", HOSTS)
def test_mistakes(ask, exported, host):
    answers = ask(host, exported / MODEL_FILE, [call for call, _ in MISTAKES.values()])
    for (_, message), answer in zip(MISTAKES.values(), answers, strict=True):
        assert_sentence(answer, message)


def assert_sentence(answer: dict, part: str) -> None:
    error = answer.get("error", f"no error but {str(answer.get('value'))[:80]}")
    assert error.startswith("Error: ")
    assert part in error
    assert "\n" not in error


def test_empty_seed_and_no_length(ask, exported, model):
    asked = [["generate", "", {"maxLength": 20, "rngSeed": 1}], ["generate", "a", {"maxLength": 0}], ["score", ""]]
    assert values(ask("onnxruntime-node", exported / MODEL_FILE, asked)) == [model.generate("", 20, rng_seed=1), "a", []]
