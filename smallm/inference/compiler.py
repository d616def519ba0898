"""Compiles a C file with this machine's C compiler into a library, which is stored in the cache folder."""

import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from smallm.runs.cache_folder import cache_folder

TIMEOUT = 120.0  # seconds for the C compiler, which needs two
INSTALL = {"Linux": "apt install gcc", "Darwin": "xcode-select --install"}
"""System -> the command that installs a C compiler; on other systems nothing is compiled."""


def compile_library(compiler: str, flags: Sequence[str], source: Path) -> Path:
    """The library of a C file, from the cache or compiled now. Raises `OSError` or `subprocess.SubprocessError`.

    Compiles into a temporary folder and renames, since several processes may compile at once. The name of the library
    ends in its digest: a damaged library would end the process.
    """
    if stored := stored_library(compiler, flags, source):
        return stored
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / "library.so"
        command = [compiler, *flags, str(source), "-lm", "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)
        return built.replace(folder / f"{_name(compiler, flags, source)}-{_digest(built)}.so")


def stored_library(compiler: str, flags: Sequence[str], source: Path) -> Path | None:
    """The library of a C file in the cache; None if it was not compiled yet."""
    stored = cache_folder().glob(f"{_name(compiler, flags, source)}-*.so")
    return next((library for library in stored if library.stem.endswith(_digest(library))), None)


def _name(compiler: str, flags: Sequence[str], source: Path) -> str:
    """The name of a library without its digest: what it was compiled from."""
    content = [each.read_bytes() for each in sorted(source.parent.glob("*.[ch]"))]
    key = hashlib.sha256(repr((content, flags, compiler, processor())).encode()).hexdigest()[:16]
    return f"{source.stem}-{key}"


def processor() -> str:
    """Architecture and feature flags, on which the compiled code depends: machines may share a cache folder."""
    if platform.system() != "Linux":
        return platform.machine()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
