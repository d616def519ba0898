"""The door to kernels.c: the model's block for float32 on a CPU. Without a C compiler, plain PyTorch computes it."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from smallm.training.model.kernels.compiler import library


class Kernels:
    """The functions of the compiled library, called with tensors, integers and floats."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def __call__(self, name: str, *arguments: Tensor | int | float) -> None:
        """Runs a kernel on tensors, all float32 (targets int64) and contiguous, with PyTorch's number of threads."""
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor)
                  else ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int64(a) for a in arguments]  # fmt: skip
        getattr(self._library, name)(*values, ctypes.c_int(torch.get_num_threads()))


@cache
def load(bf16: bool = False) -> Kernels | None:
    """The kernels for this processor, compiled now if they are not in the cache; None if that cannot be done here.

    bf16: those whose products with weights are of bf16 operands.
    """
    try:
        path = library(bf16)
        return Kernels(ctypes.CDLL(str(path))) if path else None
    except OSError:
        return None
