"""Compiles kernels.c with this machine's C compiler for this machine's processor.

Compilation takes one to two seconds, once: the library is stored in the cache folder. This module does not import
PyTorch, so that the kernels can be compiled while PyTorch is imported.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from smallm.training.cache import cache_folder

# Without -ffast-math, which assumes that no value is NaN or infinite.
FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-fopenmp", "-std=gnu11", "-shared", "-fPIC")


def compile_kernels(bf16: bool = False) -> Path | None:
    """Path of the compiled kernels, from the cache or compiled now; None if this machine cannot compile them.

    bf16: whether matrix products with weights round their operands to bf16.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if platform.system() != "Linux" or compiler is None:  # compilers elsewhere come without OpenMP
        return None
    source = Path(__file__).with_name("kernels.c")
    flags = [*FLAGS, "-DBF16"] if bf16 else FLAGS
    key = hashlib.sha256(repr((source.read_bytes(), flags, compiler, _processor())).encode()).hexdigest()[:16]
    path = cache_folder() / f"kernels-{key}.so"
    try:
        if not path.is_file():
            _compile([compiler, *flags], source, path)
        return path
    except (OSError, subprocess.SubprocessError):
        return None


def has_bf16() -> bool:
    """Whether the processor has bf16 matrix instructions (AVX512_BF16)."""
    return platform.system() == "Linux" and "avx512_bf16" in _processor().split()


def _compile(command: list[str], source: Path, path: Path) -> None:
    """Compiles into a temporary folder and renames, since several processes may compile at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, str(source), "-o", str(built), "-lm"], check=True, capture_output=True)
        built.replace(path)


def _processor() -> str:
    """Architecture and feature flags, on which -march=native depends: machines may share a cache folder."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
