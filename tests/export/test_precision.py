"""smallm.export.precision: quantised matrices lose little, the loss is measured, and a large loss stops the export."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from test_export import contents, run, run_export  # noqa: F401 (a fixture)
from toys import manifest_of, random_model, save_onnx

from smallm import LanguageModel, UserError
from smallm.export import folder as export_folder
from smallm.export import precision as export_precision
from smallm.export.calibration import generated_ids, second_moments
from smallm.export.folder import export_checkpoint
from smallm.export.parity import TOLERANCE
from smallm.export.precision import PRECISIONS, write_quantised
from smallm.export.quantisation import Quantised, gptq, largest_block, round_to_nearest
from smallm.inference.kv_cache import KVCache
from smallm.inference.session import Session
from smallm.language_model import MODEL_FILE
from smallm.training.checkpoint.manager import best_checkpoint

SHAPES = {
    "heads of 16, two of four shared": {},
    "narrower than a block": {"n_layer": 1, "n_head": 2, "n_embd": 32},
    "rows that are not whole blocks": {"n_embd": 192, "n_inner": 352},
    "no table: more characters than it is worth": {"n_embd": 48, "n_head": 3, "n_kv_head": 1},
    "window of one": {"block_size": 1},
}


def correlated(N, K, rows=2000):
    """A matrix (N, K), and inputs (rows, K) that are correlated like activations."""
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(rows, K // 4)) @ rng.normal(size=(K // 4, K)) + 0.3 * rng.normal(size=(rows, K))
    return rng.normal(size=(N, K)).astype(np.float32), inputs


# -- matrices


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("K", "block"), [(64, 16), (64, 64), (70, 32), (20, 32), (1, 16)])
def test_rounding_is_off_by_half_a_step_at_most(bits, K, block):
    weights = np.random.default_rng(1).normal(size=(7, K)).astype(np.float32)
    weights[2] = 0
    matrix = round_to_nearest(weights, bits, block)
    assert matrix.codes.shape == (7, -(-K // block), block)
    assert matrix.scales.shape == matrix.codes.shape[:2]
    error = np.abs(matrix.dequantised() - weights).max(axis=1)
    step = np.abs(matrix.scales).max(axis=1)
    assert (error <= step * 1.0001).all()  # a whole step at the shorter end
    assert np.median(np.abs(matrix.dequantised() - weights)) < 0.3 * np.median(step)
    assert not matrix.dequantised()[2].any()


def test_two_codes_of_four_bits_share_a_byte():
    codes = np.arange(32, dtype=np.uint8).reshape(1, 2, 16) % 16
    packed = Quantised(codes, np.ones((1, 2), np.float32), 4, 32).packed()
    assert packed.shape == (1, 2, 8)
    assert packed[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]


@pytest.mark.parametrize(("K", "block"), [(64, 16), (64, 64), (70, 32), (20, 64)])
def test_gptq_beats_rounding_for_correlated_inputs(K, block):
    weights, inputs = correlated(24, K)

    def error(matrix):
        return np.square(inputs @ (matrix.dequantised() - weights).T).mean()

    fitted = gptq(weights, inputs.T @ inputs, 4, block)
    assert fitted.codes.shape == round_to_nearest(weights, 4, block).codes.shape
    assert error(fitted) < 0.6 * error(round_to_nearest(weights, 4, block))


def test_gptq_with_inputs_that_are_always_zero():
    weights, inputs = correlated(8, 32)
    inputs[:, 5:20] = 0
    assert np.isfinite(gptq(weights, inputs.T @ inputs, 4, 16).dequantised()).all()


@pytest.mark.parametrize(("inputs", "block"), [(1, 16), (16, 16), (48, 32), (64, 64), (352, 256)])
def test_largest_block(inputs, block):
    assert largest_block(inputs) == block


# -- what goes through them


def test_calibration_uses_text_of_the_model(tmp_path):
    path = save_onnx(random_model(), tmp_path / "model.onnx")
    ids = generated_ids(path)
    assert ids.shape == (32, 16)
    assert ids.max() < 262
    assert len({tuple(row) for row in ids.tolist()}) == 32
    assert (generated_ids(path) == ids).all()


def test_second_moments_are_those_of_the_inputs():
    model, ids = random_model(), np.random.default_rng(2).integers(0, 262, (3, 9))
    moments = second_moments(model, ids)
    with torch.no_grad():
        x = model.h[0].ln_1(model.wte(torch.from_numpy(ids))).double().flatten(0, 1).numpy()
    np.testing.assert_allclose(moments["h.0.attn.c_attn.weight"], x.T @ x, rtol=1e-5, atol=1e-5)
    assert {f"h.{i}.{part}.weight" for i in (0, 1) for part in
            ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")} == set(moments)  # fmt: skip
    assert not model.h[0].mlp.c_fc._forward_pre_hooks


# -- graphs


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_graph_computes_what_pytorch_does_with_the_same_matrices(config, name, tmp_path):
    model, path = random_model(**config), tmp_path / "model.onnx"
    save_onnx(model, path)
    assert 0 < write_quantised(model, manifest_of(model, precision=name), path, PRECISIONS[name]) < TOLERANCE
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    quantised = kinds.count("MatMulNBits") + kinds.count("MatMul") - (name == "int4")
    assert quantised == 4 * model.config.n_layer + (name == "int8") - ("qkv_table" in str(onnx.load(path).graph.node))
    KVCache(Session(path)).prefill(np.array([65]))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rounding_the_inputs_too_changes_little(name, tmp_path):
    """The file runs with inputs in 8 bits: passes of one id and of all ids give nearly the same logits."""
    model, path = random_model(n_embd=128), tmp_path / "model.onnx"
    save_onnx(model, path)
    write_quantised(model, manifest_of(model, precision=name), path, PRECISIONS[name])
    session, ids = Session(path), np.arange(65, 77)
    whole, cache = session.logits(ids[None])[0], KVCache(session)
    for t, id in enumerate(ids):
        assert np.abs(cache.prefill(np.array([id])) - whole[t]).max() < 1e-3
    levels = {a.i for n in onnx.load(path).graph.node for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {4}


# -- exports


def test_int8_export_states_its_loss(run, capsys):  # noqa: F811
    code, out, err = run_export(capsys, run, "--precision", "int8", "--allow-loss")  # 0.002 is little for 32 channels
    assert (code, err) == (0, "")
    _, header, fp32, int8, cost, _ = out.splitlines()
    assert header.split() == ["precision", "MB", "bits/char", "characters/s", "ONNX", "Runtime"]
    assert (fp32.split()[0], int8.split()[0]) == ("fp32", "int8")
    model = LanguageModel.load(run)
    quality = model.metadata.quality
    assert (model.metadata.precision, quality["precision"], quality["onnxruntime"]) == ("int8", "int8", "1.23")
    text = (run / "validation.txt").read_text(encoding="utf-8")
    assert quality["characters"] == len(text) - 1
    assert quality["bits_per_char"] == pytest.approx(model.perplexity(text).bits_per_char)
    assert abs(quality["loss"]) < 0.004
    assert cost == f"int8 costs {quality['loss']:.4f} bits per character"
    assert quality["chars_per_second"] > 0
    assert abs((run / "export" / MODEL_FILE).stat().st_size - quality["bytes"]) < 1000
    assert json.loads((run / "export" / "smallm.json").read_text(encoding="utf-8"))["quality"] == quality
    assert len(model.generate("the ", 50)) == 54


def test_the_loss_of_fp32_is_measured(exported):
    quality = Session(exported / MODEL_FILE).manifest.quality
    assert (quality["precision"], quality["loss"], quality["onnxruntime"]) == ("fp32", None, "1.21")
    assert 1 < quality["bits_per_char"] < 2


def test_int4_is_smaller_than_int8(run, capsys):  # noqa: F811
    sizes = {}
    for name in ("fp32", "int8", "int4"):
        code, _, err = run_export(capsys, run, "--precision", name, "--allow-loss")
        assert (code, err) == (0, "")
        proto = onnx.load(run / "export" / MODEL_FILE)
        sizes[name] = sum(t.ByteSize() for t in proto.graph.initializer if t.name.startswith("h.1."))
    assert sizes["int4"] < 0.6 * sizes["int8"] < 0.4 * sizes["fp32"]
    assert len(LanguageModel.load(run).generate("the ", 50)) == 54


def test_too_large_a_loss_stops_the_export(run, monkeypatch, capsys):  # noqa: F811
    """Seven codes instead of 256."""

    def coarse(weights, bits, block):
        matrix = round_to_nearest(weights, bits, block)
        codes = 128 + 40 * np.rint((matrix.codes.astype(int) - 128) / 40).clip(-3, 3)
        return replace(matrix, codes=codes.astype(np.uint8))

    monkeypatch.setattr(export_precision, "round_to_nearest", coarse)
    before = contents(run)
    code, out, err = run_export(capsys, run, "--precision", "int8")
    assert (code, out) == (2, "")
    assert err.startswith("smallm: int8 loses 0.")
    assert err.endswith("; choose another --precision, or pass --allow-loss\n")
    assert err.count("\n") == 1
    assert contents(run) == before


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_limit_decides(run, monkeypatch, name):  # noqa: F811
    checkpoint, out = best_checkpoint(run), run / "export"
    loss = export_checkpoint(checkpoint, out, name, allow_loss=True).measured[-1].loss
    for limit, allowed in ((loss + 1e-6, True), (loss - 1e-6, False)):
        monkeypatch.setitem(PRECISIONS, name, replace(PRECISIONS[name], max_loss=limit))
        if allowed:
            assert export_checkpoint(checkpoint, out, name).measured[-1].loss == pytest.approx(loss, abs=1e-9)
        else:
            with pytest.raises(UserError, match=f"^{name} loses .* at most .* is allowed, so nothing was written"):
                export_checkpoint(checkpoint, out, name)


def test_without_a_validation_text(run, capsys):  # noqa: F811
    (run / "validation.txt").unlink()
    code, out, err = run_export(capsys, run, "--precision", "int8")
    assert (code, out) == (2, "")
    assert err.startswith("smallm: there is no validation text to measure the loss of int8 on; ")
    assert not (run / "export").exists()
    code, out, err = run_export(capsys, run, "--precision", "int8", "--allow-loss")
    assert (code, err) == (0, "")
    assert Session(run / "export" / MODEL_FILE).manifest.quality["bits_per_char"] is None
    assert run_export(capsys, run)[0] == 0  # nothing to lose


def test_a_broken_matrix_is_not_exported(run, monkeypatch, capsys):  # noqa: F811
    def broken_graph(model, manifest, quantised=None):
        proto = build_graph(model, manifest, quantised)
        for tensor in proto.graph.initializer:
            if tensor.name == "h.1.mlp.c_fc.codes":
                tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, axis=0), tensor.name))
        return proto

    build_graph = export_precision.build_graph
    monkeypatch.setattr(export_precision, "build_graph", broken_graph)
    code, out, err = run_export(capsys, run, "--precision", "int8", "--allow-loss")
    assert (code, out) == (2, "")
    assert "differs from the PyTorch model" in err
    assert not (run / "export").exists()


def test_the_beginning_of_a_long_validation_text(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(export_folder, "MAX_MEASURED", 500)
    assert export_checkpoint(best_checkpoint(run), run / "export").measured[0].characters == 499


@pytest.mark.parametrize("argv", [["--precision"], ["--precision", "int2"], ["--precision", "fp16"]])
def test_unknown_precisions(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_export(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("smallm: argument --precision: ")


def test_a_runtime_too_old_for_the_file(tmp_path, monkeypatch):
    model, path = random_model(), tmp_path / "model.onnx"
    manifest = manifest_of(model, quality={"onnxruntime": "99.1"})
    proto = export_precision.build_graph(model, manifest)
    for node in proto.graph.node:  # a kernel that is not there
        if node.op_type == "QuickGelu":
            node.domain = ""
    onnx.save(proto, path)
    with pytest.raises(UserError, match=rf"needs ONNX Runtime 99.1 or newer, this is {ort.__version__}; install that"):
        Session(path)
