"""The JavaScript kits in Node and in Chromium generate the texts of the C kit and of Python, and report mistakes.

What they need is installed by `npm ci --ignore-scripts --prefix tests/js`, and Chromium by the system's packages.
SMALLM_SHOTS names a folder for screenshots of the page.
"""

import ctypes
import http.server
import json
import math
import os
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from toys import LATER_VOCABULARY, manifest_of, random_model, save_onnx

from smallm import LanguageModel, UserError
from smallm.cli import main as cli
from smallm.export.kits import PAGE_FILES, SOURCES, write_sources
from smallm.export.precision import PRECISIONS, write_quantised
from smallm.generation.config import GenerationOptions
from smallm.language_model import MODEL_FILE

JS = Path(__file__).parents[1] / "js"
PACKAGES = JS / "node_modules"
MODULE = SOURCES / "js" / "smallm.js"
GOLDEN_FILE = Path(__file__).parents[1] / "golden.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
CHARACTERS = 2000  # of each golden text
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
    {"allowed": "the moonéz"},
    {"banned": "aeiou\ufffd", "temperature": 1.5},
    {"allowed": "abé", "banned": "b", "repetition_penalty": 1.5},
]
ALLOWED = [
    {"allowed": "abé€𝄞\ufffd"}, {"allowed": "𝄞€"}, {"banned": "aeiouéñ\ufffd"}, {"allowed": "ab é", "banned": "bé"},
    {"banned": "\ufffd", "repetition_penalty": 1.5}, {"allowed": "0123456789", "temperature": 0.0},
]  # fmt: skip


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

    def ask(path: Path, calls: list[list], **options: str) -> list[dict]:
        file = tmp_path / "calls.json"
        file.write_text(json.dumps(calls))
        return json.loads(run_node(node, JS / "node_host.mjs", MODULE, path, file, json.dumps(options)))

    return ask


def run_node(node: str, *arguments, cwd: Path = JS) -> str:
    done = subprocess.run([node, *map(str, arguments)], cwd=cwd, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode()  # as text, \r would become \n


def values(answers: list[dict]) -> list:
    assert not [answer["error"] for answer in answers if "error" in answer]
    return [answer["value"] for answer in answers]


# -- the module

COMPILER = "14.0.6"
"""The version of clang that built the smallm.wasm of the repository."""


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory) -> Path:
    if not (shutil.which("clang") and shutil.which("wasm-ld")):
        pytest.skip("no clang or no lld; on Debian: apt-get install clang lld")
    out = tmp_path_factory.mktemp("wasm") / "smallm.wasm"
    subprocess.run(["sh", SOURCES / "wasm" / "build.sh", out], check=True, capture_output=True)
    return out


def test_the_module_is_small():
    assert MODULE.with_suffix(".wasm").stat().st_size <= 100_000


@pytest.mark.slow
def test_the_same_compiler_builds_the_same_module(rebuilt):
    if f"clang version {COMPILER}" not in subprocess.run(["clang", "--version"], capture_output=True, text=True).stdout:
        pytest.skip(f"the module in the repository is from clang {COMPILER}")
    assert rebuilt.read_bytes() == MODULE.with_suffix(".wasm").read_bytes(), "run: sh smallm/embed/wasm/build.sh"


# -- the numbers, in Node


def test_golden_draws_and_ids(node, rebuilt, tmp_path):
    """The functions inside smallm.c, as the compiler of this machine translates them."""
    out = tmp_path / "golden.wasm"
    subprocess.run(["sh", SOURCES / "wasm" / "build.sh", out, JS / "golden.c"], check=True, capture_output=True)
    found = json.loads(run_node(node, JS / "golden.mjs", out, GOLDEN_FILE))
    assert found["draws"] == [case["x"] for case in GOLDEN["draws"]]
    assert found["ids"] == [case["ids"] for case in GOLDEN["ids"]]
    assert found["allowed"] == [case["ids"] for case in GOLDEN["allowed"]]


def test_golden_texts(ask, exported, model):
    assert values(ask(exported / MODEL_FILE, golden_calls(CHARACTERS))) == golden_texts(model, CHARACTERS)


@pytest.fixture(scope="session")
def c_program(tmp_path_factory):
    """The C kit: model, seed, options and number of characters -> text."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("c") / "generate"
    sources = [SOURCES / "c" / name for name in ("smallm.c", "main.c")]
    subprocess.run(["cc", "-O2", *sources, "-lm", "-o", program], check=True)

    def generate(path: Path, seed: str, options: dict, characters: int) -> str:
        flags = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        argv = [program, path, *flags, "--seed-file", "-", "--max-length", str(characters)]
        return subprocess.run(argv, input=seed.encode(), capture_output=True, check=True).stdout.decode()

    return generate


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("module", ["committed", "rebuilt"])
def test_golden_texts_are_those_of_c(request, ask, c_program, tiny_run, tmp_path, precision, module):
    """To the byte, also from a module that the compiler of this machine builds."""
    argv = [str(tiny_run), "--precision", precision, "--allow-loss", "--out", str(tmp_path / "export")]
    assert cli.run(cli.export, argv) == 0
    path = tmp_path / "export" / MODEL_FILE
    expected = []
    for overflow, characters in (("shift", 2000), ("crop", 100)):
        for case in GOLDEN["texts"]:
            options = {name: value for name, value in case.items() if name != "seed"} | {"overflow": overflow}
            expected.append(c_program(path, case["seed"], options, characters))
    asked = [[name, seed, options | {"overflow": "shift"}] for name, seed, options in golden_calls(2000)]
    asked += [[name, seed, options | {"overflow": "crop"}] for name, seed, options in golden_calls(100)]
    built = {"wasm": str(request.getfixturevalue("rebuilt"))} if module == "rebuilt" else {}
    assert [text + "\n" for text in values(ask(path, asked, **built))] == expected


@pytest.mark.slow
def test_scores_and_probabilities_have_the_bits_of_c(ask, exported, tmp_path):
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    library = tmp_path / "smallm.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", SOURCES / "c" / "smallm.c", "-lm", "-o", library], check=True)
    c = ctypes.CDLL(str(library))
    model, context, count = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    assert c.smallm_open(str(exported / MODEL_FILE).encode(), None, ctypes.byref(model)) == 0
    assert c.smallm_context_new(model, ctypes.byref(context)) == 0
    text = "Zoë paints ten euros (10 €).\n" * 50
    data, nats, found = text.encode(), (ctypes.c_double * len(text))(), (Character * 40)()
    size = ctypes.c_size_t(len(data))
    assert c.smallm_score(context, data, size, nats, ctypes.c_size_t(len(text)), ctypes.byref(count)) == 0
    assert c.smallm_next_characters(context, data, size, found, ctypes.c_size_t(40), ctypes.byref(count)) == 0
    scores, likeliest = values(ask(exported / MODEL_FILE, [["score", text], ["nextCharacters", text, 40]]))
    assert scores[1:] == list(nats)[1:]
    assert [(x["character"], x["probability"]) for x in likeliest] == [
        (x.text.decode(), x.probability) for x in found[: count.value]
    ]


class Character(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char * 5), ("probability", ctypes.c_double)]


def test_every_option(ask, exported, model):
    asked = [["generate", "the small café ", {"rngSeed": 3, "maxLength": 90} | names_in_js(o)] for o in OPTIONS]
    expected = [model.generate("the small café ", 90, rng_seed=3, **o) for o in OPTIONS]
    assert values(ask(exported / MODEL_FILE, asked)) == expected
    assert len(set(expected)) > len(expected) / 2


def test_texts_slide_as_in_python(ask, tmp_path):
    """2,000 characters are many slides; it is the default of a model with a window."""
    for window, block_size, length in ((9, 32, 2000), (1, 8, 300), (2, 9, 300), (16, 16, 300)):
        path = save_onnx(random_model(window=window, block_size=block_size), tmp_path / MODEL_FILE)
        python, seed = LanguageModel.load(path), "aé中𝄞"
        asked = [["generate", seed, {"maxLength": length, "rngSeed": 5}]]
        asked += [["generate", seed, {"maxLength": 100, "rngSeed": 5, "overflow": o}] for o in ("crop", "shift")]
        expected = [python.generate(seed, length, rng_seed=5)]
        expected += [python.generate(seed, 100, rng_seed=5, overflow=overflow) for overflow in ("crop", "shift")]
        assert values(ask(path, asked)) == expected


def test_bytes_that_are_not_utf8_become_the_same_characters(ask, noise):
    """Byte for byte: the two decoders have to agree on what one invalid sequence is."""
    python = LanguageModel.load(noise)
    seeds = range(12)
    asked = [["generate", "é", {"rngSeed": s, "maxLength": 150, "temperature": 2.0}] for s in seeds]
    expected = [python.generate("é", 150, rng_seed=s, temperature=2.0) for s in seeds]
    assert values(ask(noise, asked)) == expected
    assert sum(text.count("\ufffd") for text in expected) > 500


def test_allowed_characters_are_those_of_python(ask, noise):
    """Random weights, so that every allowed id occurs."""
    python, usual = LanguageModel.load(noise), {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    options = [usual | {"rng_seed": 5} | each for each in ALLOWED]
    asked = [["generate", "aé", names_in_js(each) | {"maxLength": 300}] for each in options]
    texts = values(ask(noise, asked))
    assert texts == [python.generate("aé", 300, **each) for each in options]
    for text, each in zip(texts, ALLOWED, strict=True):
        assert set(text[2:]) <= set(each.get("allowed", text)) - set(each.get("banned", ""))


def test_ids_added_by_fine_tuning(ask, tmp_path):
    path = save_onnx(random_model(LATER_VOCABULARY), tmp_path / MODEL_FILE, LATER_VOCABULARY)
    seed = "aé中𝄞ñ€è₭"
    expected = LanguageModel.load(path).generate(seed, 120, rng_seed=5)
    assert values(ask(path, [["generate", seed, {"rngSeed": 5, "maxLength": 120}]])) == [expected]


def test_a_byte_order_mark_is_text(ask, noise):
    asked = [["score", "\ufeffa\ufeff"], ["generate", "\ufeff", {"maxLength": 1, "rngSeed": 1}]]
    nats, text = values(ask(noise, asked))
    assert len(nats) == 3
    assert text == LanguageModel.load(noise).generate("\ufeff", 1, rng_seed=1)


def test_scores_and_next_characters(ask, exported, model):
    texts = ["", "a", "the moon", "Zoë paints ten euros (10 €).\n" * 5, "日本語 😀", "x" * 33, "x" * 65]
    asked = [["score", text] for text in texts] + [["nextCharacters", text, 5] for text in texts]
    found = values(ask(exported / MODEL_FILE, asked))
    for text, nats in zip(texts, found[: len(texts)], strict=True):
        expected = [None if math.isnan(x) else pytest.approx(x, abs=1e-4) for x in model.score(text)]
        assert nats == expected
    for text, likeliest in zip(texts, found[len(texts) :], strict=True):
        expected = [
            {"character": c, "probability": pytest.approx(p, abs=1e-5)} for c, p in model.next_characters(text, 5)
        ]
        assert likeliest == expected


def test_chunks_are_characters_with_their_surprisal(ask, exported, model):
    """Also those held back for a stop, which come later and at once."""
    options = {"stop": "the long winter forever", "rng_seed": 2, "temperature": 1.0}
    (pieces,) = values(ask(exported / MODEL_FILE, [["pieces", "Zoë ", names_in_js(options)]]))
    stream = model.stream("Zoë ", 500, logprobs=True, **options)
    expected = [(piece, list(stream.logprobs)) for piece in stream]
    assert "".join(piece["text"] for piece in pieces) == "".join(text for text, _ in expected)
    assert all(len(piece["text"]) == 1 for piece in pieces)
    surprisals = [piece["surprisal"] for piece in pieces]
    assert surprisals == pytest.approx([-p for _, logprobs in expected for p in logprobs], abs=1e-4)
    assert sum(surprisals) / len(surprisals) > 0.1


def test_the_surprisal_of_an_id_that_max_length_cuts(ask, noise):
    """An id can complete U+FFFD and a character; the last one that belongs to the text has the surprisal of the id."""
    asked = [["pieces", "é", {"rngSeed": 4, "maxLength": length, "temperature": 2.0}] for length in range(1, 40)]
    python = LanguageModel.load(noise)
    for length, pieces in zip(range(1, 40), values(ask(noise, asked)), strict=True):
        stream = python.stream("é", length, True, rng_seed=4, temperature=2.0)
        expected = [-logprob for _ in stream for logprob in stream.logprobs]
        assert [piece["surprisal"] for piece in pieces] == pytest.approx(expected, abs=1e-3)


def test_parallel_texts_that_end_early(ask, exported, model):
    asked = [["together", *([f"{i} ", {"rngSeed": i, "maxLength": 50}] for i in range(4))]]
    asked += [["first", 7, "a", {"maxLength": 2**53 - 1, "rngSeed": 1}], ["facts"]]
    together, first, facts = values(ask(exported / MODEL_FILE, asked))
    assert together == [model.generate(f"{i} ", 50, rng_seed=i) for i in range(4)]
    assert first == model.generate("a", 7, rng_seed=1)[1:]
    sizes = {"blockSize": model.block_size, "vocabSize": model.vocab_size}
    assert facts == sizes | {"metadata": json.loads((exported / "smallm.json").read_text())}


def test_a_seed_longer_than_the_context(ask, exported, model):
    seeds = ["😀" * 40 + "é", "a" * 31 + "😀" * 31 + "b", "ab" * 5000]
    asked = [["generate", seed, {"maxLength": 20, "rngSeed": 1}] for seed in seeds]
    expected = [model.generate(seed, 20, rng_seed=1) for seed in seeds]
    assert values(ask(exported / MODEL_FILE, asked)) == expected


def test_many_texts_together(ask, exported, model):
    """More than are computed at the same time; some end early."""
    seeds = [f"{i} moon" for i in range(35)] + ["", "é" * 50]
    options = {"rngSeed": 4, "maxLength": 60, "stop": "o", "minLength": 20, "streamNumber": 5}
    asked = [["generateMany", seeds, options], ["generateMany", [], options]]
    asked += [["generate", seed, options | {"streamNumber": 5 + i}] for i, seed in enumerate(seeds)]
    together, nothing, *alone = values(ask(exported / MODEL_FILE, asked))
    assert nothing == []
    assert together == alone
    assert len({len(text) for text in together}) > 5


def test_branches(ask, exported, model):
    """A branch with a seed of its own differs; one without continues with the same text."""
    options = {"rngSeed": 4, "maxLength": 80, "stop": "moonlight"}
    branches = [{}, {"rngSeed": 4}, {"rngSeed": 4, "streamNumber": 1}]
    asked = [["branches", 0, "the ", options], ["branches", 20, "the ", options, *branches]]
    (again,), (same, own, other, stream) = values(ask(exported / MODEL_FILE, asked))
    assert same == stream == again[20:]
    assert len({stream, own, other}) == 3
    python = model.stream("the ", 80, rng_seed=4, stop="moonlight")
    text = ""
    while len(text) < 20:
        text += next(python)
    assert text[20:] + "".join(python.branch(4, 1)) == other


def test_perplexity(ask, exported, model):
    text = "Zoë paints ten euros (10 €).\n" * 9
    loss, short = ask(exported / MODEL_FILE, [["perplexity", text], ["perplexity", "a"]])
    expected = model.perplexity(text)
    assert loss["value"] == {
        "natsPerChar": pytest.approx(expected.nats_per_char, abs=1e-4), "characters": expected.characters,
        "bitsPerChar": pytest.approx(expected.bits_per_char, abs=1e-4),
        "perplexity": pytest.approx(expected.perplexity, rel=1e-4)}  # fmt: skip
    assert_sentence(short, "the text has 1 character(s); perplexity needs at least 2")


def test_a_signal_ends_a_text(ask, exported):
    options = {"maxLength": 2**53 - 1, "rngSeed": 1}
    name, characters, milliseconds = values(ask(exported / MODEL_FILE, [["aborted", 300, "a", options]]))[0]
    assert name == "TimeoutError"
    assert characters > 20
    assert milliseconds < 5000


def test_a_released_model(ask, exported):
    assert_sentence(*ask(exported / MODEL_FILE, [["released"]]), "the model was released; load it again")


def test_abandoned_streams_do_not_keep_their_memory(node, exported, tmp_path):
    """Streams that are left, and streams that were never read."""
    code = f"""
import {{ LanguageModel }} from "{MODULE}";
const lm = await LanguageModel.load("{exported / MODEL_FILE}", {{ wasm: await module() }});
async function module() {{
  const {{ readFile }} = await import("node:fs/promises");
  return WebAssembly.compile(await readFile("{MODULE.with_suffix(".wasm")}"));
}}
const instances = [];
for (let i = 0; i < 3000; i++) {{
  for await (const piece of lm.stream("the ", {{ banned: "q" }})) break;
  if (i % 3 === 0) lm.stream("the ", {{ banned: "q" }});
  if (i % 100 === 0) {{ gc(); await new Promise((resolve) => setTimeout(resolve)); }}
}}
console.log(process.memoryUsage().rss);
"""
    (tmp_path / "leak.mjs").write_text(code)
    assert int(run_node(node, "--expose-gc", "leak.mjs", cwd=tmp_path)) < 400 << 20


# -- mistakes, in Node

MISTAKES = {
    "lone surrogate in a seed": (["generate", "a\ud800"], "the seed text has a lone surrogate (U+D800)"),
    "lone surrogate in a text": (["score", "\udc00"], "the text has a lone surrogate (U+DC00)"),
    "lone surrogate in a stop": (["generate", "a", {"stop": ["b", "\ud800"]}], "stop has a lone surrogate"),
    "no string": (["generate", 5], "the seed text is not a string"),
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
    "no window": (["generate", "a", {"overflow": "slide"}], "overflow = slide needs a model that was trained with"),
    "nothing allowed": (["generate", "a", {"allowed": ""}], "allowed and banned leave no character"),
    "all banned": (["generate", "a", {"allowed": "aé", "banned": "éa"}], "allowed and banned leave no character"),
    "lone surrogate allowed": (["generate", "a", {"allowed": "a\ud800"}], "allowed has a lone surrogate"),
    "a list of banned ones": (["generate", "a", {"banned": ["a"]}], "banned is not a string"),
    "unknown option": (["generate", "a", {"top_k": 3}], "unknown option top_k; use one of: maxLength, temperature"),
    "number of next characters": (["nextCharacters", "a", -1], "n = -1 is out of range"),
}


def test_mistakes(ask, exported):
    answers = ask(exported / MODEL_FILE, [call for call, _ in MISTAKES.values()])
    for (_, message), answer in zip(MISTAKES.values(), answers, strict=True):
        assert_sentence(answer, message)


def assert_sentence(answer: dict, part: str) -> None:
    error = answer.get("error", f"no error but {str(answer.get('value'))[:80]}")
    assert error.startswith("Error: ")
    assert part in error
    assert "\n" not in error


def test_empty_seed_and_no_length(ask, exported, model):
    asked = [["generate", "", {"maxLength": 20, "rngSeed": 1}], ["generate", "a", {"maxLength": 0}], ["score", ""]]
    assert values(ask(exported / MODEL_FILE, asked)) == [
        model.generate("", 20, rng_seed=1),
        "a",
        [],
    ]


def with_metadata(path: Path, out: Path, **changes) -> Path:
    """The same model, which says something else about itself."""
    proto = onnx.load(path)
    values = {entry.key: entry.value for entry in proto.metadata_props}
    values |= {f"smallm.{name}": value for name, value in changes.items()}
    helper.set_model_props(proto, {name: value for name, value in values.items() if value is not None})
    onnx.save(proto, out)
    return out


@pytest.fixture(scope="session")
def broken_models(exported, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Files that are no model, and what has to be said about them."""
    folder, good = tmp_path_factory.mktemp("broken"), exported / MODEL_FILE
    data = good.read_bytes()
    foreign = onnx.load(good)
    helper.set_model_props(foreign, {"author": "somebody"})
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", *[
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])] for name in "xy"])  # fmt: skip
    other = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    kept = {entry.key: entry.value for entry in onnx.load(good).metadata_props if entry.key != "smallm.checksum"}
    helper.set_model_props(other, kept)
    other.doc_string = "x" * 100_000  # as big as the sizes in its metadata want it
    files = {
        "empty": (b"", "is truncated or not an ONNX model"),
        "text": (b"Once upon a time there was no model. " * 9, "is truncated or not an ONNX model"),
        "page": (b"\n<!doctype html><p>Not found", "page is a web page, not a model; check the address"),
        "half": (data[: len(data) // 2], "is truncated or not an ONNX model"),
        "short": (data[:-1], "is truncated or not an ONNX model"),
        "foreign": (foreign.SerializeToString(), "is not a smallm model: it has no smallm metadata; write one with"),
        "other graph": (other.SerializeToString(), "it uses an operator that smallm models do not use"),
    }
    found = {}
    for name, (content, message) in files.items():
        (folder / name).write_bytes(content)
        found[name] = folder / name, message
    metadata = {
        "version 2": ({"format_version": "2"}, "has another format version; this smallm.js reads 1"),
        "no version": ({"format_version": None}, "has another format version"),
        "not JSON": ({"quality": "{"}, "has broken metadata"),
        "a string for a size": ({"block_size": '"32"'}, "has broken metadata"),
        "no size": ({"n_layer": None}, "has broken metadata"),
        "heads that do not divide": ({"n_kv_head": "3"}, "has broken metadata"),
        "window": ({"window": "33"}, "has broken metadata"),
        "no checksum": ({"checksum": "1.5"}, "has broken metadata"),
        "another checksum": ({"checksum": "1"}, "is damaged: it does not match its checksum"),
        "half a position": ({"window": "1.5"}, "has broken metadata"),
        "no angle": ({"rope_theta": "0"}, "has broken metadata"),
        "odd head_dim": ({"head_dim": "15"}, "has broken metadata"),
        "half a character": ({"tokens": '"e282"'}, "has broken metadata"),
        "a character twice": ({"tokens": '"c3a9 c3a9"'}, "has broken metadata"),
        "a beginning too early": ({"tokens": '"e282 c3a9 e282ac"'}, "has broken metadata"),
        "no tokens": ({"tokens": "7"}, "has broken metadata"),
        "no start": ({"start_text": '""'}, "has broken metadata"),
        "lone surrogate": ({"start_text": '"\\ud800"'}, "has broken metadata"),
        "temperature": ({"sampling": '{"temperature": -1}'}, "has broken metadata"),
        "list": ({"training": "[]"}, "has broken metadata"),
        "huge": ({"block_size": "16000000"}, "is too small for the sizes in its metadata"),
        "one layer more": ({"n_layer": "3"}, "inputs and outputs do not match its metadata"),
    }
    for name, (changes, message) in metadata.items():
        found[name] = with_metadata(good, folder / name, **changes), message
    return found


def test_broken_models(ask, exported, broken_models, tmp_path):
    calls = [["load", str(path)] for path, _ in broken_models.values()]
    calls += [["load", str(tmp_path / "nothing.onnx")], ["load", str(tmp_path)], ["load", 5], ["loadBytes", []]]
    messages = [message for _, message in broken_models.values()]
    messages += ["there is no such file", "cannot read the model", "the model is neither bytes nor a URL nor a path"]
    messages += ["the model is truncated or not an ONNX model"]
    for answer, message in zip(ask(exported / MODEL_FILE, calls), messages, strict=True):
        assert_sentence(answer, message)


def test_damaged_models_never_crash(ask, exported, tmp_path):
    """Bytes changed anywhere: every call either works or raises an Error with a message."""
    data = with_metadata(exported / MODEL_FILE, tmp_path / "model.onnx", checksum="0").read_bytes()
    rng, calls = random.Random(1), []
    for i in range(60):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / f"{i}.onnx").write_bytes(changed)
        calls.append(["loadAndWrite", str(tmp_path / f"{i}.onnx")])
    answers = ask(exported / MODEL_FILE, calls)
    assert len(answers) == len(calls)
    assert any("error" in answer for answer in answers)
    assert any("value" in answer for answer in answers)
    for answer in answers:
        if "error" in answer:
            assert_sentence(answer, "model")


# -- the types


def test_types(node, exported, tmp_path):
    write_sources("node", exported, tmp_path)
    for name in ("types.ts", "types.cts"):
        shutil.copy(JS / name, tmp_path)
    options = ["--noEmit", "--strict", "--module", "nodenext", "--target", "es2022", "--lib", "es2022,dom,dom.iterable"]
    run_node(node, PACKAGES / "typescript" / "bin" / "tsc", *options, "types.ts", "types.cts", cwd=tmp_path)


def test_the_types_name_all_options():
    declared = MODULE.with_suffix(".d.ts").read_text().split("interface GenerateOptions {")[1].split("\n}")[0]
    listed = MODULE.read_text().split("const OPTIONS = {")[1].split("\n}")[0]
    names = re.findall(r"^  (\w+)\??:", declared, re.MULTILINE)
    assert names == re.findall(r"^  (\w+):", listed, re.MULTILINE)
    assert set(names) == {*names_in_js(GenerationOptions.__annotations__), "maxLength", "signal"}


# -- the Node package


def test_node_kit(node, exported, c_program, tmp_path):
    write_sources("node", exported, tmp_path / "kit")
    names = {"README.md", "example.mjs", "model.onnx", "package.json", "LICENSE", "smallm.js", "smallm.d.ts",
             "smallm.cjs", "smallm.d.cts", "smallm.wasm"}  # fmt: skip
    assert {file.name for file in (tmp_path / "kit").iterdir()} == names
    found = run_node(node, "example.mjs", "the moon ", "5", cwd=tmp_path / "kit")
    assert found == c_program(exported / MODEL_FILE, "the moon ", {"rng_seed": 5}, 500)
    assert len(run_node(node, "example.mjs", cwd=tmp_path / "kit")) > 400
    (tmp_path / "kit" / MODEL_FILE).unlink()
    failed = subprocess.run([node, "example.mjs"], cwd=tmp_path / "kit", capture_output=True, text=True)
    assert failed.returncode == 1
    assert re.fullmatch(r"cannot read the model .*: there is no such file\n", failed.stderr)


def test_the_node_kit_is_a_package(node, exported, model, tmp_path):
    """For import and for require(); `npm pack` takes what is needed and no more."""
    write_sources("node", exported, tmp_path / "kit")
    (tmp_path / "app" / "node_modules").mkdir(parents=True)
    (tmp_path / "app" / "node_modules" / "smallm-model").symlink_to(tmp_path / "kit")
    code = """lm = await LanguageModel.load(require.resolve("smallm-model/model.onnx"));
      console.log(await lm.generate("the ", { maxLength: 50, rngSeed: 1, temperature: 0 }));"""
    (tmp_path / "app" / "a.cjs").write_text(
        f'const {{ LanguageModel }} = require("smallm-model"); (async () => {{ const {code} }})();'
    )
    (tmp_path / "app" / "b.mjs").write_text(
        'import { createRequire } from "node:module"; import { LanguageModel } from "smallm-model";'
        f"const require = createRequire(import.meta.url); const {code}"
    )
    expected = model.generate("the ", 50, temperature=0) + "\n"
    assert [run_node(node, name, cwd=tmp_path / "app") for name in ("a.cjs", "b.mjs")] == [expected] * 2
    package = json.loads((tmp_path / "kit" / "package.json").read_text())
    assert package["files"] == [name for name in package["files"] if (tmp_path / "kit" / name).is_file()]
    assert "dependencies" not in package
    if shutil.which("npm"):
        packed = subprocess.run(["npm", "pack", "--dry-run", "--json"], cwd=tmp_path / "kit", capture_output=True)
        listed = {file["path"] for file in json.loads(packed.stdout)[0]["files"]}
        assert listed == {*package["files"], "package.json", "README.md", "LICENSE"}


def test_the_licence_of_the_package():
    assert (SOURCES / "js" / "LICENSE").read_text() == (SOURCES.parents[1] / "LICENSE").read_text()


def test_the_readme_of_the_node_kit(node, exported, tmp_path):
    write_sources("node", exported, tmp_path / "kit")
    text = (tmp_path / "kit" / "README.md").read_text()
    first, install = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert (first, install) == ('node example.mjs "The "\n', "npm install ./path/to/folder\n")
    (source,) = re.findall(r"```js\n(.*?)```", text, re.DOTALL)
    (tmp_path / "app" / "node_modules").mkdir(parents=True)
    (tmp_path / "app" / "node_modules" / "smallm-model").symlink_to(tmp_path / "kit")
    (tmp_path / "app" / "app.mjs").write_text(source)
    assert run_node(node, "app.mjs", cwd=tmp_path / "app").startswith("The ")


# -- the page


@pytest.fixture(scope="session")
def web_kit(node, exported, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("web") / "kit"
    write_sources("web", exported, out)
    return out


def test_the_page_states_its_transfer(web_kit):
    page = [*PAGE_FILES, "smallm.js", "smallm.wasm", MODEL_FILE]
    assert {file.name for file in web_kit.iterdir()} == {*page, "README.md", "smallm.d.ts"}
    total = f"{sum((web_kit / name).stat().st_size for name in page) / 1e3:.0f} kB"
    for name in ("index.html", "README.md"):
        text = (web_kit / name).read_text()
        assert total in " ".join(text.split())
        assert "{{" not in text
    scripts = "".join((web_kit / name).read_text() for name in page if not name.endswith(("wasm", "onnx")))
    assert not re.search(r"https?://(?!localhost)", scripts)


@pytest.fixture(scope="session")
def slider(tmp_path_factory) -> Path:
    """A model with a window, of random weights."""
    return save_onnx(random_model(window=5), tmp_path_factory.mktemp("slider") / MODEL_FILE)


@pytest.fixture(scope="session")
def int8(tmp_path_factory) -> Path:
    """A model of random weights in int8."""
    toy = random_model()
    path = save_onnx(toy, tmp_path_factory.mktemp("int8") / MODEL_FILE)
    write_quantised(toy, manifest_of(toy, precision="int8"), path, PRECISIONS["int8"])
    return path


@pytest.fixture(scope="session")
def page(node, chromium, web_kit, exported, slider, int8, broken_models, tmp_path_factory) -> dict:
    """What a browser saw, by scenario of page.mjs; the page comes from Python's own web server."""
    calls = tmp_path_factory.mktemp("page") / "calls.json"
    mistakes = [call for call, _ in MISTAKES.values()]
    texts = [*golden_calls(CHARACTERS), ["score", "the moon paints Zoë.\n" * 4], *mistakes]
    calls.write_text(json.dumps(texts))
    with served(web_kit) as url:
        shots = os.environ.get("SMALLM_SHOTS", "")
        models = (exported / MODEL_FILE, slider, int8)
        saw = json.loads(run_node(node, JS / "page.mjs", chromium, url, calls, shots, *models))
        assert saw["problems"] == []
        assert {request.split("/")[2] for request in saw["requests"]} == {url.split("/")[2]}, "the page asks elsewhere"
        return saw


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_golden_texts_and_scores_in_chromium(page, model):
    n = len(GOLDEN["texts"])
    *texts, nats = values(page["calls"][: n + 1])
    assert texts == golden_texts(model, CHARACTERS)
    assert nats[1:] == pytest.approx(model.score("the moon paints Zoë.\n" * 4)[1:], abs=1e-4)
    for (_, message), answer in zip(MISTAKES.values(), page["calls"][n + 1 :], strict=True):
        assert_sentence(answer, message)


def test_a_text_in_the_page(page, model):
    saw = page["mouse"]
    options = {"temperature": 0.9, "top_k": 20, "rng_seed": 7, "overflow": "shift"}
    assert saw["text"] == model.generate("Zoë sings to ", 200, **options)
    stream = model.stream("Zoë sings to ", 200, logprobs=True, **options)
    nats = np.array([-p for _ in stream for p in stream.logprobs])
    assert [float(title.removesuffix(" nats")) for title, _ in saw["surprisals"]] == pytest.approx(nats, abs=0.006)
    shares = [float(share) for _, share in saw["surprisals"]]
    assert shares == pytest.approx(np.clip((nats - 3) * 100 / 5, 0, 100), abs=0.8)
    assert saw["coloured"] == [200, 0]  # characters with a background, then after the switch
    assert saw["status"] == "Done: 200 characters"
    assert re.fullmatch(r"[\d,]+ characters per second", saw["progress"])
    assert "The page loads" in saw["footer"]
    assert saw["live"] == ["polite", "false"]
    name = Path(model.metadata.training["text"]).stem
    assert saw["title"] == [name, name]


def test_the_page_writes_a_first_text(page, model):
    """With the fields of its address; screen readers do not read it aloud."""
    assert page["first"] == [model.generate("Zoë ", 80, rng_seed=9, overflow="shift"), "off"]


def test_the_page_by_keyboard(page, model):
    saw = page["keyboard"]
    fields = ["temperature", "topK", "maxLength", "rngSeed", "overflow"]
    assert saw["order"] == ["seed", "write", "another", "", *fields, "copy", "colours", "text"]  # "": Settings
    assert saw["text"] == model.generate("an old owl ", 60, rng_seed=1, overflow="shift")
    assert saw["text"] == saw["stopped"][: len(saw["text"])]
    assert len(saw["text"]) < len(saw["stopped"]) < 50_000
    assert saw["status"].startswith("Stopped: ")
    second = saw["stopped"][len("an old owl ") + 1]
    assert saw["value"].startswith(f"{json.dumps(second)}: {saw['title']}, a probability of ")


def test_another_text_while_one_is_written(page, model):
    seed, text = page["another"]
    assert text == model.generate("an old owl ", 40, rng_seed=int(seed), overflow="shift")


def test_the_page_slides_by_itself(page, slider):
    """Where the model can."""
    python = LanguageModel.load(slider)
    assert page["window"] == ["slide", python.generate("Zoë", 100, temperature=0.7, top_k=30, rng_seed=1)]


def test_the_page_writes_the_int8_text_of_c(page, int8, c_program):
    """To the byte, in Chromium."""
    assert page["int8"] + "\n" == c_program(int8, "Zoë", {"rng_seed": 1, "temperature": 0.7, "top_k": 30}, 2000)


def test_the_page_stays_responsive(page):
    """In processor time, which other programs do not lengthen."""
    assert 0 < page["longestTask"] <= 50


def test_the_page_on_a_phone(page):
    assert "nats, a probability of " in page["narrow"].pop("value")
    assert page["narrow"] == {"folded": True, "page": 360, "window": 360}


def test_the_page_says_what_is_wrong(page):
    saw = page["mistakes"]
    expected = {
        "temperature -1": ("Temperature = -1 is out of range; it must be 0 or more", "temperature"),
        "topK 2.5": ("Candidates = 2.5 is out of range", "topK"),
        "maxLength -5": ("Length = -5 is out of range", "maxLength"),
        "maxLength 1e12": ("this page writes at most 100000", "maxLength"),
        "rngSeed 4294967296": ("Random seed = 4294967296 is out of range", "rngSeed"),
        "temperature ": ("Temperature is not a number; enter a number", "temperature"),
        "seed lone \ud800": ("the seed text has a lone surrogate (U+D800)", "seed"),
    }
    assert saw.pop("empty") == [10, True]
    assert saw.keys() == expected.keys()
    for name, (message, field) in expected.items():
        alert, marked, focused = saw[name]
        assert message in alert
        assert (marked, focused) == ([field], field)


def test_the_page_without_its_model(page):
    messages = {
        "missing": "cannot load model.onnx: the server answers 404; reload the page",
        "truncated": "the model is truncated or not an ONNX model",
        "text": "the model is a web page, not a model; check the address",
        "empty": "the model is truncated or not an ONNX model",
    }
    assert page["models"].keys() == messages.keys()
    for name, message in messages.items():
        alert, disabled = page["models"][name]
        assert message in alert
        assert disabled


def test_a_kit_without_a_model(tmp_path):
    with pytest.raises(UserError, match="there is no model in"):
        write_sources("node", tmp_path, tmp_path / "kit")
