"""The ONNX graph of a model, built node by node from its weights.

Inputs and outputs bear the names that onnxruntime-genai and Hugging Face's tools expect:

    input_ids (batch_size, sequence_length), attention_mask (batch_size, total_sequence_length),
    past_key_values.N.key/value (batch_size, n_kv_head, past_sequence_length, head_dim)
    -> logits (batch_size, positions, vocab_size), present.N.key/value (as past, with the new positions)

and the optional num_logits_to_keep, a scalar: 1 = logits of the last position only, 0 (its default) = of all. Past and
present may be one buffer. Attention is `com.microsoft.GroupQueryAttention`, which ONNX Runtime has on every platform.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from smallm.manifest import Manifest
from smallm.training.functions import NORM_EPS
from smallm.training.model import TransformerLanguageModel, rotary_tables

OPSET, IR_VERSION = 17, 8  # read by ONNX Runtime from 1.20 to today
MICROSOFT = "com.microsoft"
INT64_MAX = np.iinfo(np.int64).max


def build_graph(model: TransformerLanguageModel, manifest: Manifest) -> onnx.ModelProto:
    """The graph with the model's weights and, in `metadata_props`, the manifest."""
    return _Graph(model).build(manifest)


class _Graph:
    """Collects nodes and initialisers. Comments give shapes: B batch, T time, C channels, V vocabulary, hd head."""

    def __init__(self, model: TransformerLanguageModel):
        self.model, self.config = model, model.config
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.weights = {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}

    def build(self, manifest: Manifest) -> onnx.ModelProto:
        c = self.config
        self._positions()
        stream = self._add("Gather", "/wte", self._weight("wte"), "input_ids")  # (B, T, C)
        normed = self._norm("/h.0/ln_1", stream, self._weight("h.0.ln_1"))
        for i in range(c.n_layer):
            attended = self._attention(i, normed)
            normed, stream = self._add_and_norm(f"/h.{i}/ln_2", stream, attended, self._weight(f"h.{i}.ln_2"))
            changed = self._feed_forward(i, normed)
            following = f"h.{i + 1}.ln_1" if i + 1 < c.n_layer else "ln_f"
            normed, stream = self._add_and_norm(f"/{following}", stream, changed, self._weight(following))
        self._logits(normed)
        return self._model(manifest)

    def _positions(self) -> None:
        """What every attention node is told of the sequence: keys before the last one (B,), and the total length."""
        c = self.config
        total = self._add("ReduceSum", "/keys", "attention_mask", self._constant("axis_1", [1]), keepdims=0)  # (B,)
        last = self._add("Sub", "/last_key", total, self._constant("one", 1))
        self.seqlens_k = self._add("Cast", "/seqlens_k", last, to=TensorProto.INT32)
        shape = self._add("Shape", "/mask_shape", "attention_mask")
        length = self._add("Gather", "/mask_length", shape, self._constant("one", 1), axis=0)  # ()
        self.total_length = self._add("Cast", "/total_length", length, to=TensorProto.INT32)
        cos, sin = rotary_tables(c.head_dim, c.block_size, c.rope_theta)  # (block_size, hd / 2)
        self.cos, self.sin = self._constant("cos_cache", cos.numpy()), self._constant("sin_cache", sin.numpy())

    def _attention(self, i: int, x: str) -> str:
        """(B, T, C) -> (B, T, C). Queries and keys are normalised together: their gains are one (heads, hd) table."""
        c, at = self.config, f"/h.{i}/attn"
        heads = c.n_head + c.kv_heads
        qkv = self._matmul(f"{at}/c_attn", x, f"h.{i}.attn.c_attn")  # (B, T, (nh + 2 nkv) hd)
        sizes = self._constant("qk_v_sizes", [heads * c.head_dim, c.kv_heads * c.head_dim])
        qk, v = f"{at}/qk", f"{at}/v"
        self.nodes.append(helper.make_node("Split", [qkv, sizes], [qk, v], name=f"{at}/split", axis=-1))
        qk = self._add("Reshape", f"{at}/to_heads", qk, self._constant("to_heads", [0, 0, heads, c.head_dim]))
        qk = self._norm(f"{at}/qk_norm", qk, self._constant("ones", np.ones(c.head_dim, np.float32)))
        gains = [self.weights[f"h.{i}.attn.{x}_norm.weight"] for x in "qk"]
        table = np.repeat(np.stack(gains), (c.n_head, c.kv_heads), axis=0)  # (heads, hd)
        qk = self._add("Mul", f"{at}/gain", qk, self._constant(f"h.{i}.attn.qk_gain", table))
        qk = self._add("Reshape", f"{at}/from_heads", qk, self._constant("from_heads", [0, 0, heads * c.head_dim]))
        packed = self._add("Concat", f"{at}/packed", qk, v, axis=-1)
        y, outputs = f"{at}/y", [f"present.{i}.key", f"present.{i}.value"]
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        self.nodes.append(helper.make_node(
            "GroupQueryAttention",
            [packed, "", "", *past, self.seqlens_k, self.total_length, self.cos, self.sin],
            [y, *outputs], name=f"{at}/attention", domain=MICROSOFT,
            num_heads=c.n_head, kv_num_heads=c.kv_heads, do_rotary=1,
        ))  # fmt: skip
        return self._matmul(f"{at}/c_proj", y, f"h.{i}.attn.c_proj")

    def _feed_forward(self, i: int, x: str) -> str:
        """(B, T, C) -> (B, T, C)."""
        at, inner = f"/h.{i}/mlp", self.config.inner
        both = self._matmul(f"{at}/c_fc", x, f"h.{i}.mlp.c_fc")  # (B, T, 2 inner)
        gate, up = f"{at}/gate", f"{at}/up"
        sizes = self._constant("gate_up_sizes", [inner, inner])
        self.nodes.append(helper.make_node("Split", [both, sizes], [gate, up], name=f"{at}/split", axis=-1))
        silu = self._add("QuickGelu", f"{at}/silu", gate, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(alpha * x)
        gated = self._add("Mul", f"{at}/gated", silu, up)
        return self._matmul(f"{at}/c_proj", gated, f"h.{i}.mlp.c_proj")

    def _logits(self, x: str) -> None:
        """Cuts off the positions whose logits nobody asked for; the embedding is the output matrix too."""
        start = self._add("Neg", "/first_kept", "num_logits_to_keep")  # -0 = from the beginning
        start = self._add("Reshape", "/first_kept_1d", start, self._constant("shape_1", [1]))
        end, axis = self._constant("end", [INT64_MAX]), self._constant("axis_1", [1])
        kept = self._add("Slice", "/kept", x, start, end, axis)
        head = self._add("Transpose", "/lm_head", self._weight("wte"), perm=[1, 0])  # folded when the file is loaded
        self.nodes.append(helper.make_node("MatMul", [kept, head], ["logits"], name="/logits"))

    def _model(self, manifest: Manifest) -> onnx.ModelProto:
        c = self.config
        ids = [("input_ids", "sequence_length"), ("attention_mask", "total_sequence_length")]
        inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch_size", length]) for n, length in ids]
        # The number of dimensions is fixed, the names are a contract: transformers.js sizes an empty cache by them.
        past = ["batch_size", c.kv_heads, "past_sequence_length", c.head_dim]
        present = ["batch_size", c.kv_heads, "total_sequence_length", c.head_dim]
        logits = ["batch_size", "positions", manifest.vocab_size]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
        for i in range(c.n_layer):
            for part in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{part}", TensorProto.FLOAT, past))
                outputs.append(helper.make_tensor_value_info(f"present.{i}.{part}", TensorProto.FLOAT, present))
        inputs.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []))
        self._constant("num_logits_to_keep", 0)  # an input with an initialiser has a default
        graph = helper.make_graph(self.nodes, "smallm", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="smallm")
        helper.set_model_props(model, manifest.to_metadata())
        return model

    # Small words for the above.

    def _add(self, kind: str, name: str, *inputs: str, domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def _norm(self, name: str, x: str, gain: str) -> str:
        return self._add("SimplifiedLayerNormalization", name, x, gain, axis=-1, epsilon=NORM_EPS, stash_type=1)

    def _add_and_norm(self, name: str, x: str, change: str, gain: str) -> tuple[str, str]:
        """The norm of x + change, and x + change itself."""
        outputs = [name, "", "", f"{name}/sum"]
        kind = "SkipSimplifiedLayerNormalization"
        node = helper.make_node(kind, [x, change, gain], outputs, name=name, domain=MICROSOFT, epsilon=NORM_EPS)
        self.nodes.append(node)
        return name, f"{name}/sum"

    def _matmul(self, name: str, x: str, weight: str) -> str:
        matrix = self._constant(f"{weight}.weight_t", np.ascontiguousarray(self.weights[f"{weight}.weight"].T))
        return self._add("MatMul", name, x, matrix)

    def _weight(self, name: str) -> str:
        return self._constant(f"{name}.weight", self.weights[f"{name}.weight"])

    def _constant(self, name: str, value) -> str:
        """An initialiser, added at its first use; whole numbers become int64."""
        if name not in self.initializers:
            array = value if isinstance(value, np.ndarray) else np.array(value, dtype=np.int64)
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name
