"""What a model would cost is known before it is built, and what a checkpoint claims is held against what it holds.

Checkpoints come from strangers too, and a slip of the finger is soon a model of terabytes.
"""

import math
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from smallm.errors import UserError
from smallm.training.config import ModelConfig

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
ROTARY_ROOM = 1 << 18  # positions times head_dim that any model may have, however small its file


def check_fits(file: Path, config: ModelConfig, vocab_size: int) -> None:
    """Raises `UserError` unless `file`, in safetensors, holds the weights of just this model; allocates nothing.

    So a model is never larger than the file that fills it, and its context no longer than the file makes plausible.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in parts.items()}
            types = {part.get_dtype() for part in parts.values()}
        size = file.stat().st_size
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing, truncated or no safetensors file ({error})") from None
    wanted = weight_shapes(config, vocab_size)
    problem = next((name for name in sorted(wanted.keys() | found.keys()) if found.get(name) != wanted.get(name)), "")
    if problem:
        problem = f"{problem} is {found.get(problem, 'missing')} instead of {wanted.get(problem, 'missing')}"
    elif not types <= FLOATS:
        problem = "it holds numbers that are no floats"
    elif config.block_size * config.head_dim > ROTARY_ROOM + size:
        problem = f"it is too small for model.block_size = {config.block_size}"
    if problem:
        raise UserError(f"{file} does not fit the model it should hold: {problem}")


def check_memory(config: ModelConfig) -> None:
    """Raises `UserError` if the weights alone are more than this machine's memory; systems often promise it all."""
    parameters = sum(map(math.prod, weight_shapes(config, 256).values()))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return
    if 4 * parameters > memory:
        raise UserError(
            f"a model of {parameters:,} parameters does not fit into this machine's {memory / 1e9:.0f} GB of memory; "
            "use a smaller model.n_embd or model.n_layer"
        )


def weight_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of `model.safetensors`, as `to_qwen3` writes them."""
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
