"""Converts weights between our model (packed projections) and Hugging Face's Qwen3 (one matrix each): names, shapes."""

from typing import TYPE_CHECKING

from smallm.training.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor  # takes a second to import, and the shapes are checked before that

Shapes = dict[str, tuple[int, ...]]


def to_qwen3(state: "dict[str, Tensor]", config: ModelConfig) -> "dict[str, Tensor]":
    """Our state dict -> contiguous CPU tensors by Qwen3's names; the tied embedding is stored once."""
    theirs: dict[str, Tensor] = {}
    for name, parts in _names(config).items():
        matrices = state[name].split([shape[0] for shape in parts.values()]) if len(parts) > 1 else (state[name],)
        theirs |= {their: matrix.detach().cpu().contiguous() for their, matrix in zip(parts, matrices, strict=True)}
    return theirs


def from_qwen3(theirs: "dict[str, Tensor]", config: ModelConfig) -> "dict[str, Tensor]":
    """The inverse of `to_qwen3`. Raises `KeyError` for a missing or an unexpected tensor."""
    from torch import cat

    remaining = dict(theirs)
    state = {name: cat([remaining.pop(their) for their in parts]) for name, parts in _names(config).items()}
    if remaining:
        raise KeyError(f"unexpected tensors {', '.join(remaining)}")
    return state


def weight_shapes(config: ModelConfig, vocab_size: int) -> Shapes:
    """Name -> shape of each tensor that `to_qwen3` returns."""
    return {name: shape for parts in _names(config, vocab_size).values() for name, shape in parts.items()}


def _names(config: ModelConfig, vocab_size: int = 0) -> dict[str, Shapes]:
    """Our name -> Qwen3's names of the matrices that it packs, in the order of their rows, with their shapes."""
    C, hd, inner = config.n_embd, config.head_dim, config.inner
    q, kv = config.n_head * hd, config.kv_heads * hd
    block: dict[str, Shapes] = {
        "ln_1": {"input_layernorm": (C,)},
        "attn.c_attn": {"self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C)},
        "attn.q_norm": {"self_attn.q_norm": (hd,)},
        "attn.k_norm": {"self_attn.k_norm": (hd,)},
        "attn.c_proj": {"self_attn.o_proj": (C, q)},
        "ln_2": {"post_attention_layernorm": (C,)},
        "mlp.c_fc": {"mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C)},
        "mlp.c_proj": {"mlp.down_proj": (C, inner)},
    }
    names: dict[str, Shapes] = {"wte": {"embed_tokens": (vocab_size, C)}, "ln_f": {"norm": (C,)}}
    for i in range(config.n_layer):
        names |= {f"h.{i}.{ours}": {f"layers.{i}.{name}": shape for name, shape in parts.items()}
                  for ours, parts in block.items()}  # fmt: skip
    return {f"{ours}.weight": {f"model.{name}.weight": shape for name, shape in parts.items()}
            for ours, parts in names.items()}  # fmt: skip
