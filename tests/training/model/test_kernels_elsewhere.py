"""Kernels for macOS and aarch64, as far as x86-64 Linux can try them: how they are compiled, and what they compute."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smallm.training.model.kernels import compiler

ROOT, HERE = Path(__file__).parents[3], Path(__file__).parent
OPENMP = next(Path("/usr/lib").glob("*/libomp.so.5"), None)  # Debian's package libomp5
WITHOUT_LINKER_FLAGS = """#!/bin/sh
for word do
    shift
    case $word in -undefined | dynamic_lookup) ;; *) set -- "$@" "$word" ;; esac
done
exec clang "$@"
"""


def run_tests(plugin, selection, **environment):
    """Runs tests of test_operations.py in a process with this plugin; all must pass, none may be skipped."""
    path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "-k", selection,
         str(HERE / "test_operations.py")],
        env=os.environ | {"PYTHONPATH": path} | environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang") is None or OPENMP is None, reason="needs Clang and its OpenMP library")
def test_kernels_that_clang_compiles_and_another_library_completes_compute_the_same(tmp_path):
    cc = tmp_path / "cc"
    cc.write_text(WITHOUT_LINKER_FLAGS)
    cc.chmod(0o755)
    # Preloaded, so that PyTorch and the kernels share one OpenMP library, as on macOS. With two libraries each thread
    # of one would be number 0 in the other, and all threads would write the same rows.
    run_tests("kernels_of_macos", "not compiler and not bf16", CC=str(cc), KERNELS_OPENMP=str(OPENMP),
              LD_PRELOAD=str(OPENMP), SMALLM_CACHE=str(tmp_path / "cache"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("aarch64-linux-gnu-gcc", "qemu-aarch64"))),
    reason="needs gcc-aarch64-linux-gnu and qemu-user",
)
def test_kernels_for_aarch64_compute_the_same(tmp_path):
    selection = "block_equals or with_a_window or cross_entropy or rms_norm or orthogonalise"
    run_tests("kernels_of_aarch64", selection, KERNELS_FOLDER=str(tmp_path))


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """A Mac with arm64, Apple's tools and PyTorch; the commands that would be run are recorded."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"library")
        return SimpleNamespace(returncode=0)

    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libomp.dylib").touch()
    found = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(compiler, "SYSTEM", "Darwin")
    monkeypatch.setattr(compiler, "MACHINE", "arm64")
    monkeypatch.setattr(compiler, "find_spec", lambda name: found)
    monkeypatch.setattr(compiler.subprocess, "run", run)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(commands=commands, openmp=tmp_path / "torch" / "lib" / "libomp.dylib")


def test_macos_compiles_for_the_openmp_library_of_pytorch(mac):
    assert compiler.compile_kernels().is_file()
    assert compiler.openmp_library() == mac.openmp
    (command,) = [command for command in mac.commands if command[0] == "/usr/bin/cc"]
    assert " -Xclang -fopenmp -undefined dynamic_lookup " in " ".join(command)
    assert not any(word.startswith(("-march", "-mcpu")) for word in command)


def test_without_that_library_or_apples_tools_macos_does_without_kernels(mac, monkeypatch):
    monkeypatch.setattr(compiler.subprocess, "run", lambda command, **options: SimpleNamespace(returncode=2))
    assert compiler.compile_kernels() is None
    mac.openmp.unlink()
    monkeypatch.setattr(compiler, "_has_developer_tools", lambda: True)
    monkeypatch.setattr(compiler.sys, "prefix", str(mac.openmp.parent))
    assert compiler.compile_kernels() is None


@pytest.mark.parametrize(
    ("machine", "flag"), [("x86_64", "-march=native"), ("aarch64", "-mcpu=native")]
)
def test_linux_compiles_for_this_processor(mac, monkeypatch, machine, flag):
    monkeypatch.setattr(compiler, "SYSTEM", "Linux")
    monkeypatch.setattr(compiler, "MACHINE", machine)
    assert compiler.openmp_library() is None
    assert compiler.compile_kernels().is_file()
    assert {flag, "-fopenmp"} <= set(mac.commands[-1])


def test_windows_does_without_kernels(mac, monkeypatch):
    monkeypatch.setattr(compiler, "SYSTEM", "Windows")
    assert compiler.compile_kernels() is None
    assert not compiler.has_bf16()
    assert mac.commands == []
