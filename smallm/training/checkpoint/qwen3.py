"""Converts weights between our model (packed projections) and Hugging Face's Qwen3 (one matrix each): names, shapes."""

from torch import Tensor, cat

from smallm.training.config import ModelConfig

PLAIN = {  # our name within a block -> name in Qwen3
    "ln_1.weight": "input_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
PACKED = {  # our name within a block -> names in Qwen3, in the order of the rows
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.c_fc.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def to_qwen3(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict -> contiguous CPU tensors by Qwen3's names; the tied embedding is stored once."""
    theirs = {"model.embed_tokens.weight": state["wte.weight"], "model.norm.weight": state["ln_f.weight"]}
    for layer in range(config.n_layer):
        for our_name, name in PLAIN.items():
            theirs[f"model.layers.{layer}.{name}"] = state[f"h.{layer}.{our_name}"]
        for our_name, names in PACKED.items():
            matrices = state[f"h.{layer}.{our_name}"].split(config.packed_rows[our_name])
            theirs |= {f"model.layers.{layer}.{name}": matrix for name, matrix in zip(names, matrices, strict=True)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}


def from_qwen3(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_qwen3`. Raises `KeyError` for a missing or an unexpected tensor."""
    remaining = dict(theirs)
    state = {"wte.weight": remaining.pop("model.embed_tokens.weight")}
    state["ln_f.weight"] = remaining.pop("model.norm.weight")
    for layer in range(config.n_layer):
        prefix = f"model.layers.{layer}."
        state |= {f"h.{layer}.{our_name}": remaining.pop(prefix + name) for our_name, name in PLAIN.items()}
        for our_name, names in PACKED.items():
            state[f"h.{layer}.{our_name}"] = cat([remaining.pop(prefix + name) for name in names])
    if remaining:
        raise KeyError(f"unexpected tensors {', '.join(remaining)}")
    return state


def weight_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor that `to_qwen3` returns."""
    C, hd, inner = config.n_embd, config.head_dim, config.inner
    q, kv = config.n_head * hd, config.kv_heads * hd
    layer = {
        "input_layernorm": (C,), "post_attention_layernorm": (C,), "self_attn.q_norm": (hd,), "self_attn.k_norm": (hd,),
        "self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C),
        "self_attn.o_proj": (C, q),
        "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C), "mlp.down_proj": (C, inner),
    }  # fmt: skip
    layers = {f"layers.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layer.items()}
    return {f"model.{name}.weight": s for name, s in ({"embed_tokens": (vocab_size, C), "norm": (C,)} | layers).items()}
