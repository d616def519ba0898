"""torch.compile where it pays for itself and works, and the model as it is everywhere else."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smallm.training.model.operations import cross_entropy

PAYS_FROM_SECONDS = 180  # compilation takes about a minute and saves about a third of what comes after
FLOPS_PER_SECOND = 30e12  # of a small model in bf16 on one GPU, before compilation
SECONDS_PER_LAYER = 0.5e-3  # the least that one pass can take: the time to launch a layer's kernels


def should_compile(choice: str, device: torch.device, passes: int, flops_per_pass: float, n_layer: int) -> bool:
    """Whether to compile: `yes`, `no`, or `auto` = on a GPU, if the passes would take three minutes without.

    The minutes are an estimate, by the FLOPs of the forward and backward passes still to come on this device and by
    their kernels. On a CPU compilation takes as long and saves little: the model has operations of its own there.
    """
    if choice != "auto":
        return choice == "yes"
    seconds = passes * max(flops_per_pass / FLOPS_PER_SECOND, n_layer * SECONDS_PER_LAYER)
    return device.type == "cuda" and find_spec("triton") is not None and seconds >= PAYS_FROM_SECONDS


def compile_model(
    model: nn.Module, accelerator: Accelerator, batches: Iterable[tuple[Tensor, Tensor]], say: Callable[[str], None]
) -> nn.Module:
    """`model` compiled, with its weights; or `model` itself, after a warning, if that fails on any of `batches`.

    Each is ids and targets of a shape to come, and is run forward and backward, since some failures show only there.
    Every shape gets a graph of its own. Processes need not agree: either form takes part in the same exchanges.
    """
    say("compiling the model, which can take a minute")
    try:
        fast = torch.compile(model, dynamic=False)
        with _silence(), accelerator.no_sync(model):  # no process waits here for one that failed
            for ids, targets in batches:
                cross_entropy(fast(ids), targets).backward()
        return fast
    except Exception as error:  # no compiler, no triton, an old GPU, a bug: training goes on all the same
        say(f"warning: torch.compile does not work here ({_reason(error)}); going on without, as train.compile no does")
        return model
    finally:
        model.zero_grad(set_to_none=True)


@contextmanager
def _silence() -> Iterator[None]:
    """Without the compiler's remarks on what it meets, and its tracebacks for what fails."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    """What happened, in less than a line."""
    inner = getattr(error, "inner_exception", error)
    words = " ".join(str(inner).split("\n")[0].split())
    return f"{type(inner).__name__}: {words[:100]}" if words else type(inner).__name__
