"""Loads the compiled kernels and calls them with tensors."""

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from smallm.training.model.kernels.compiler import compile_kernels, openmp_library

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MAX_KEPT = 1 << 30


class Kernels:
    """The functions of the compiled library."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def __call__(self, name: str, *arguments: Tensor | int | float) -> None:
        """Calls the function `name` with PyTorch's number of threads.

        Tensors must be contiguous and on the CPU, float32 except for int64 targets. The caller checks the shapes.
        """
        for a in arguments:
            if isinstance(a, Tensor):
                assert a.is_contiguous(), name
                assert a.device.type == "cpu", name
                assert a.dtype in (torch.float32, torch.int64), name
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor)
                  else ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int64(a) for a in arguments]  # fmt: skip
        getattr(self._library, name)(*values, ctypes.c_int(torch.get_num_threads()))


@cache
def load(bf16: bool = False) -> Kernels | None:
    """The kernels for this processor, compiled if necessary; None if this machine cannot compile or load them.

    bf16: whether matrix products with weights round their operands to bf16.
    """
    try:
        path = compile_kernels(bf16)
        if openmp := openmp_library():  # a process must not load two of them
            ctypes.CDLL(str(openmp), ctypes.RTLD_GLOBAL)
        _keep_freed_memory()
        return Kernels(ctypes.CDLL(str(path))) if path else None
    except OSError:
        return None


def _keep_freed_memory() -> None:
    """Lets the C library of Linux keep up to MAX_KEPT bytes of freed memory.

    Each step of training allocates and frees the same tensors. By default glibc returns their memory to the system,
    which clears the pages again at the next use: a tenth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # glibc has this function, musl does not
        mallopt(M_TRIM_THRESHOLD, MAX_KEPT)
        mallopt(M_MMAP_THRESHOLD, MAX_KEPT)
