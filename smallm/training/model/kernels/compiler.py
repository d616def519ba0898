"""Compiles kernels.c on the machine that runs it, by its own C compiler and for its processor.

Takes one to two seconds, once: the result is kept in the cache folder.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from smallm.training.cache import cache_folder

# Not -ffast-math, which would take a NaN for a number.
FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-fopenmp", "-std=gnu11", "-shared", "-fPIC")


def library(bf16: bool = False) -> Path | None:
    """The compiled kernels, found in the cache or made now; None if that cannot be done here. No PyTorch needed.

    bf16: whether products with weights are of operands rounded to bf16.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if platform.system() != "Linux" or compiler is None:  # elsewhere compilers come without OpenMP
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


def _compile(command: list[str], source: Path, path: Path) -> None:
    """Written aside and renamed, since several processes may do this at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, str(source), "-o", str(built), "-lm"], check=True, capture_output=True)
        built.replace(path)


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 by itself (AVX512_BF16)."""
    return platform.system() == "Linux" and "avx512_bf16" in _processor().split()


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
