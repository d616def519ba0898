"""Decides whether torch.compile saves time, and compiles the model; if that fails, training goes on uncompiled."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from smallm.training.model.operations import cross_entropy

MIN_SECONDS = 180  # compilation takes about a minute and saves about a third of the remaining time
FLOPS_PER_SECOND = 30e12  # of a small model in bf16 on one GPU, before compilation
MIN_SECONDS_PER_LAYER = 0.5e-3  # time to launch the kernels of one layer, forward and backward


def should_compile(choice: str, device: torch.device, passes: int, flops_per_pass: float, n_layer: int) -> bool:
    """Whether to compile the model.

    Args:
        choice: train.compile. "yes" and "no" decide; "auto" compiles on a GPU if the remaining passes are estimated to
            take at least three minutes uncompiled. On CPUs "auto" never compiles: the kernels leave little to gain.
        device: where the model trains.
        passes: remaining forward and backward passes on this device.
        flops_per_pass: floating-point operations of one such pass.
        n_layer: number of blocks.
    """
    if choice != "auto":
        return choice == "yes"
    seconds = passes * max(flops_per_pass / FLOPS_PER_SECOND, n_layer * MIN_SECONDS_PER_LAYER)
    return device.type == "cuda" and find_spec("triton") is not None and seconds >= MIN_SECONDS


def compile_model(
    model: nn.Module, accelerator: Accelerator, batches: Iterable[tuple[Tensor, Tensor]], say: Callable[[str], None]
) -> Callable[[Tensor], Tensor]:
    """The compiled model, which shares its weights with `model`; or `model` itself, after a warning, if that fails.

    Each shape is compiled by a forward and a backward pass, because some failures show only in the backward pass. The
    result may differ between processes: compiled and plain models take part in the same collective operations.

    Args:
        model: the prepared model.
        accelerator: keeps the passes local, so that no process waits for one that failed; under FSDP every pass needs
            all processes.
        batches: one batch (ids, targets) of each shape that training will use.
        say: prints a line for the user.
    """
    say("compiling the model, which can take a minute")
    try:
        fast = torch.compile(model, dynamic=False)
        # FSDP2 without synchronisation would keep the gradients of the warm-up for the first step.
        sharded = accelerator.distributed_type == DistributedType.FSDP
        with _silence(), nullcontext() if sharded else accelerator.no_sync(model):
            for ids, targets in batches:
                cross_entropy(fast(ids), targets).backward()
        return fast
    except Exception as error:  # no compiler, no triton, an old GPU, a bug
        say(f"warning: torch.compile does not work here ({_reason(error)}); training goes on uncompiled "
            "(--train.compile no skips the attempt)")  # fmt: skip
        return model
    finally:
        model.zero_grad(set_to_none=True)


@contextmanager
def _silence() -> Iterator[None]:
    """Suppresses the compiler's warnings and logged tracebacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    """Type and first line of the error, shortened."""
    inner = getattr(error, "inner_exception", error)
    message = " ".join(str(inner).split("\n")[0].split())
    return f"{type(inner).__name__}: {message[:100]}" if message else type(inner).__name__
