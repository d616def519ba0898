"""How much of the device a run uses: its share of the speed of matrix products (MFU), and memory."""

import sys
import time
from functools import cache

import torch

SIZES = {"cpu": 512}  # rows of the measured matrices, by type of device
GPU_SIZE = 4096  # enough to occupy a large GPU
ROUNDS = 5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def matrix_flops(device: torch.device, precision: str) -> float | None:
    """Floating-point operations per second of a product of two square matrices, the fastest of five; None if unknown.

    Takes some milliseconds. precision: `no` (float32, in TF32 where that is allowed), `bf16` or `fp16`.
    """
    size = SIZES.get(device.type, GPU_SIZE)
    try:
        x = torch.ones(size, size, dtype=DTYPES.get(precision, torch.float32), device=device)
        times = []
        for _ in range(1 + ROUNDS):  # the first one includes the initialisation of libraries
            begun = time.perf_counter()
            x @ x
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - begun)
    except RuntimeError:  # a device without this product, or without memory
        return None
    return 2 * size**3 / min(times[1:])


def peak_memory(device: torch.device) -> int | None:
    """The most memory so far in bytes: reserved on a CUDA device, otherwise of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
