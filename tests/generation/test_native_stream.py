"""engine="native": the C kit from Python writes the texts of the C program, and continues like every other stream."""

import copy
import json
import os
import pickle
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import make_golden
import pytest
from test_interrupts import Interrupter
from toys import random_model, save_onnx

from smallm import LanguageModel, UserError
from smallm.cli import main as cli
from smallm.export.folder import export_checkpoint
from smallm.inference import native
from smallm.language_model import MODEL_FILE
from smallm.training.checkpoint.manager import best_checkpoint

GOLDEN = json.loads(make_golden.FILE.read_text(encoding="utf-8"))["texts"]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
pytestmark = [pytest.mark.slow, needs_compiler]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example of the C kit."""
    built = tmp_path_factory.mktemp("native") / "smallm_generate"
    files = [str(native.SOURCE), str(native.SOURCE.with_name("main.c"))]
    subprocess.run(["cc", "-O2", *files, "-o", str(built), "-lm"], check=True)
    return built


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[LanguageModel, LanguageModel]]:
    """The same model with both engines; random weights, 16 ids of context, with and without a window."""
    found = {}
    for name, window in (("plain", 0), ("window", 6)):
        path = save_onnx(random_model(window=window), tmp_path_factory.mktemp(name) / "toy.onnx")
        found[name] = LanguageModel.load(path), LanguageModel.load(path, engine="native")
    return found


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"rng_seed {case['rng_seed']}")
def test_golden_texts(exported, case):
    """A context of 32 ids, so most of the text lies past the context."""
    options = {name: case[name] for name in ("rng_seed", "temperature", "top_k", "top_p")}
    expected = LanguageModel.load(exported).generate(case["seed"], 2000, **options)
    assert LanguageModel.load(exported, engine="native").generate(case["seed"], 2000, **options) == expected
    threads = LanguageModel.load(exported, threads=3, engine="native")
    without_drafts = LanguageModel.load(exported, engine="native", speculative=False)
    for lm in (threads, without_drafts):
        assert lm.generate(case["seed"], 100, **options) == expected[: len(case["seed"]) + 100]


def test_a_path_that_is_not_utf8(exported, tmp_path):
    folder = tmp_path / os.fsdecode(b"gr\xf6n")
    shutil.copytree(exported, folder)
    options = {"max_length": 50, "rng_seed": 1}
    expected = LanguageModel.load(exported, engine="native").generate("the ", **options)
    assert LanguageModel.load(folder, engine="native").generate("the ", **options) == expected


@pytest.mark.parametrize("overflow", ["crop", "shift"])
def test_int8_texts_are_those_of_the_c_program(tiny_run, program, tmp_path, overflow):
    export_checkpoint(best_checkpoint(tiny_run), tmp_path / "int8", precision="int8", allow_loss=True)
    path = tmp_path / "int8" / MODEL_FILE
    command = [program, path, "--seed", "the ", "--max-length", "300", "--rng-seed", "5", "--overflow", overflow]
    expected = subprocess.run(command, check=True, capture_output=True).stdout.decode()
    found = LanguageModel.load(path, engine="native").generate("the ", 300, rng_seed=5, overflow=overflow)
    assert found + "\n" == expected


OPTIONS = [
    {"overflow": "crop"}, {"overflow": "shift"}, {"overflow": "slide"}, {"temperature": 0}, {"top_k": 5, "top_p": 0.8},
    {"stop": ["é", "zz", "q\x07"], "min_length": 9}, {"repetition_penalty": 1.4, "repetition_window": 7},
    {"min_p": 0.2}, {"allowed": "abé€ \n"}, {"banned": "aeiouéñ", "stream_number": 7}, {"max_length": 0},
    {"max_length": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_of_all_options(pairs, options):
    ours, theirs = pairs["window" if options.get("overflow") == "slide" else "plain"]
    for seed in ("Zoë €", "", "a" * 50, "\0"):
        streams = [lm.stream(seed, **{"max_length": 60, "rng_seed": 4} | options) for lm in (ours, theirs)]
        assert len({stream.done for stream in streams}) == 1
        assert len({"".join(stream) for stream in streams}) == 1
        assert all(stream.done for stream in streams)


def test_pieces_and_log_probabilities(pairs):
    ours, theirs = (lm.stream("Zoë", 60, True, rng_seed=4, banned="\ufffd", stop="éé") for lm in pairs["plain"])
    for expected, found in zip(ours, theirs, strict=True):
        assert (found, theirs.done) == (expected, ours.done)
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-3)


def test_the_log_probability_of_an_id_that_max_length_cuts(pairs):
    """An id can complete U+FFFD and a character; the last one within the text has the probability of the id."""
    for max_length in range(1, 40):
        ours, theirs = (lm.stream("Zoë", max_length, True, rng_seed=4) for lm in pairs["plain"])
        for expected, found in zip(ours, theirs, strict=True):
            assert (found, theirs.done) == (expected, ours.done)
            assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-3)


def test_many_texts(pairs):
    ours, theirs = pairs["plain"]
    options = {"max_length": 40, "rng_seed": 4, "stop": "é"}
    assert theirs.generate_many(["a", "", "Zoë"], **options) == ours.generate_many(["a", "", "Zoë"], **options)
    assert theirs.generate_many([]) == []
    chunks = list(theirs.stream_many(["a", "b"], logprobs=True, **options))
    assert [chunk.number for chunk in chunks if chunk.last] == [0, 1]
    assert all(len(chunk.logprobs) == len(chunk.text) for chunk in chunks)


@pytest.mark.parametrize("rng_seed", [None, 0, 9])
def test_branches(pairs, rng_seed):
    streams = [lm.stream("Zoë", 60, rng_seed=4, temperature=1.0) for lm in pairs["plain"]]
    for _ in range(7):
        assert len({next(stream) for stream in streams}) == 1
    branches = [stream.branch(rng_seed) for stream in streams]
    assert "".join(branches[1]) == "".join(branches[0])
    assert "".join(streams[1]) == "".join(streams[0])


def test_measures_are_those_of_onnx_runtime(pairs):
    ours, theirs = pairs["plain"]
    text = "the owl and the moon " * 9
    assert abs(theirs.perplexity(text).perplexity - ours.perplexity(text).perplexity) < 1e-4
    assert theirs.next_characters("a") == ours.next_characters("a")


@pytest.mark.parametrize("many", [False, True])
def test_an_interrupt_at_any_point(pairs, many):
    _, lm = pairs["plain"]
    options = {"rng_seed": 6, "max_length": 40, "logprobs": True}

    def make():
        return lm.stream_many(["Zoë", "a"], **options) if many else lm.stream("Zoë", **options)

    expected = list(make())
    stream, found, interrupter = make(), [], Interrupter()
    while piece := interrupter.finish(partial(next, stream, None), 1):
        found.append(piece)
    assert found == expected
    assert interrupter.interrupted > 5 * len(found)


def test_an_interrupt_at_any_point_of_a_branch(pairs):
    _, lm = pairs["plain"]
    expected = list(lm.stream("a", 30, rng_seed=6))
    stream, interrupter = lm.stream("a", 30, rng_seed=6), Interrupter()
    for n in (1, 4, 7, 9, 12, 20):
        with suppress(KeyboardInterrupt):
            assert interrupter.run(partial(next, stream), n) == expected.pop(0)
        branch = interrupter.finish(stream.branch, 1)
        assert list(branch) == expected
    assert list(stream) == expected


def test_threads_processes_and_closing(pairs, exported):
    expected = [lm.generate("a", 200, rng_seed=1) for lm in pairs["plain"]]
    lm = pairs["plain"][1]
    with ThreadPoolExecutor(4) as pool:
        assert {f.result() for f in [pool.submit(lm.generate, "a", 200, rng_seed=1) for _ in range(8)]} == {*expected}
    assert pickle.loads(pickle.dumps(lm)).generate("a", 200, rng_seed=1) == expected[1]
    stream = lm.stream("a", 50, rng_seed=1)
    for copies in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UserError, match="use its method branch"):
            copies(stream)
    with LanguageModel.load(exported, engine="native") as closed:
        stream = closed.stream("a", 20, rng_seed=1)
    assert len("".join(stream)) == 20
    with pytest.raises(UserError, match="was closed; load the model again"):
        closed.stream("a")


def test_mistakes(pairs, exported, tmp_path):
    lm = pairs["plain"][1]
    with pytest.raises(UserError, match="engine = 'torch' is unknown; it must be 'onnxruntime' or 'native'"):
        LanguageModel.load(exported, engine="torch")
    with pytest.raises(UserError, match=r"stop = .* has a NUL, which engine = 'native' does not accept; remove it"):
        lm.generate("a", stop="a\0b")
    with pytest.raises(UserError, match="lone surrogate"):
        lm.generate("\ud800")
    with pytest.raises(UserError, match="stream_number = 4294967296 is out of range"):
        lm.stream_many(["a", "b"], stream_number=4294967295)


def test_the_command_line(exported, capfd):
    argv = ["--model", str(exported), "--seed", "a", "--max-length", "50", "--rng-seed", "1"]
    assert cli.run(cli.infer, argv) == 0
    expected = capfd.readouterr().out
    assert cli.run(cli.infer, [*argv, "--engine", "native"]) == 0
    assert capfd.readouterr().out == expected
    assert cli.run(cli.infer, ["--model", str(exported), "--next", "3", "--engine", "native"]) == 2
    assert "--next does not go with --engine" in capfd.readouterr().err


@pytest.mark.parametrize(("cc", "message"), [
    ("no-such-compiler", r"^engine = 'native' needs a C compiler, and this machine has none; install one \(apt"),
    ("false", r"cannot compile smallm\.c: .*; leave out engine = 'native'$"),
])  # fmt: skip
def test_without_a_compiler(exported, monkeypatch, tmp_path, cc, message):
    native.native_library.cache_clear()
    monkeypatch.setenv("CC", cc)
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        LanguageModel.load(exported, engine="native")
    assert "\n" not in str(caught.value)
    native.native_library.cache_clear()


def test_a_cache_that_cannot_be_written(exported, monkeypatch, tmp_path):
    native.native_library.cache_clear()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"^cannot write to .*cache: Not a directory; set SMALLM_CACHE, or leave out"):
        LanguageModel.load(exported, engine="native")
    native.native_library.cache_clear()


def test_a_frozen_program_without_the_data_files(exported, monkeypatch, tmp_path):
    native.native_library.cache_clear()
    monkeypatch.setattr(native, "SOURCE", tmp_path / "smallm.c")
    with pytest.raises(UserError, match=r"which this program lacks; collect the data files of smallm"):
        LanguageModel.load(exported, engine="native")
    native.native_library.cache_clear()
