"""The export folder, opened by others' runtimes as they are: the same ids, logits and greedy text as PyTorch's.

They come with `pip install 'smallm[hosts]'`, and for JavaScript `npm ci --ignore-scripts` in tests/hosts.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from toys import torch_text

from smallm.cli import main as cli
from smallm.errors import UserError
from smallm.export.gguf import write_gguf
from smallm.export.hugging_face import PAD_ID
from smallm.export.model_card import CARD_FILE
from smallm.export.portable_graph import PORTABLE_FILE
from smallm.language_model import MODEL_FILE, LanguageModel
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.checkpoint.format import load_model, load_vocabulary
from smallm.training.checkpoint.manager import best_checkpoint
from smallm.training.model.transformer import TransformerLanguageModel

pytestmark = pytest.mark.slow
HOSTS = Path(__file__).parents[1] / "hosts"
SEED, NEW = "the piñata is naïve €\n", 200
SEEDS = ["the ", "a piñata"]
TEXT = " Zoë's  crème\n\n\tbrûlée ,10 € 中🎉\r\n<|endoftext|></s> 'tis 100%  "
CLOSE = 1e-4


def package(name: str) -> ModuleType:
    """A package of the extra `hosts`; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others
        return pytest.importorskip(name, reason=f"the package {name} is not installed: pip install 'smallm[hosts]'")


def run_node(*argv: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Node with these arguments; the test is skipped without it or its packages."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed: install Node 20 or newer")
    if not (HOSTS / "node_modules").is_dir():
        pytest.skip("the JavaScript hosts are not installed: run `npm ci --ignore-scripts` in tests/hosts")
    command = ["node", *map(str, argv)]
    return subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", timeout=100
    )


def transformers_js(folder: Path, seed: str, new: int, *more: str) -> dict:
    """What tests/hosts/transformers.mjs prints."""
    done = run_node(HOSTS / "transformers.mjs", folder, new, seed, *more)
    assert done.stdout.count("\n") == 1, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory) -> Path:
    """A run with room for a seed and 200 characters; heads of 32, as q8_0 wants them.

    Its model has seen little: among 40 ids it would at times draw NUL, at which genai cuts a text, or the pad id, at
    which genai and llama.cpp end one. All hosts therefore sample from the 5 most likely ids.
    """
    run = tmp_path_factory.mktemp("hosts") / "owls"
    settings = {
        "model.n_layer": 2, "model.n_head": 2, "model.n_kv_head": 1, "model.n_embd": 64, "model.block_size": 256,
        "model.rope_theta": 10000.0, "optim.warmup_steps": 10, "optim.decay_fraction": 0.6, "optim.weight_decay": 0.0,
        "optim.adam_learning_rate": 0.005,
        "train.max_steps": 40, "train.batch_size": 8, "train.eval_every": 40, "train.sample_length": 0,
        "sample.top_k": 5,
    }  # fmt: skip
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert cli.run(cli.train, ["--data", str(text_file), "--out", str(run), *argv]) == 0
    return run


@pytest.fixture(scope="module")
def folder(run) -> Path:
    """Its export, with a portable file and, where the package gguf is installed, a GGUF file."""
    gguf = ["--gguf"] if find_spec("gguf") else []
    assert cli.run(cli.export, [str(run), "--portable", *gguf]) == 0
    return run / "export"


@pytest.fixture(scope="module")
def model(run) -> TransformerLanguageModel:
    return load_model(best_checkpoint(run))


@pytest.fixture(scope="module")
def vocabulary(run) -> Vocabulary:
    return load_vocabulary(best_checkpoint(run))


@pytest.fixture(scope="module")
def greedy(model, vocabulary) -> str:
    """What PyTorch writes: the window anew for each id."""
    text = torch_text(model, vocabulary, SEED, NEW)
    assert "\n" in text[len(SEED) :]  # nobody may stop there
    return text


@pytest.fixture(scope="module")
def logits(model, vocabulary) -> np.ndarray:
    """PyTorch's, (1, T, V), of TEXT."""
    with torch.no_grad():
        return model(torch.from_numpy(vocabulary.encode(TEXT).astype(np.int64))[None]).numpy()


@pytest.fixture
def truncated(folder, tmp_path) -> Path:
    """The folder with half of each model file."""
    copy = Path(shutil.copytree(folder, tmp_path / "truncated"))
    for file in (MODEL_FILE, f"onnx/{MODEL_FILE}", PORTABLE_FILE, "model.safetensors"):
        (copy / file).write_bytes((folder / file).read_bytes()[: (folder / file).stat().st_size // 2])
    return copy


def test_smallm_itself(folder, greedy):
    assert LanguageModel.load(folder).generate(SEED, NEW, temperature=0) == greedy


# -- transformers


def test_transformers(folder, vocabulary, logits, greedy):
    transformers = package("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = tokenizer(TEXT, return_tensors="pt")
        assert set(ids) == {"input_ids", "attention_mask"}
        assert ids["input_ids"][0].tolist() == vocabulary.encode(TEXT).tolist()
        assert tokenizer.decode(ids["input_ids"][0]) == TEXT
        with torch.no_grad():
            assert np.abs(model(**ids).logits.numpy() - logits).max() < CLOSE
        seed = tokenizer(SEED, return_tensors="pt")
        new = len(vocabulary.encode(greedy)) - seed["input_ids"].shape[1]
        written = model.generate(**seed, do_sample=False, max_new_tokens=new)[0]
    assert tokenizer.decode(written) == greedy


def test_transformers_pads_a_batch_and_begins_without_a_seed(folder, vocabulary):
    transformers = package("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert tokenizer.pad_token_id == model.generation_config.pad_token_id == PAD_ID
        assert tokenizer("ÿ")["input_ids"] == vocabulary.encode("ÿ").tolist()  # the letter is not padding
        ids = tokenizer(SEEDS, padding=True, return_tensors="pt")
        assert ids["attention_mask"][0].tolist() == [0] * 4 + [1] * 4
        written = model.generate(**ids, do_sample=False, max_new_tokens=20)
        expected = [LanguageModel.load(folder).generate(seed, 20, temperature=0) for seed in SEEDS]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        assert all(text.startswith(each) or each.startswith(text) for text, each in zip(texts, expected, strict=True))
        assert model.generate().shape == (1, 256)  # from the beginning of a text to the end of the context


def test_transformers_refuses_half_a_file(truncated):
    transformers = package("transformers")
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete"):
        transformers.AutoModelForCausalLM.from_pretrained(truncated)


# -- onnxruntime-genai


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_genai(run, folder, tmp_path, vocabulary, greedy, precision):
    genai = package("onnxruntime_genai")
    if precision != "fp32":
        folder = tmp_path / precision
        assert cli.run(cli.export, [str(run), "--precision", precision, "--allow-loss", "--out", str(folder)]) == 0
        greedy = LanguageModel.load(folder).generate(SEED, 20, temperature=0)  # rounding differs, after a while
    model = genai.Model(str(folder))
    tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
    assert tokenizer.encode(TEXT).tolist() == vocabulary.encode(TEXT).tolist()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    parameters.set_search_options(max_length=len(vocabulary.encode(greedy)), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(SEED))
    while not generator.is_done():
        generator.generate_next_token()
    assert tokenizer.decode(generator.get_sequence(0)) == greedy


def test_genai_takes_the_defaults_and_fills_the_context(folder, vocabulary):
    genai = package("onnxruntime_genai")
    model = genai.Model(str(folder))
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens(vocabulary.encode(SEED).astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 256


def test_genai_pads_a_batch(folder):
    genai = package("onnxruntime_genai")
    model = genai.Model(str(folder))
    tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
    parameters.set_search_options(max_length=30, batch_size=2, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode_batch(SEEDS))
    while not generator.is_done():
        generator.generate_next_token()
    lm = LanguageModel.load(folder)
    for i, seed in enumerate(SEEDS):
        text = tokenizer.decode([id for id in generator.get_sequence(i) if id != PAD_ID])
        assert lm.generate(seed, 40, temperature=0).startswith(text)


def test_genai_refuses_half_a_file(truncated):
    genai = package("onnxruntime_genai")
    with pytest.raises(RuntimeError, match=r"(?i)protobuf|parsing"):
        genai.Model(str(truncated))


# -- transformers.js


def test_transformers_js(folder, vocabulary, greedy):
    new = len(vocabulary.encode(greedy)) - len(vocabulary.encode(SEED))
    assert transformers_js(folder, SEED, new) == {"texts": [greedy], "ids": vocabulary.encode(SEED).tolist()}
    assert transformers_js(folder, TEXT, 1)["ids"] == vocabulary.encode(TEXT).tolist()


def test_transformers_js_takes_batches_of_equal_lengths_only(folder):
    expected = [LanguageModel.load(folder).generate(seed, 10, temperature=0) for seed in ("the ", "owls")]
    assert transformers_js(folder, "the ", 10, "owls")["texts"] == expected
    assert "BigInt" in transformers_js(folder, "the ", 10, "an owl")["error"]  # no wrong text


@pytest.mark.parametrize(("precision", "file"), [("int8", "model_int8.onnx"), ("int4", "model_q4.onnx")])
def test_transformers_js_finds_the_other_precisions(run, tmp_path, precision, file):
    out = tmp_path / precision
    assert cli.run(cli.export, [str(run), "--precision", precision, "--allow-loss", "--out", str(out)]) == 0
    assert (out / "onnx" / file).read_bytes() == (out / MODEL_FILE).read_bytes()
    assert not (out / "model.safetensors").exists()
    expected = LanguageModel.load(out).generate("the ", 10, temperature=0)
    assert transformers_js(out, "the ", 10)["texts"] == [expected]


def test_transformers_js_refuses_half_a_file(truncated, tmp_path):
    assert "error" in transformers_js(truncated, SEED, 1)
    assert "error" in transformers_js(tmp_path / "nothing", SEED, 1)


# -- engines for standard operators


def test_openvino(folder, model, vocabulary, logits, greedy):
    openvino = package("openvino")
    fp32 = {"INFERENCE_PRECISION_HINT": "f32"}  # by default OpenVINO computes in bf16 on processors that have it
    compiled = openvino.Core().compile_model(str(folder / PORTABLE_FILE), "CPU", fp32)
    names = [value.any_name for value in compiled.inputs]
    past = {name: np.zeros((1, 1, 0, 32), np.float32) for name in names[2:]}
    assert names[:2] == ["input_ids", "attention_mask"]

    def step(ids: list[int]) -> np.ndarray:
        """Logits (1, T, V) on top of the cache, which grows."""
        length = past[names[2]].shape[2] + len(ids)
        found = compiled({"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), np.int64), **past})
        past.update({name: found[name.replace("past_key_values", "present")] for name in past})
        return found["logits"]

    assert np.abs(step(vocabulary.encode(TEXT).tolist()) - logits).max() < CLOSE
    past = {name: np.zeros((1, 1, 0, 32), np.float32) for name in names[2:]}
    ids = vocabulary.encode(SEED).tolist()
    following = step(ids)
    while len(vocabulary.decode(ids)) < len(greedy):
        ids.append(int(following[0, -1].argmax()))
        following = step(ids[-1:])
    assert vocabulary.decode(ids) == greedy


def test_openvino_refuses_half_a_file(truncated):
    openvino = package("openvino")
    with pytest.raises(RuntimeError):
        openvino.Core().compile_model(str(truncated / PORTABLE_FILE), "CPU")


# -- GGUF


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_gguf_holds_weights_and_vocabulary(run, tmp_path, vocabulary, precision):
    gguf = package("gguf")
    out = tmp_path / "out"
    argv = [str(run), "--gguf", "--precision", precision, "--allow-loss", "--out", str(out)]
    assert cli.run(cli.export, argv) == 0
    reader = gguf.GGUFReader(out / "owls.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert (values["general.architecture"], values["general.name"]) == ("qwen3", "owls")
    assert (values["qwen3.context_length"], values["qwen3.attention.head_count_kv"]) == (256, 1)
    assert len(values["tokenizer.ggml.tokens"]) == vocabulary.size
    assert values["tokenizer.ggml.merges"] == vocabulary.tokenizer_json()["model"]["merges"]
    assert values["tokenizer.ggml.eos_token_id"] == values["tokenizer.ggml.padding_token_id"] == PAD_ID
    sampling = {key: values[f"general.sampling.{key}"] for key in ("temp", "top_k", "top_p", "min_p", "penalty_repeat")}
    assert sampling == pytest.approx({"temp": 0.8, "top_k": 5, "top_p": 1.0, "min_p": 0.0, "penalty_repeat": 1.0})
    expected = load_file(best_checkpoint(run) / "model.safetensors")
    assert len(reader.tensors) == len(expected)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "blk.1.attn_q_norm.weight"} <= set(found)
    for name, tensor in expected.items():
        most = 0.6 * np.abs(tensor).max() / 127 if precision == "int8" and tensor.ndim == 2 else 0  # scales are fp16
        stored = found[names.get_name(name, try_suffixes=(".weight",))]
        assert np.abs(stored.reshape(tensor.shape) - tensor).max() <= most


def test_llama_cpp(run, tmp_path, vocabulary, greedy):
    package("gguf")
    reason = "the package llama-cpp-python is not installed: pip install llama-cpp-python, which takes minutes"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    write_gguf(best_checkpoint(run), tmp_path / "owls.gguf", "fp32", "owls")
    model = llama_cpp.Llama(str(tmp_path / "owls.gguf"), n_ctx=256, verbose=False)
    assert model.tokenize(TEXT.encode(), add_bos=False, special=False) == vocabulary.encode(TEXT).tolist()
    assert model.token_eos() == PAD_ID
    new = len(vocabulary.encode(greedy)) - len(vocabulary.encode(SEED))
    options = {"temperature": 0.0, "repeat_penalty": 1.0}
    assert SEED + model(SEED, max_tokens=new, **options)["choices"][0]["text"] == greedy


def test_gguf_says_what_is_wrong(tiny_run, tmp_path, monkeypatch, capsys):
    def refused(*argv: str) -> str:
        assert cli.run(cli.export, [str(tiny_run), "--out", str(tmp_path / "out"), "--gguf", *argv]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        expected = "smallm: --gguf needs the package 'gguf'; install it with: pip install 'smallm[gguf]'\n"
        assert refused() == expected
    package("gguf")
    assert refused("--precision", "int4") == "smallm: --gguf goes with --precision fp32 or int8, not int4\n"


def test_gguf_in_int8_needs_rows_of_whole_blocks(tmp_path):
    package("gguf")
    save_file({"model.embed_tokens.weight": np.zeros((262, 48), np.float32)}, tmp_path / "model.safetensors")
    for name, content in {"config.json": {}, "tokenizer.json": {"model": {}}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"multiples of 32, this model has \[48\]; pass --precision fp32 with --gguf$"):
        write_gguf(tmp_path, tmp_path / "owls.gguf", "int8", "owls")
    assert not (tmp_path / "owls.gguf").exists()


# -- what the card tells its reader to type


LLAMA_CPP = """
import sys, types
from cyllama import LLM, GenerationConfig

class Llama:  # what the card uses of llama-cpp-python, which has no binary packages, over other bindings of llama.cpp
    def __init__(self, path, n_ctx, verbose):
        self.path, self.n_ctx = path, n_ctx

    def __call__(self, seed, stop, **options):
        config = GenerationConfig(n_ctx=self.n_ctx, stop_sequences=stop, add_bos=False, **options)
        with LLM(self.path, config=config) as model:
            return {"choices": [{"text": str(model(seed))}]}

sys.modules["llama_cpp"] = types.SimpleNamespace(Llama=Llama)
"""


@pytest.mark.parametrize(
    ("host", "module", "prelude", "blocks"),
    [
        ("smallm", "smallm", "", 1),
        ("transformers", "transformers", "", 1),
        ("onnxruntime-genai", "onnxruntime_genai", "", 2),
        ("llama.cpp", "cyllama", LLAMA_CPP, 1),
        ("OpenVINO", "openvino", "", 1),
        ("ONNX Runtime, in any language", "onnxruntime", "", 1),
    ],
)
def test_python_of_the_card(folder, host, module, prelude, blocks):
    package(module)
    if host == "llama.cpp":
        package("gguf")
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    section = card.split(f"### {host}\n")[1].split("\n##")[0]
    codes = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(codes) == blocks
    (seed,) = re.findall(r'model\.generate\(("[^"]*"), max', card)
    for code in codes:
        done = run_python(prelude + code, folder)
        assert done.returncode == 0, done.stderr
        assert "num_logits_to_keep" not in done.stderr
        assert done.stdout.startswith(json.loads(seed)) or host == "OpenVINO"
        assert len(done.stdout) > (200 if host != "OpenVINO" else 1) or "\n\n\n" in done.stdout


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
                          encoding="utf-8", timeout=100)  # fmt: skip


def test_every_code_block_of_the_card_has_a_test(folder):
    package("gguf")
    card = (folder / CARD_FILE).read_text(encoding="utf-8").split("## How to use the model")[1]
    assert re.findall(r"^```(\w+)", card, re.MULTILINE) == ["python"] * 4 + ["js"] + ["python"] * 3


def test_javascript_of_the_card(folder, tmp_path):
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    (code,) = re.findall(r"```js\n(.*?)```", card, re.DOTALL)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "node_modules").symlink_to(HOSTS / "node_modules", target_is_directory=True)
    done = run_node("--input-type=module", "--eval", code, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200 or done.stdout.rstrip("\n") + "\n\n\n" in done.stdout
