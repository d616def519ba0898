"""The door to kernels.c: the model's block for float32 on a CPU, compiled on the machine that runs it.

The machine's own C compiler builds them once for its processor, in about a second, and the result is kept in the cache
folder. Without a C compiler there are no kernels, and functions.py computes in plain PyTorch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from smallm.training.cache import cache_folder

# Not -ffast-math, which would take a NaN for a number.
FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-fopenmp", "-std=gnu11", "-shared", "-fPIC")


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
def load() -> Kernels | None:
    """The kernels for this processor, compiled now if they are not in the cache; None if that cannot be done here."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if platform.system() != "Linux" or compiler is None:  # elsewhere compilers come without OpenMP
        return None
    source = Path(__file__).with_name("kernels.c")
    key = hashlib.sha256(repr((source.read_bytes(), FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{key}.so"
    try:
        if not library.is_file():
            _compile(compiler, source, library)
        return Kernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Written aside and renamed, since several processes may do this at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run([compiler, *FLAGS, str(source), "-o", str(built), "-lm"], check=True, capture_output=True)
        built.replace(library)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
