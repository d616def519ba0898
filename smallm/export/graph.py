"""The ONNX graph of a model, built node by node from its weights.

Inputs and outputs have the names that onnxruntime-genai and Hugging Face's tools expect:

    input_ids (batch_size, sequence_length), attention_mask (batch_size, total_sequence_length),
    past_key_values.N.key/value (batch_size, n_kv_head, past_sequence_length, head_dim)
    -> logits (batch_size, positions, vocab_size), present.N.key/value (as past, with the new positions)

The optional input num_logits_to_keep is a scalar: 1 = logits of the last position only, 0 (the default) = logits of
all positions. Past and present may share one buffer. attention_mask may be longer than the text, with zeros at the end;
with a shared buffer only input_ids and one element of the mask change from one id to the next. Attention is
`com.microsoft.GroupQueryAttention`, which ONNX Runtime provides on every platform.

A small model spends its time on the overhead of nodes, not on arithmetic, so the graph has few nodes: queries and keys
of all heads are normalised together, gate and up projection are one product, each residual sum is fused with the norm
after it, and the first layer's queries, keys and values are looked up in a table with one row per id.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from smallm.export.quantisation import Quantised
from smallm.model_file.manifest import Manifest
from smallm.training.model.operations import NORM_EPS
from smallm.training.model.transformer import TransformerLanguageModel, rotary_tables

OPSET, IR_VERSION = 17, 8  # read by ONNX Runtime from 1.20 to today
MICROSOFT = "com.microsoft"
INT64_MAX = np.iinfo(np.int64).max
EXACT, INT8_INPUTS = 0, 4  # accuracy levels of MatMulNBits: fp32 arithmetic; inputs rounded to 8 bits, per block


def build_graph(
    model: TransformerLanguageModel, manifest: Manifest, quantised: Mapping[str, Quantised] | None = None
) -> onnx.ModelProto:
    """The ONNX model with the weights and, in `metadata_props`, the manifest.

    quantised: parameter name -> quantised matrix; all other parameters are stored in fp32.
    """
    return Graph(model, quantised or {}).build(manifest)


def has_table(model: TransformerLanguageModel) -> bool:
    """Whether the first layer's queries, keys and values come from a table with one row per id: if it is small."""
    return model.vocab_size <= 4 * model.config.n_embd


def set_accuracy(proto: onnx.ModelProto, level: int) -> None:
    """Sets the accuracy level, `EXACT` or `INT8_INPUTS`, of all products with quantised matrices."""
    for attribute in (each for node in proto.graph.node for each in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = level


class Graph:
    """Collects nodes and initialisers.

    Shapes in comments: B batch, T time, C channels, V vocabulary, nh query heads, nkv key/value heads, hd head_dim.
    `PortableGraph` overrides the methods for which standard ONNX has no fused operator.
    """

    domains: tuple[str, ...] = ("", MICROSOFT)
    """Domains of the operators."""

    def __init__(self, model: TransformerLanguageModel, quantised: Mapping[str, Quantised]):
        self.model, self.config, self.quantised = model, model.config, quantised
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.weights = {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}

    def build(self, manifest: Manifest) -> onnx.ModelProto:
        c = self.config
        self._positions()
        stream = self._add("Gather", "/wte", self._weight("wte"), "input_ids")  # (B, T, C)
        if has_table(self.model):
            packed = self._add("Gather", "/h.0/attn/packed", self._constant("qkv_table", self._table()), "input_ids")
        else:
            packed = self._packed(0, self._norm("/h.0/ln_1", stream, self._weight("h.0.ln_1")))
        for i in range(c.n_layer):
            attended = self._attention(i, packed)
            normed, stream = self._add_and_norm(f"/h.{i}/ln_2", stream, attended, self._weight(f"h.{i}.ln_2"))
            changed = self._feed_forward(i, normed)
            following = f"h.{i + 1}.ln_1" if i + 1 < c.n_layer else "ln_f"
            normed, stream = self._add_and_norm(f"/{following}", stream, changed, self._weight(following))
            packed = self._packed(i + 1, normed) if i + 1 < c.n_layer else ""
        self._logits(normed)
        return self._model(manifest)

    def _positions(self) -> None:
        """Inputs shared by all attention nodes: index of the last key (B,), length of the mask (1,), RoPE tables.

        onnxruntime-genai pads a batch on the right, and the mask has ones again after the padding: the new keys of a
        sequence replace its padding, so the index is the number of ones, less one, not the place of the last one.
        """
        ones = self._add("ReduceSum", "/mask_sum", "attention_mask", self._constant("axis_1", [1]), keepdims=0)
        last = self._add("Add", "/last_key", ones, self._constant("backwards", [-1]))
        self.seqlens_k = self._add("Cast", "/seqlens_k", last, to=TensorProto.INT32)
        length = self._add("Shape", "/mask_length", "attention_mask", start=1, end=2)
        self.total_length = self._add("Cast", "/total_length", length, to=TensorProto.INT32)
        self.cos, self.sin = self._rotary_rows()

    def _rotary_rows(self) -> tuple[str, str]:
        """Cosines and sines of all positions (block_size, hd / 2)."""
        cos, sin = rotary_tables(self.config.head_dim, self.config.block_size, self.config.rope_theta)
        return self._constant("cos_cache", cos.numpy()), self._constant("sin_cache", sin.numpy())

    def _packed(self, i: int, x: str) -> str:
        """(B, T, C) -> queries, keys, values (B, T, (nh + 2 nkv) hd), the first two normalised, all heads at once."""
        c, at = self.config, f"/h.{i}/attn"
        heads = c.n_head + c.kv_heads
        qkv = self._matmul(f"{at}/c_attn", x, f"h.{i}.attn.c_attn")
        sizes = self._constant("qk_v_sizes", [heads * c.head_dim, c.kv_heads * c.head_dim])
        qk, v = self._split(f"{at}/split", qkv, sizes, f"{at}/qk", f"{at}/v")
        qk = self._add("Reshape", f"{at}/to_heads", qk, self._constant("to_heads", [0, 0, heads, c.head_dim]))
        qk = self._norm(f"{at}/qk_norm", qk, self._constant("ones", np.ones(c.head_dim, np.float32)))
        qk = self._add("Mul", f"{at}/gain", qk, self._constant(f"h.{i}.attn.qk_gain", self._qk_gain(i)))
        qk = self._add("Reshape", f"{at}/from_heads", qk, self._constant("from_heads", [0, 0, heads * c.head_dim]))
        return self._add("Concat", f"{at}/packed", qk, v, axis=-1)

    def _qk_gain(self, i: int) -> np.ndarray:
        """(heads, hd): the gains of the queries, multiplied by attention's scale, then the gains of the keys.

        The attention kernel is faster with a scale of 1.
        """
        c = self.config
        q, k = (self.weights[f"h.{i}.attn.{x}_norm.weight"] for x in "qk")
        return np.repeat(np.stack((q * np.float32(c.head_dim**-0.5), k)), (c.n_head, c.kv_heads), axis=0)

    def _table(self) -> np.ndarray:
        """(V, (nh + 2 nkv) hd): the first layer's queries, keys and values, which depend on the id alone."""
        c, w = self.config, {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        heads = c.n_head + c.kv_heads
        qkv = (_rms_norm(w["wte.weight"]) * w["h.0.ln_1.weight"]) @ w["h.0.attn.c_attn.weight"].T
        qk, v = np.split(qkv, [heads * c.head_dim], axis=1)
        qk = _rms_norm(qk.reshape(-1, heads, c.head_dim)) * self._qk_gain(0)
        return np.concatenate((qk.reshape(len(v), -1), v), axis=1).astype(np.float32)

    def _attention(self, i: int, packed: str) -> str:
        """(B, T, (nh + 2 nkv) hd) -> (B, T, C)."""
        c, at = self.config, f"/h.{i}/attn"
        y, *present = f"{at}/y", f"present.{i}.key", f"present.{i}.value"
        self._add("GroupQueryAttention", f"{at}/attention", packed, "", "", f"past_key_values.{i}.key",
                  f"past_key_values.{i}.value", self.seqlens_k, self.total_length, self.cos, self.sin,
                  outputs=[y, *present], domain=MICROSOFT, num_heads=c.n_head, kv_num_heads=c.kv_heads, do_rotary=1,
                  scale=1.0, local_window_size=c.window or -1)  # fmt: skip
        return self._matmul(f"{at}/c_proj", y, f"h.{i}.attn.c_proj")

    def _feed_forward(self, i: int, x: str) -> str:
        """(B, T, C) -> (B, T, C)."""
        at, inner = f"/h.{i}/mlp", self.config.inner
        both = self._matmul(f"{at}/c_fc", x, f"h.{i}.mlp.c_fc")  # (B, T, 2 inner)
        sizes = self._constant("gate_up_sizes", [inner, inner])
        gate, up = self._split(f"{at}/split", both, sizes, f"{at}/gate", f"{at}/up")
        gated = self._add("Mul", f"{at}/gated", self._silu(f"{at}/silu", gate), up)
        return self._matmul(f"{at}/c_proj", gated, f"h.{i}.mlp.c_proj")

    def _logits(self, x: str) -> None:
        """Logits of the positions that num_logits_to_keep asks for; the embedding is also the output matrix."""
        start = self._add("Mul", "/first_kept", "num_logits_to_keep", self._constant("backwards", [-1]))  # 0: all
        end, axis = self._constant("end", [INT64_MAX]), self._constant("axis_1", [1])
        kept = self._add("Slice", "/kept", x, start, end, axis)
        if "wte.weight" in self.quantised:
            self._matmul("logits", kept, "wte")
        else:
            head = self._add("Transpose", "/lm_head", self._weight("wte"), perm=[1, 0])  # folded at load
            self._add("MatMul", "logits", kept, head)

    def _model(self, manifest: Manifest) -> onnx.ModelProto:
        c = self.config
        ids = [("input_ids", "sequence_length"), ("attention_mask", "total_sequence_length")]
        inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch_size", length]) for n, length in ids]
        # transformers.js sizes its empty cache by the number and the names of these dimensions.
        past: list[str | int] = ["batch_size", c.kv_heads, "past_sequence_length", c.head_dim]
        present: list[str | int] = ["batch_size", c.kv_heads, "total_sequence_length", c.head_dim]
        logits: list[str | int] = ["batch_size", "positions", manifest.vocab_size]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
        for i in range(c.n_layer):
            for part in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{part}", TensorProto.FLOAT, past))
                outputs.append(helper.make_tensor_value_info(f"present.{i}.{part}", TensorProto.FLOAT, present))
        inputs.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []))
        self._constant("num_logits_to_keep", 0)  # an input with an initialiser has a default
        graph = helper.make_graph(self.nodes, "smallm", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid(domain, 1 if domain else OPSET) for domain in self.domains]
        model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="smallm")
        helper.set_model_props(model, manifest.to_metadata())
        return model

    # Helpers that add nodes.

    def _add(self, kind: str, name: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Adds a node, whose output has the same name unless `outputs` are given."""
        self.nodes.append(helper.make_node(kind, inputs, outputs or [name], name=name, **attributes))
        return name

    def _split(self, name: str, x: str, sizes: str, *outputs: str, axis: int = -1) -> tuple[str, ...]:
        self._add("Split", name, x, sizes, outputs=outputs, axis=axis)
        return outputs

    def _norm(self, name: str, x: str, gain: str) -> str:
        return self._add("SimplifiedLayerNormalization", name, x, gain, axis=-1, epsilon=NORM_EPS, stash_type=1)

    def _add_and_norm(self, name: str, x: str, change: str, gain: str) -> tuple[str, str]:
        """Returns the norm of x + change, and x + change."""
        self._add("SkipSimplifiedLayerNormalization", name, x, change, gain,
                  outputs=[name, "", "", f"{name}/sum"], domain=MICROSOFT, epsilon=NORM_EPS)  # fmt: skip
        return name, f"{name}/sum"

    def _silu(self, name: str, x: str) -> str:
        return self._add("QuickGelu", name, x, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(alpha * x)

    def _matmul(self, name: str, x: str, weight: str) -> str:
        weights, q = self.weights[f"{weight}.weight"], self.quantised.get(f"{weight}.weight")
        if q is None:
            return self._add("MatMul", name, x, self._constant(f"{weight}.weight_t", np.ascontiguousarray(weights.T)))
        codes = self._constant(f"{weight}.codes", q.packed())
        scales = self._constant(f"{weight}.scales", q.scales.reshape(-1))
        N, K = weights.shape
        return self._add("MatMulNBits", name, x, codes, scales, domain=MICROSOFT,
                         K=K, N=N, bits=q.bits, block_size=q.block, accuracy_level=INT8_INPUTS)  # fmt: skip

    def _weight(self, name: str) -> str:
        return self._constant(f"{name}.weight", self.weights[f"{name}.weight"])

    def _constant(self, name: str, value: np.ndarray | list[int] | int) -> str:
        """Adds an initialiser unless it exists, and returns its name; lists and ints become int64."""
        if name not in self.initializers:
            array = value if isinstance(value, np.ndarray) else np.array(value, dtype=np.int64)
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name


def _rms_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + NORM_EPS)
