"""The same model in standard ONNX operators only, for engines other than ONNX Runtime.

Inputs and outputs are those of `graph.py`, including the shared buffer: new keys and values are written into the past
at the positions given by attention_mask. A past that is shorter than the mask, such as a cache of exactly the previous
ids, is padded to the length of the mask first. This graph is slower: nothing is fused, and every pass copies the cache.
"""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from smallm.export.graph import Graph
from smallm.model_file.manifest import Manifest
from smallm.training.model.operations import NORM_EPS
from smallm.training.model.transformer import TransformerLanguageModel

PORTABLE_FILE = "model.portable.onnx"


def build_portable(model: TransformerLanguageModel, manifest: Manifest) -> onnx.ModelProto:
    """Like `build_graph`, in fp32; the result passes `onnx.checker`."""
    return PortableGraph(model, {}).build(manifest)


class PortableGraph(Graph):
    """Shapes as in `Graph`, and g = nh / nkv query heads per key/value head, L positions in a cache."""

    domains = ("",)

    def _positions(self) -> None:
        """Adds positions of the new ids (B, T), hidden keys (B, 1, g T, L) and cache indices (B, nkv, T, hd)."""
        c, axis = self.config, self._constant
        end = self._add("ReduceSum", "/end", "attention_mask", axis("axis_1", [1]), keepdims=1)  # (B, 1)
        length = self._add("Shape", "/ids_length", "input_ids", start=1, end=2)  # (1,)
        first = self._add("Sub", "/before_first", end, length)
        first = self._add("Max", "/first", first, axis("zero", [0]))
        steps = self._range("/steps", length)
        positions = self._add("Add", "/positions", first, steps)  # (B, T)
        self._rotary_tables(positions)

        batch = self._add("Shape", "/batch", "input_ids", start=0, end=1)
        past = self._add("Shape", "/past_length", "past_key_values.0.key", start=2, end=3)
        mask = self._add("Shape", "/mask_length", "attention_mask", start=1, end=2)
        total = self._add("Max", "/cache_length", past, mask)  # L
        missing = self._add("Sub", "/missing", total, past)
        heads, channels = axis("kv_heads", [c.kv_heads]), axis("head_dim", [c.head_dim])
        shape = self._add("Concat", "/padding_shape", batch, heads, missing, channels, axis=0)
        empty = numpy_helper.from_array(np.zeros(1, np.float32))
        self.padding = self._add("ConstantOfShape", "/padding", shape, value=empty)  # (B, nkv, missing, hd)
        shape = self._add("Concat", "/indices_shape", batch, heads, length, channels, axis=0)
        column = self._add("Unsqueeze", "/position_column", positions, axis("axes_1_3", [1, 3]))  # (B, 1, T, 1)
        self.indices = self._add("Expand", "/indices", column, shape)  # (B, nkv, T, hd)

        keys = self._range("/keys", total)  # (L,)
        hidden = self._add("Greater", "/future", keys, column)  # (B, 1, T, L)
        if c.window:
            first_seen = self._add("Sub", "/first_seen", column, axis("window_minus_1", [c.window - 1]))
            hidden = self._add("Or", "/hidden_from_id", hidden, self._add("Less", "/before_window", keys, first_seen))
        repeats = axis("group_rows", [1, 1, c.n_head // c.kv_heads, 1])
        # Not all engines can tile booleans.
        as_float = self._add("Cast", "/hidden_as_float", hidden, to=TensorProto.FLOAT)
        repeated = self._add("Tile", "/hidden_repeated", as_float, repeats)
        self.hidden = self._add("Cast", "/hidden", repeated, to=TensorProto.BOOL)

    def _rotary_tables(self, positions: str) -> None:
        """Cosines and sines (B, T, 1, hd / 2)."""
        axes = self._constant("axis_2", [2])
        self.cos, self.sin = (
            self._add("Unsqueeze", f"/{name}_of_heads", self._add("Gather", f"/{name}", rows, positions), axes)
            for name, rows in zip(("cos", "sin"), self._rotary_rows(), strict=True)
        )

    def _attention(self, i: int, packed: str) -> str:
        """(B, T, (nh + 2 nkv) hd) -> (B, T, C)."""
        c, at = self.config, f"/h.{i}/attn"
        sizes = self._constant("head_sizes", [c.n_head + c.kv_heads, c.kv_heads])
        split = self._constant("split_heads", [0, 0, c.n_head + 2 * c.kv_heads, c.head_dim])
        heads = self._add("Reshape", f"{at}/heads", packed, split)
        qk, v = self._split(f"{at}/qk_heads/split", heads, sizes, f"{at}/qk_heads", f"{at}/v_heads", axis=2)
        sizes = self._constant("q_k_sizes", [c.n_head, c.kv_heads])
        q, k = self._split(f"{at}/q/split", self._rotated(at, qk), sizes, f"{at}/q", f"{at}/k", axis=2)
        q, k, v = (self._add("Transpose", f"{x}_by_head", x, perm=[0, 2, 1, 3]) for x in (q, k, v))
        keys, values = (self._written(f"{i}.{part}", x) for part, x in (("key", k), ("value", v)))

        rows = self._constant("by_kv_head", [0, c.kv_heads, -1, c.head_dim])
        q = self._add("Reshape", f"{at}/q_rows", q, rows)  # (B, nkv, g T, hd): query heads that share keys are stacked
        keys = self._add("Transpose", f"{at}/keys", keys, perm=[0, 1, 3, 2])
        scores = self._add("MatMul", f"{at}/scores", q, keys)  # (B, nkv, g T, L)
        hidden = self._constant("minus_infinity", np.array(-np.inf, np.float32))
        seen = self._add("Where", f"{at}/seen", self.hidden, hidden, scores)
        weights = self._add("Softmax", f"{at}/weights", seen, axis=-1)
        y = self._add("MatMul", f"{at}/y_rows", weights, values)
        y = self._add("Reshape", f"{at}/y_by_head", y, self._constant("by_head", [0, c.n_head, -1, c.head_dim]))
        y = self._add("Transpose", f"{at}/y_heads", y, perm=[0, 2, 1, 3])
        y = self._add("Reshape", f"{at}/y", y, self._constant("join_heads", [0, 0, c.n_head * c.head_dim]))
        return self._matmul(f"{at}/c_proj", y, f"h.{i}.attn.c_proj")

    def _rotated(self, at: str, x: str) -> str:
        """RoPE on (B, T, heads, hd): rotates each pair of channels (j, j + hd / 2) by the angle of its position."""
        half = self._constant("half_heads", [self.config.head_dim // 2] * 2)
        a, b = self._split(f"{at}/first_half/split", x, half, f"{at}/first_half", f"{at}/second_half", axis=3)
        turned = {
            name: self._add(kind, f"{at}/{name}", self._add("Mul", f"{at}/{name}_cos", one, self.cos),
                            self._add("Mul", f"{at}/{name}_sin", other, self.sin))
            for name, kind, one, other in (("turned_first", "Sub", a, b), ("turned_second", "Add", b, a))
        }  # fmt: skip
        return self._add("Concat", f"{at}/turned", *turned.values(), axis=3)

    def _written(self, part: str, new: str) -> str:
        """The present (B, nkv, L, hd): the padded past with new (B, nkv, T, hd) written at the new positions."""
        past, present = f"past_key_values.{part}", f"present.{part}"
        longer = self._add("Concat", f"/{present}/padded", past, self.padding, axis=2)
        return self._add("ScatterElements", present, longer, self.indices, new, axis=2)

    # Helpers that add nodes.

    def _range(self, name: str, length: str) -> str:
        """The integers 0 to length - 1 (length,), for a length (1,)."""
        zero, one = self._constant("zero_scalar", 0), self._constant("one_scalar", 1)
        end = self._add("Squeeze", f"{name}_end", length, self._constant("axis_0", [0]))
        return self._add("Range", name, zero, end, one)

    def _norm(self, name: str, x: str, gain: str) -> str:
        square = self._add("Mul", f"{name}/square", x, x)
        mean = self._add("ReduceMean", f"{name}/mean", square, axes=[-1], keepdims=1)
        epsilon = self._constant("epsilon", np.array(NORM_EPS, np.float32))
        size = self._add("Sqrt", f"{name}/size", self._add("Add", f"{name}/not_zero", mean, epsilon))
        return self._add("Mul", name, self._add("Div", f"{name}/of_size_one", x, size), gain)

    def _add_and_norm(self, name: str, x: str, change: str, gain: str) -> tuple[str, str]:
        total = self._add("Add", f"{name}/sum", x, change)
        return self._norm(name, total, gain), total

    def _silu(self, name: str, x: str) -> str:
        return self._add("Mul", name, x, self._add("Sigmoid", f"{name}/gate", x))
