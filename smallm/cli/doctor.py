"""`smallm doctor`: versions, devices, compilers and what works here, for a bug report; may compile into the cache."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from smallm import __version__
from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError, pip_install
from smallm.html.escape import printable
from smallm.inference.compiler import INSTALL
from smallm.inference.native import native_library
from smallm.inference.processors import usable_processors
from smallm.runs.cache_folder import cache_folder

EXTRAS = {
    "train": ("torch", "accelerate", "safetensors", "onnx", "matplotlib", "tomli-w", "pooch", "filelock"),
    "serve": ("starlette", "uvicorn"),
    "gguf": ("gguf",),
    "hub": ("huggingface_hub",),
    "datasets": ("datasets",),
    "zstd": ("zstandard",) if sys.version_info < (3, 14) else (),
}
"""Extra -> its packages, as in pyproject.toml."""
BASE = ("numpy", "onnxruntime", "tqdm")
NO_COMPILER = "no: no C compiler was found, or the C code cannot be compiled with it"
LABEL = 12  # columns of the labels


def main(argv: Sequence[str]) -> int:
    """Runs `smallm doctor` with these arguments."""
    parser = ArgumentParser("doctor", description="Shows versions, devices, compilers and what works here, "
                            "for a bug report.")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(argv)
    found = facts()
    if options.json:
        print(json.dumps(found, ensure_ascii=True, indent=1))
        return 0
    for label, values in found.items():
        rows = [f"{name} {value}" for name, value in values.items()] if isinstance(values, dict) else [str(values)]
        for i, row in enumerate(rows):
            print(f"{label if i == 0 else '':<{LABEL}}  {printable(row)}")
    return 0


def facts() -> dict[str, Any]:
    """Everything that the command prints: label -> a text, or texts by their names."""
    versions = {package: _version(package) for package in (*BASE, *dict.fromkeys(sum(EXTRAS.values(), ())))}
    extras = {name: [package for package in packages if not versions[package]] for name, packages in EXTRAS.items()}
    native, kernels, devices = _native_engine(), "no: PyTorch is not installed", {"cpu": "yes"}
    if versions["torch"]:
        kernels, devices = _kernels(), devices | _devices()
    return {
        "smallm": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {usable_processors()} processors usable of {os.cpu_count()}",
        "packages": {package: found or "missing" for package, found in versions.items()},
        "extras": {name: f"incomplete; {pip_install(f'smallm[{name}]')}" if missing else "installed"
                   for name, missing in extras.items()},
        "devices": devices,
        "compiler": _compiler(),
        "cache": _cache(),
        "works": {
            "generate": "yes" if all(versions[package] for package in BASE) else "no",
            "native engine": native,
            "train, export": "no" if extras["train"] else "yes",
            "kernels": kernels,
            **{name: "no" if missing else "yes" for name, missing in extras.items() if name != "train"},
        },
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _compiler() -> str:
    """Path and first line of --version of the C compiler that smallm would use."""
    path = shutil.which(os.environ.get("CC", "cc"))
    if path is None:
        install = INSTALL.get(platform.system())
        return f"missing; install one with: {install}" if install else "not used on this system"
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}: {error}"
    return f"{path}: {(told.splitlines() or ['?'])[0]}"


def _cache() -> str:
    try:
        folder = cache_folder()
    except UserError as error:
        return str(error)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{folder}{'' if os.access(nearest, os.W_OK) else ' (not writable)'}"


def _native_engine() -> str:
    try:
        native_library()
    except UserError as error:
        return f"no: {error}"
    return "yes"


def _kernels() -> str:
    """Whether the kernels for training on a CPU are compiled; compiles them if necessary, as training would."""
    kernels = import_module("smallm.training.model.kernels.compiler")
    if kernels.compile_kernels() is None:
        return NO_COMPILER
    return "yes, with bf16" if kernels.has_bf16() and kernels.compile_kernels(bf16=True) else "yes"


def _devices() -> dict[str, str]:
    """The accelerators that PyTorch can use."""
    torch: Any = import_module("torch")
    found = {}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if torch.accelerator.is_available() and not found:
        found[str(torch.accelerator.current_accelerator())] = "yes"
    return found
