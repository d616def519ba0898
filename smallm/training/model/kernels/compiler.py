"""Compiles kernels.c with this machine's C compiler for this machine's processor.

Compilation takes one to two seconds, once: the library is stored in the cache folder. This module does not import
PyTorch, so that the kernels can be compiled while PyTorch is imported.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from smallm.training.cache import cache_folder

SYSTEM, MACHINE = platform.system(), platform.machine()
# Without -ffast-math, which assumes that no value is NaN or infinite.
FLAGS = ("-O2", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
# Clang of macOS has OpenMP, but no library for it: the kernels take the functions from the library that PyTorch loads.
OPENMP = {"Linux": ("-fopenmp",), "Darwin": ("-Xclang", "-fopenmp", "-undefined", "dynamic_lookup")}
TIMEOUT = 120.0  # seconds for the C compiler, which needs two
INSTALL = {"Linux": "apt install gcc", "Darwin": "xcode-select --install"}
"""System -> the command that installs a C compiler; on other systems there are no kernels."""


def compile_kernels(bf16: bool = False) -> Path | None:
    """Path of the compiled kernels, from the cache or compiled now; None if this machine cannot compile them.

    bf16: whether matrix products with weights round their operands to bf16.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    source = Path(__file__).with_name("kernels.c")
    flags = [*FLAGS, *OPENMP[SYSTEM], *_for_this_processor(), *(["-DBF16"] if bf16 else [])]
    key = hashlib.sha256(repr((source.read_bytes(), flags, compiler, _processor())).encode()).hexdigest()[:16]
    try:
        stored = cache_folder().glob(f"kernels-{key}-*.so")
        intact = next((path for path in stored if path.stem.endswith(_digest(path))), None)
        return intact or _compile([compiler, *flags, str(source), "-lm"], key)
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
    return SYSTEM == "Linux" and "avx512_bf16" in _processor().split()


def _compile(command: list[str], key: str) -> Path:
    """Compiles into a temporary folder and renames, since several processes may compile at once.

    The name of the library ends in its digest: a damaged library would end the process.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        built = Path(folder) / "kernels.so"
        subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, timeout=TIMEOUT)
        return built.replace(cache_folder() / f"kernels-{key}-{_digest(built)}.so")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compiler() -> str | None:
    """The C compiler; None if there is none whose OpenMP the kernels can use."""
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


def _processor() -> str:
    """Architecture and feature flags, on which the compiled code depends: machines may share a cache folder."""
    if SYSTEM != "Linux":
        return MACHINE
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return MACHINE + next((line for line in lines if line.startswith(("flags", "Features"))), "")
