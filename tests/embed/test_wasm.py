"""The WebAssembly module that the repository holds is the one that its script builds from smallm.c."""

import shutil
import subprocess
from pathlib import Path

import pytest

from smallm.export.kits import SOURCES

WASM = SOURCES / "js" / "smallm.wasm"
BUILD = SOURCES / "wasm" / "build.sh"
COMPILER = "14.0.6"
"""The version of clang that built the file in the repository."""


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory) -> Path:
    if not (shutil.which("clang") and shutil.which("wasm-ld")):
        pytest.skip("no clang or no lld; on Debian: apt-get install clang lld")
    out = tmp_path_factory.mktemp("wasm") / "smallm.wasm"
    subprocess.run(["sh", BUILD, out], check=True, capture_output=True)
    return out


def test_the_module_is_small():
    assert WASM.stat().st_size <= 100_000


@pytest.mark.slow
def test_the_same_compiler_builds_the_same_bytes(rebuilt):
    if f"clang version {COMPILER}" not in subprocess.run(["clang", "--version"], capture_output=True, text=True).stdout:
        pytest.skip(f"the file in the repository is from clang {COMPILER}")
    assert rebuilt.read_bytes() == WASM.read_bytes(), "build it again: sh smallm/embed/wasm/build.sh"
