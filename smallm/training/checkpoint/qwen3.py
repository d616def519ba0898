"""Names: ours (packed projections) to and from those of Hugging Face's Qwen3 (one matrix each)."""

from torch import Tensor, cat

from smallm.training.config import ModelConfig

PLAIN = {  # ours -> theirs, below one block
    "ln_1.weight": "input_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
PACKED = {  # ours -> theirs, in the order of the rows
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.c_fc.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def to_qwen3(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict -> contiguous CPU tensors under Qwen3's names; the tied embedding stands there once."""
    theirs = {"model.embed_tokens.weight": state["wte.weight"], "model.norm.weight": state["ln_f.weight"]}
    for layer in range(config.n_layer):
        for our_name, name in PLAIN.items():
            theirs[f"model.layers.{layer}.{name}"] = state[f"h.{layer}.{our_name}"]
        for our_name, names in PACKED.items():
            pieces = state[f"h.{layer}.{our_name}"].split(config.packed_rows[our_name])
            theirs |= {f"model.layers.{layer}.{name}": piece for name, piece in zip(names, pieces, strict=True)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}


def from_qwen3(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_qwen3`. Raises `KeyError` for a tensor that is missing or left over."""
    left = dict(theirs)
    state = {"wte.weight": left.pop("model.embed_tokens.weight"), "ln_f.weight": left.pop("model.norm.weight")}
    for layer in range(config.n_layer):
        prefix = f"model.layers.{layer}."
        state |= {f"h.{layer}.{our_name}": left.pop(prefix + name) for our_name, name in PLAIN.items()}
        for our_name, names in PACKED.items():
            state[f"h.{layer}.{our_name}"] = cat([left.pop(prefix + name) for name in names])
    if left:
        raise KeyError(f"unexpected tensors {', '.join(left)}")
    return state
