"""smallm.export.portable_graph: standard operators only, with the same logits and the same interface."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from toys import manifest_of, random_model, save_onnx

from smallm import LanguageModel
from smallm.cli import main as cli
from smallm.export import folder as export_folder
from smallm.export.parity import TOLERANCE, check_parity
from smallm.export.portable_graph import PORTABLE_FILE, build_portable
from smallm.inference.session import Session
from smallm.language_model import MODEL_FILE

SHAPES = {
    "heads of 16, two of four shared": {},
    "no sharing, heads of 32": {"n_head": 2, "n_kv_head": 0},
    "three of three heads, of 48": {"n_head": 3, "n_kv_head": 3, "n_embd": 144},
    "no table of the first layer": {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32},
    "a context of one": {"block_size": 1},
    "attention over five positions": {"window": 5},
    "over one position": {"window": 1},
    "another base, odd context, narrow": {"rope_theta": 500.0, "block_size": 37, "n_inner": 24},
}


def save_portable(model, path: Path) -> Path:
    proto = build_portable(model, manifest_of(model))
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    return path


def empty_cache(model, batch: int, positions: int = 0) -> dict[str, np.ndarray]:
    c = model.config
    zeros = np.zeros((batch, c.kv_heads, positions, c.head_dim), np.float32)
    return {f"past_key_values.{i}.{part}": zeros for i in range(c.n_layer) for part in ("key", "value")}


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).numpy()


@pytest.fixture
def model():
    return random_model()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_pytorch(config, tmp_path):
    """Whole, in chunks and one by one; with caches that grow and, through `KVCache`, in a buffer that is shared."""
    model = random_model(**config)
    assert 0 < check_parity(model, save_portable(model, tmp_path / "p.onnx")) < 5e-5


def test_only_standard_operators(model, tmp_path):
    proto = onnx.load(save_portable(model, tmp_path / "p.onnx"))
    assert proto.ir_version == 8
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 17)]
    for node in proto.graph.node:
        assert node.domain == ""
        assert onnx.defs.has(node.op_type, 17, "")


def test_inputs_outputs_and_metadata_are_those_of_the_other_file(model, tmp_path):
    def described(path):
        proto = onnx.load(path)
        return ([*proto.graph.input], [*proto.graph.output], {p.key: p.value for p in proto.metadata_props})

    assert described(save_portable(model, tmp_path / "p.onnx")) == described(save_onnx(model, tmp_path / "model.onnx"))


@pytest.mark.parametrize("keep", [0, 1, 2, None])
def test_the_reference_evaluator(model, tmp_path, keep):
    evaluator = ReferenceEvaluator(str(save_portable(model, tmp_path / "p.onnx")))
    ids = np.random.default_rng(3).integers(0, model.vocab_size, (2, 9))
    expected, feeds = torch_logits(model, ids), {} if keep is None else {"num_logits_to_keep": np.array(keep)}
    first = {"input_ids": ids[:, :5], "attention_mask": np.ones((2, 5), np.int64), **empty_cache(model, 2)}
    logits, *present = evaluator.run(None, first | feeds)
    assert [array.shape for array in present] == [(2, 2, 5, 16)] * 4
    assert np.abs(logits - expected[:, 5 - (keep or 5) : 5]).max() < TOLERANCE
    past = dict(zip(empty_cache(model, 2), present, strict=True))
    rest = {"input_ids": ids[:, 5:], "attention_mask": np.ones((2, 9), np.int64), **past}
    logits, *present = evaluator.run(None, rest | feeds)
    assert np.abs(logits - expected[:, 9 - (keep or 4) :]).max() < TOLERANCE


def test_a_past_with_room_is_written_into(model, tmp_path):
    """Texts of different lengths in one buffer, each mask with zeros at its end, as `KVCache` has them."""
    session = ort.InferenceSession(save_portable(model, tmp_path / "p.onnx"), providers=["CPUExecutionProvider"])
    ids, lengths = np.random.default_rng(4).integers(0, model.vocab_size, (2, 8)), np.array([3, 7])
    past, mask = empty_cache(model, 2, 16), np.zeros((2, 16), np.int64)
    for t in range(7):
        for row in np.flatnonzero(t < lengths):
            mask[row, t] = 1
            one = {name: array[row : row + 1] for name, array in past.items()}
            feeds = {"input_ids": ids[row : row + 1, t : t + 1], "attention_mask": mask[row : row + 1], **one}
            for name, present in zip(past, session.run(None, feeds)[1:], strict=True):
                assert present.shape == (1, 2, 16, 16)
                past[name] = np.concatenate([present if i == row else past[name][i : i + 1] for i in range(2)])
    mask[[0, 1], lengths] = 1
    logits = session.run(["logits"], {"input_ids": ids[[0, 1], lengths][:, None], "attention_mask": mask, **past})[0]
    for row, length in enumerate(lengths):
        expected = torch_logits(model, ids[row : row + 1, : length + 1])[0, -1]
        assert np.abs(logits[row, 0] - expected).max() < TOLERANCE


def test_language_model_writes_and_scores_the_same(model, tmp_path):
    fused, portable = (
        LanguageModel.load(save(model, tmp_path / name))
        for save, name in ((save_onnx, "model.onnx"), (save_portable, "p.onnx"))
    )
    options = {"max_length": 40, "temperature": 0.9, "rng_seed": 5}
    for overflow in ("crop", "shift"):
        text = portable.generate("né", overflow=overflow, **options)
        assert text == fused.generate("né", overflow=overflow, **options)
    seeds = ["a", "Zoë", "中 and more"]
    assert portable.generate_many(seeds, **options) == fused.generate_many(seeds, **options)
    text = "an owl €10, in two windows and more"
    assert np.allclose(portable.score(text), fused.score(text), atol=1e-4, equal_nan=True)


# -- the command


def test_export_writes_the_portable_graph(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(cli.export, [str(tiny_run), "--portable", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out / PORTABLE_FILE}: " in printed
    fused, portable = Session(out / MODEL_FILE), Session(out / PORTABLE_FILE)
    ids = np.arange(60, 90).reshape(1, 30)
    assert np.abs(fused.logits(ids) - portable.logits(ids)).max() < TOLERANCE
    quality = portable.manifest.quality
    assert quality["bits_per_char"] == pytest.approx(fused.manifest.quality["bits_per_char"], abs=1e-4)
    assert PORTABLE_FILE in (out / "README.md").read_text(encoding="utf-8")
    # without the flag the next export has none
    assert cli.run(cli.export, [str(tiny_run), "--out", str(out)]) == 0
    assert not (out / PORTABLE_FILE).exists()


def test_the_portable_graph_of_an_int4_export_is_fp32(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [str(tiny_run), "--portable", "--precision", "int4", "--allow-loss", "--out", str(out)]
    assert cli.run(cli.export, argv) == 0
    assert "int4 costs" in capsys.readouterr().out
    assert [Session(out / name).manifest.precision for name in (MODEL_FILE, PORTABLE_FILE)] == ["int4", "fp32"]
    sidecar = json.loads((out / "smallm.json").read_text(encoding="utf-8"))
    assert sidecar["precision"] == "int4"


def test_a_wrong_graph_is_not_exported(tiny_run, tmp_path, monkeypatch, capsys):
    def wrong(model, manifest):
        proto = build_portable(model, manifest)
        (node,) = (node for node in proto.graph.node if node.name == "/future")
        node.op_type = "Less"
        return proto

    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    monkeypatch.setattr(export_folder, "build_portable", wrong)
    assert cli.run(cli.export, [str(run), "--portable"]) == 2
    assert capsys.readouterr().err.startswith("smallm: the exported graph differs from the PyTorch model")
    assert not (run / "export").exists()
