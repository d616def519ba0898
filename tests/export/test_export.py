"""smallm.export: the graph computes the logits of PyTorch, keeps its interface, and is written completely or not."""

import inspect
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from toys import edit_state, manifest_of, random_model, save_onnx

import smallm
from smallm.cli import main as cli
from smallm.errors import UserError
from smallm.export import cli as export_cli
from smallm.export import folder as export_folder
from smallm.export import graph as export_graph
from smallm.export import kits
from smallm.export import precision as export_precision
from smallm.export.folder import export_checkpoint
from smallm.export.gguf import check_gguf
from smallm.export.parity import TOLERANCE, check_parity
from smallm.inference.native import NativeModel
from smallm.inference.session import Session
from smallm.language_model import MODEL_FILE
from smallm.model_file.manifest import MANIFEST_FILE, Manifest
from smallm.model_file.sampling import Sampling
from smallm.training.checkpoint.format import STATE_FILE, load_model, load_vocabulary
from smallm.training.checkpoint.manager import best_checkpoint

JSON_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "genai_config.json",
              "special_tokens_map.json"}  # fmt: skip
FILES = {MODEL_FILE, MANIFEST_FILE, *JSON_FILES, "onnx/model.onnx", "draft_table.npy", "model.safetensors", "README.md"}
SHAPES = {
    "heads of 16, two of four shared": {},
    "one layer": {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32},
    "no sharing, heads of 32": {"n_head": 2, "n_kv_head": 0},
    "all share one head of 64": {"n_head": 2, "n_kv_head": 1, "n_embd": 128},
    "three of three heads, of 48": {"n_head": 3, "n_kv_head": 3, "n_embd": 144},
    "one head": {"n_head": 1, "n_kv_head": 0, "n_embd": 32},
    "window of one": {"block_size": 1},
    "window of two": {"block_size": 2},
    "another base, odd window, narrow": {"rope_theta": 500.0, "block_size": 37, "n_inner": 24},
}


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run_export(capsys, *argv) -> tuple[int, str, str]:
    code = cli.run(cli.export, [str(word) for word in argv])
    return code, *capsys.readouterr()


def opened(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of the trained run, to be damaged and exported."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


# -- the numbers


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_pytorch(config, tmp_path):
    model = random_model(**config)
    assert 0 < check_parity(model, save_onnx(model, tmp_path / "model.onnx")) < 5e-5


def test_a_trained_model_agrees_too(tiny_run, exported):
    assert check_parity(load_model(best_checkpoint(tiny_run)), exported / MODEL_FILE) < 2e-5


@pytest.mark.parametrize("keep", [0, 1, 2, None])
def test_num_logits_to_keep(tmp_path, keep):
    model = random_model()
    onnxruntime = opened(save_onnx(model, tmp_path / "model.onnx"))
    ids = np.arange(65, 75).reshape(2, 5)
    feeds = {"input_ids": ids, "attention_mask": np.ones((2, 5), np.int64)}
    feeds |= {v.name: np.zeros((2, 2, 0, 16), np.float32) for v in onnxruntime.get_inputs() if "past" in v.name}
    if keep is not None:
        feeds["num_logits_to_keep"] = np.array(keep)
    logits = onnxruntime.run(["logits"], feeds)[0]
    expected = model(torch.from_numpy(ids)).detach().numpy()[:, -(keep or 5) :]
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < TOLERANCE


# -- the contract of the file


def test_inputs_and_outputs(tmp_path):
    onnxruntime = opened(save_onnx(random_model(), tmp_path / "model.onnx"))
    past = {f"past_key_values.{i}.{part}": ("tensor(float)", ["batch_size", 2, "past_sequence_length", 16])
            for i in range(2) for part in ("key", "value")}  # fmt: skip
    assert {v.name: (v.type, v.shape) for v in onnxruntime.get_inputs()} == {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
        **past,
    }
    (keep,) = onnxruntime.get_overridable_initializers()
    assert (keep.name, keep.type, keep.shape) == ("num_logits_to_keep", "tensor(int64)", [])
    present = {f"present.{i}.{part}": ("tensor(float)", ["batch_size", 2, "total_sequence_length", 16])
               for i in range(2) for part in ("key", "value")}  # fmt: skip
    assert {v.name: (v.type, v.shape) for v in onnxruntime.get_outputs()} == {
        "logits": ("tensor(float)", ["batch_size", "positions", 262]),
        **present,
    }


def test_one_file_that_old_runtimes_read(exported):
    proto = onnx.load(exported / MODEL_FILE, load_external_data=False)
    assert proto.ir_version <= 10
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 17, "com.microsoft": 1}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)
    assert set(contents(exported)) == FILES


def test_metadata_and_sidecar_say_the_same(tiny_run, exported):
    properties = {p.key: json.loads(p.value) for p in onnx.load(exported / MODEL_FILE).metadata_props}
    sidecar = json.loads((exported / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert properties == {f"smallm.{key}": value for key, value in sidecar.items()}
    manifest = Manifest.from_dict(sidecar, "sidecar")
    assert asdict(manifest) == sidecar
    checkpoint = best_checkpoint(tiny_run)
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    assert manifest.vocabulary == load_vocabulary(checkpoint)
    assert (manifest.block_size, manifest.n_layer, manifest.n_head, manifest.n_kv_head) == (32, 2, 2, 1)
    assert (manifest.n_embd, manifest.head_dim, manifest.precision, manifest.start_text) == (32, 16, "fp32", "\n")
    facts = {key: manifest.training[key] for key in ("step", "val_loss", "fingerprint")}
    assert facts == {key: state[key] for key in facts}
    assert manifest.sampling == {"temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.0}


def test_hugging_face_files_open_in_transformers(tiny_run, exported):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(exported)
        generation = transformers.GenerationConfig.from_pretrained(exported)
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert (config.model_type, config.num_key_value_heads, config.head_dim) == ("qwen3", 1, 16)
    assert config.max_position_embeddings == tokenizer.model_max_length == 32
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.8, 40)
    vocabulary = load_vocabulary(best_checkpoint(tiny_run))
    assert config.vocab_size == len(tokenizer) == vocabulary.size
    text = " Zoë's  crème\n\n\tbrûlée ,10 € 中🎉"
    ids = tokenizer(text)["input_ids"]
    assert ids == vocabulary.encode(text).tolist()
    assert tokenizer.decode(ids) == text


# -- a graph that computes something else does not come to exist


def change_initializer(name, change):
    """Breaks a built graph: `change` gets the initialiser as an array and gives another."""

    def break_(proto):
        (tensor,) = (t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))

    return break_


def change_attribute(kind, name, value):
    def break_(proto):
        for node in (n for n in proto.graph.node if n.op_type == kind):
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return break_


def swap_gains(proto):
    a, b = (next(t for t in proto.graph.initializer if t.name == f"h.{i}.ln_2.weight") for i in (0, 1))
    a.raw_data, b.raw_data = b.raw_data, a.raw_data


def drop_gain(proto):
    """Queries and keys go on without their gains."""
    for node in proto.graph.node:
        if node.name == "/h.1/attn/from_heads":
            node.input[0] = "/h.1/attn/qk_norm"


def drop_node(proto):
    (node,) = (n for n in proto.graph.node if n.name == "/h.0/mlp/c_proj")
    proto.graph.node.remove(node)


def ignore_the_past(proto):
    """Right without a cache, wrong with one: every position counts as the first of its chunk."""
    for node in proto.graph.node:
        if node.name == "/mask_sum":
            node.input[0] = "input_ones"
    shape = helper.make_node("Shape", ["input_ids"], ["input_shape"])
    ones = helper.make_node("ConstantOfShape", ["input_shape"], ["input_ones"],
                            value=numpy_helper.from_array(np.ones(1, np.int64)))  # fmt: skip
    proto.graph.node.insert(0, ones)
    proto.graph.node.insert(0, shape)


BROKEN = {
    "a weight off by a little": change_initializer("h.1.mlp.c_fc.weight_t", lambda w: w * np.float32(1.001)),
    "two gains swapped": swap_gains,
    "no gain": drop_gain,
    "a node missing": drop_node,
    "heads in another order": change_initializer("h.0.attn.qk_gain", lambda w: w[::-1].copy()),
    "another rope base": change_initializer("sin_cache", lambda w: w * np.float32(0.99)),
    "positions off by one": change_initializer("cos_cache", lambda w: np.roll(w, 1, 0)),
    "a rotary table too short": change_initializer("cos_cache", lambda w: w[:-1].copy()),
    "another epsilon": change_attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-3),
    "another scale": change_attribute("GroupQueryAttention", "scale", 0.5),
    "no rotation": change_attribute("GroupQueryAttention", "do_rotary", 0),
    "a short attention window": change_attribute("GroupQueryAttention", "local_window_size", 12),
    "wrong only with a cache": ignore_the_past,
    "a weight that is not a number": change_initializer("wte.weight", lambda w: w * np.float32(np.nan)),
}


@pytest.mark.parametrize("break_", BROKEN.values(), ids=BROKEN)
def test_a_broken_graph_is_not_exported(run, monkeypatch, capsys, break_):
    # So short a training leaves gains and positions hardly used; here all of them matter.
    torch.manual_seed(0)
    for file in run.glob("checkpoints/*/model.safetensors"):
        tensors = load_file(file)
        save_file({k: 0.2 * torch.randn_like(v) + (v if v.ndim == 1 else 0) for k, v in tensors.items()}, file)
        edit_state(file.parent)
    code, _, err = run_export(capsys, run)
    assert (code, err) == (0, "")
    before = contents(run)

    def broken_graph(model, manifest):
        proto = export_graph.build_graph(model, manifest)
        break_(proto)
        return proto

    monkeypatch.setattr(export_folder, "build_graph", broken_graph)
    for argv in ([run], [run, "--out", run.parent / "not" / "yet" / "there"]):
        code, out, err = run_export(capsys, *argv)
        assert (code, out) == (2, "")
        assert err.startswith("smallm: ")
        assert err.count("\n") == 1
    assert contents(run) == before  # the older export is as it was
    assert [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(("precision", "unit"), [("fp32", "nats for a character"), ("int8", "bits per character")])
def test_a_kit_whose_engine_differs_from_onnx_runtime_is_not_written(run, monkeypatch, capsys, precision, unit):
    argv = [run, "--kit", "c", "--precision", precision, "--allow-loss"]
    assert run_export(capsys, *argv)[::2] == (0, "")
    before = contents(run)

    def damaged(path):
        proto = onnx.load(path)
        change_initializer("wte.weight", lambda w: w[::-1].copy())(proto)
        next(entry for entry in proto.metadata_props if entry.key == "smallm.checksum").value = "0"
        onnx.save(proto, path.with_name("damaged.onnx"))
        return NativeModel(path.with_name("damaged.onnx"))

    monkeypatch.setattr("smallm.export.parity.NativeModel", damaged)
    code, out, err = run_export(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("smallm: the C engine differs from ONNX Runtime by ")
    assert unit in err
    assert contents(run) == before


def test_an_error_in_the_middle_leaves_nothing(run, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    before = contents(run)
    monkeypatch.setattr(export_folder, "check_parity", fail)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(best_checkpoint(run), run / "export")
    assert contents(run) == before
    assert not (run / "export").exists()


def test_an_older_export_survives_a_failed_exchange(run, monkeypatch):
    out = run / "export"
    export_checkpoint(best_checkpoint(run), out)
    before, rename = contents(run), Path.rename

    def rename_old_only(self, target):
        if self.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_old_only)
    with pytest.raises(UserError, match=r"^cannot write .*: No space left on device; choose another --out$"):
        export_checkpoint(best_checkpoint(run), out)
    assert contents(run) == before


def test_weights_that_are_not_finite(run, capsys):
    for file in run.glob("checkpoints/*/model.safetensors"):
        tensors = load_file(file)
        tensors["model.norm.weight"][3] = torch.nan
        save_file(tensors, file)
        edit_state(file.parent)
    code, out, err = run_export(capsys, run)
    assert (code, out) == (2, "")
    assert "logits are not finite" in err
    assert not (run / "export").exists()


# -- the command


def test_the_best_checkpoint_is_exported_by_default(run, capsys):
    best = best_checkpoint(run)
    state = json.loads((best / STATE_FILE).read_text(encoding="utf-8"))
    worse = run / "checkpoints" / "step-999999"
    shutil.copytree(best, worse)
    edit_state(worse, lambda values: values.update(val_loss=state["val_loss"] + 1, step=999999))
    code, out, err = run_export(capsys, run)
    assert (code, err) == (0, "")
    assert Session(run / "export" / MODEL_FILE).manifest.training["step"] == state["step"]
    assert out.startswith(f"{best} -> {run / 'export' / MODEL_FILE}: ")
    assert f"validation loss {state['val_loss']:.4f}" in out
    assert f"python -m smallm infer --model {run / 'export'}" in out
    # and another one by its own name, into the same place
    code, out, _ = run_export(capsys, worse)
    assert code == 0
    assert Session(run / "export" / MODEL_FILE).manifest.training["step"] == 999999


def test_a_checkpoint_far_from_its_run(run, tmp_path, capsys):
    alone = tmp_path / "elsewhere" / "mine"
    shutil.copytree(best_checkpoint(run), alone)
    code, _, err = run_export(capsys, alone)
    assert (code, err) == (0, "")
    assert set(contents(alone / "export")) == FILES
    assert [path.name for path in alone.parent.iterdir()] == ["mine"]


def test_the_newest_run_and_relative_paths(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "mine")
    code, out, err = run_export(capsys)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == 'next: python -m smallm infer --seed Once'
    monkeypatch.chdir(tmp_path / "runs" / "mine" / "checkpoints")
    (tmp_path / "empty place").mkdir()
    for out_folder in ("../../../a b/c", "../../../empty place"):
        code, out, err = run_export(capsys, "..", "--out", out_folder)
        assert (code, err) == (0, "")
        assert f"--model '{out_folder}'" in out
        assert set(contents(Path(out_folder))) == FILES


def test_an_export_is_replaced_as_a_whole(run, monkeypatch, capsys):
    monkeypatch.setattr(export_precision, "_speed", lambda model: 1234.5)  # all else is the same every time
    assert run_export(capsys, run)[0] == 0
    before = contents(run)
    (run / "export" / "tokenizer.json").write_text("broken")
    (run / "export" / "config.json").unlink()
    assert run_export(capsys, run)[0] == 0
    assert contents(run) == before


@pytest.mark.parametrize("kind", ["file", "folder of others", "run", "export with a guest"])
def test_a_folder_that_is_not_an_export_is_not_overwritten(run, tmp_path, capsys, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder of others":
        (out / "deep").mkdir(parents=True)
        (out / "deep" / "mine.txt").write_text("mine")
    elif kind == "run":
        shutil.copytree(run, out)
    else:
        assert run_export(capsys, run, "--out", out)[0] == 0
        (out / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    code, stdout, err = run_export(capsys, run, "--out", out)
    assert (code, stdout) == (2, "")
    assert err.startswith(f"smallm: {out} ")
    assert err.endswith("choose another --out\n")
    assert contents(tmp_path) == before


def damage(name, change):
    def damage_(run):
        for file in run.glob(f"checkpoints/*/{name}"):
            data = change(file.read_bytes())
            file.unlink() if data is None else file.write_bytes(data)

    return damage_


MISTAKES = {
    "no run there": lambda run: shutil.rmtree(run),
    "no checkpoint": lambda run: shutil.rmtree(run / "checkpoints"),
    "weights truncated": damage("model.safetensors", lambda data: data[:-100]),
    "weights empty": damage("model.safetensors", lambda data: b""),
    "weights missing": damage("model.safetensors", lambda data: None),
    "weights of another format": damage("model.safetensors", lambda data: b"\x80\x02pickle" * 9),
    "state truncated": damage(STATE_FILE, lambda data: data[:50]),
    "state of another size": damage(STATE_FILE, lambda data: data.replace(b'"n_layer": 2', b'"n_layer": 3')),
    "tokenizer truncated": damage("tokenizer.json", lambda data: data[:500]),
    "tokenizer missing": damage("tokenizer.json", lambda data: None),
    "out below a file": lambda run: (run / "export").write_text("in the way"),
}


@pytest.mark.parametrize("spoil", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(run, capsys, spoil):
    spoil(run)
    before = contents(run.parent)
    code, out, err = run_export(capsys, run, *(["--out", run / "export" / "x"] if (run / "export").is_file() else []))
    assert (code, out) == (2, "")
    assert err.startswith("smallm: ")
    assert err.count("\n") == 1
    assert contents(run.parent) == before


@pytest.mark.parametrize("argv", [["--nonsense"], ["a", "b"], ["--out"], ["--out", ""], ["x" * 5000], ["no\nrun"]])
def test_bad_arguments(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_export(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("smallm: ")


def test_no_run_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_export(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("smallm: no run found in runs/")
    assert list(tmp_path.iterdir()) == []


def test_the_toy_manifest_is_a_valid_export(tmp_path):
    manifest = manifest_of(random_model())
    assert Manifest.from_dict(asdict(manifest), "toy") == manifest
    assert Sampling(**manifest.sampling)


@pytest.mark.parametrize(("precision", "window", "message"), [
    ("fp32", 7, "llama.cpp does not support sliding windows for Qwen3, and model.window = 7; leave out --gguf"),
    ("int4", 0, "--gguf goes with --precision fp32 or int8, not int4"),
])  # fmt: skip
def test_models_that_gguf_cannot_represent(precision, window, message):
    with pytest.raises(UserError, match=message):
        check_gguf(precision, window)


# -- from Python


@pytest.mark.parametrize("first", ["import smallm", "import smallm.export.folder", "from smallm import export"])
def test_smallm_export_is_a_function_in_every_order_of_imports(first, run):
    code = f"""
{first}
import smallm
path = smallm.export({str(run)!r}, precision="int8", allow_loss=True)
import smallm.export.cli
assert smallm.export({str(run)!r}, precision="int8", allow_loss=True, out={str(run / "other")!r}) != path
print(path, smallm.LanguageModel.load(path).metadata.precision)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{run / 'export'} int8\n"


def test_export_takes_a_run_object_and_returns_the_folder(run, monkeypatch):
    assert smallm.export(SimpleNamespace(path=run)) == run / "export"
    assert smallm.export(run, out=str(run / "mine"), gguf=False) == run / "mine"
    monkeypatch.chdir(run.parent)
    shutil.copytree(run, run.parent / "runs" / "newest")
    assert smallm.export(portable=True) == Path("runs/newest/export")
    assert Path("runs/newest/export/model.portable.onnx").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int5"}, "unknown precision 'int5'; use one of: fp32, int8, int4"),
        ({"kit": "java"}, "unknown kit 'java'; use one of: c, node, web"),
        (
            {"kit": "c", "gguf": True},
            "a kit holds neither a GGUF file nor the portable model; leave out one or the other",
        ),
    ],
)
def test_export_refuses_unknown_options(options, message, run):
    before = contents(run)
    with pytest.raises(UserError) as error:
        smallm.export(run, **options)
    assert str(error.value) == message
    assert contents(run) == before


def test_the_flags_name_every_precision_and_kit():
    assert tuple(export_precision.PRECISIONS) == export_cli.PRECISIONS
    assert set(kits.FILES) == set(export_cli.KITS)


def test_help_of_export_lists_every_option():
    for name in inspect.signature(smallm.export.export).parameters:
        assert f"\n    {name}: " in inspect.getdoc(smallm.export.export)
