"""The default precision for this machine; on CPUs bf16 is measured against fp32."""

import os
import time
from functools import cache

import torch

from smallm.training.config import ModelConfig
from smallm.training.model.kernels.compiler import has_bf16
from smallm.training.model.kernels.loader import load
from smallm.training.model.transformer import Rotary, TransformerBlock

MAX_BF16_TIME = 0.9  # of the time in fp32; bf16 is chosen below that
ROUNDS = 5


def best_precision() -> str:
    """`bf16` or `fp16` on a GPU that has it in hardware, `bf16` on a CPU where it is faster, otherwise `no` (fp32)."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "bf16" if not torch.accelerator.is_available() and bf16_is_faster() else "no"
    major, _ = torch.cuda.get_device_capability()
    return "bf16" if major >= 8 else "fp16" if major >= 7 else "no"


@cache
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies bf16 in hardware and a Transformer block is faster in bf16 than in fp32.

    Takes some milliseconds. The answer is cached, so that all runs of a process use the same precision.
    """
    if not has_bf16() or load(bf16=True) is None:
        return False
    config = ModelConfig(n_layer=1, n_head=4, n_embd=128, block_size=64)
    block, tables = TransformerBlock(config), Rotary(config.head_dim, config.block_size, config.rope_theta)
    x = torch.zeros(12, config.block_size, config.n_embd)

    def seconds(enabled: bool) -> float:
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            block(x, *tables(config.block_size)).sum().backward()
        return time.perf_counter() - begun

    pairs = [(seconds(True), seconds(False)) for _ in range(ROUNDS)]
    half, full = (min(times) for times in zip(*pairs, strict=True))
    return half < MAX_BF16_TIME * full
