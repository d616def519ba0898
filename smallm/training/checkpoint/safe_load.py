"""Checks before a model is built: its weights must match the checkpoint and fit in memory.

A checkpoint may come from an untrusted source, and a typing error in a config may describe a model of terabytes.
"""

import math
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from smallm.errors import UserError
from smallm.training.checkpoint.qwen3 import weight_shapes
from smallm.training.config import ModelConfig

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
MAX_HEADER = 4 << 20  # bytes; that of the largest model, with the optimiser's state, has 3 MB
MAX_ROTARY_SIZE = 1 << 18  # block_size times head_dim, in addition to the size of the file in bytes


def check_fits(file: Path, config: ModelConfig, vocab_size: int) -> None:
    """Raises `UserError` unless the safetensors `file` holds exactly the weights of this model.

    Only the header is read, nothing is allocated. After this check a model is no larger than its file, and block_size
    is plausible for a file of this size.
    """
    check_header(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {part.get_dtype() for part in slices.values()}
        size = file.stat().st_size
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing, truncated or not a safetensors file ({error})") from None
    expected = weight_shapes(config, vocab_size)
    names = sorted(expected.keys() | found.keys())
    problem = next((name for name in names if found.get(name) != expected.get(name)), "")
    if problem:
        problem = f"{problem} is {found.get(problem, 'missing')} instead of {expected.get(problem, 'missing')}"
    elif not types <= FLOATS:
        problem = "its tensors must be floating-point"
    elif config.block_size * config.head_dim > MAX_ROTARY_SIZE + size:
        problem = f"the file is too small for model.block_size = {config.block_size}"
    if problem:
        raise UserError(f"{file} does not match its config: {problem}")


def check_header(file: Path) -> None:
    """Raises `UserError` for a safetensors file whose header would take much memory and time to parse."""
    with suppress(OSError), file.open("rb") as stream:  # safetensors reports an error of reading
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER < file.stat().st_size:
            raise UserError(f"{file} is not one that smallm wrote: its header is larger than 4 MB; use another")


def check_memory(config: ModelConfig) -> None:
    """Raises `UserError` if the weights alone exceed the memory of this machine (operating systems overcommit)."""
    parameters = sum(map(math.prod, weight_shapes(config, 256).values()))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return
    if 4 * parameters > memory:
        raise UserError(
            f"a model of {parameters:,} parameters does not fit in this machine's {memory / 1e9:.0f} GB of memory; "
            "use a smaller model.n_embd or model.n_layer"
        )
