"""Compiles kernels.c with this machine's C compiler for this machine's processor.

Compilation takes one to two seconds, once: the library is stored in the cache folder. This module does not import
PyTorch, so that the kernels can be compiled while PyTorch is imported.
"""

import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from smallm.inference.compiler import compile_library, processor

SYSTEM, MACHINE = platform.system(), platform.machine()
# Without -ffast-math, which assumes that no value is NaN or infinite.
FLAGS = ("-O2", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
# Clang of macOS has OpenMP, but no library for it: the kernels take the functions from the library that PyTorch loads.
OPENMP = {"Linux": ("-fopenmp",), "Darwin": ("-Xclang", "-fopenmp", "-undefined", "dynamic_lookup")}


def compile_kernels(bf16: bool = False) -> Path | None:
    """Path of the compiled kernels, from the cache or compiled now; None if this machine cannot compile them.

    bf16: whether matrix products with weights round their operands to bf16.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    flags = [*FLAGS, *OPENMP[SYSTEM], *_for_this_processor(), *(["-DBF16"] if bf16 else [])]
    try:
        return compile_library(compiler, flags, Path(__file__).with_name("kernels.c"))
    except (OSError, subprocess.SubprocessError):
        return None


def openmp_library() -> Path | None:
    """On macOS PyTorch's OpenMP library, to be loaded before the kernels; elsewhere they load the compiler's."""
    if SYSTEM != "Darwin":
        return None
    torch = find_spec("torch")
    folders = [Path(torch.origin).parent / "lib"] if torch and torch.origin else []
    found = (folder / "libomp.dylib" for folder in (*folders, Path(sys.prefix) / "lib"))  # the second one: conda
    return next((path for path in found if path.is_file()), None)


def has_bf16() -> bool:
    """Whether the processor has bf16 matrix instructions (AVX512_BF16)."""
    return SYSTEM == "Linux" and "avx512_bf16" in _features()


@cache
def _features() -> frozenset[str]:
    """The feature flags of the processor, which every step of a training run asks for."""
    return frozenset(processor().split())


def _compiler() -> str | None:
    """The C compiler; None without a compiler, or without an OpenMP library that the kernels can use."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if SYSTEM == "Darwin" and compiler and (openmp_library() is None or not _has_developer_tools()):
        return None
    return compiler if SYSTEM in OPENMP else None


def _has_developer_tools() -> bool:
    """Whether the command line tools are installed; without them cc of macOS opens a window that offers them."""
    try:
        return subprocess.run(["xcode-select", "-p"], capture_output=True).returncode == 0
    except OSError:
        return False


def _for_this_processor() -> tuple[str, ...]:
    """The flag that lets the compiler use all instructions of this processor. Apple's Clang needs none on Apple's."""
    if SYSTEM != "Linux":
        return ()
    return ("-mcpu=native",) if MACHINE == "aarch64" else ("-march=native",)
