"""What we train on: device, precision, processes, threads, and how data gets there."""

import os
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smallm import __version__
from smallm.errors import UserError
from smallm.training.config import TrainConfig
from smallm.training.model.kernels import loader as kernels
from smallm.training.precision import best_precision


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator for this config; precision `auto` is the launcher's choice, or else what suits the device."""
    precision = config.mixed_precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        precision = launched if launched in ("bf16", "fp16") else best_precision()
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.mixed_precision = fp16 needs a GPU; use auto, no or bf16")
    # Accelerate keeps its settings in a singleton and refuses others; a process may train twice, with two precisions.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, or a launcher of several processes expects GPUs
        mixed_precision=precision,
        dynamo_backend="no",  # `compilation` decides, once the size of the run is known
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but they do not find each other; "
            "for several processes on a CPU put ACCELERATE_USE_CPU=true before the command"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate spreads a model over GPUs alone, though PyTorch can do it anywhere; so this can be tried on CPUs.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("of FSDP only version 2 will do; use configs/accelerate/fsdp.yaml")
    return accelerator


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimiser for this device, this precision and these processes."""
    tables = [name for name, _ in model.named_buffers()]  # the same everywhere: not to be sent round at each step
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)
    # The optimiser has no state yet that would have to be moved, and moving it imports PyTorch's whole compiler.
    return accelerator.prepare(model, optimizer, device_placement=[True, False])


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; 0 of what is none."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, without waiting for a GPU to finish what it does."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def describe_device(accelerator: Accelerator) -> tuple[str, str]:
    """Device and precision in a few words each."""
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device), precision
    if accelerator.device.type == "cpu":
        return f"cpu with {torch.get_num_threads()} thread(s)", precision
    return str(accelerator.device), precision


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """What a result was computed on, and with."""
    device, precision = describe_device(accelerator)
    return {"device": device, "precision": precision, "processes": accelerator.num_processes, **versions()}


def warnings(accelerator: Accelerator) -> list[str]:
    """What the user would want to have otherwise, a line each: processes that were not started, missing kernels."""
    lines = []
    # The simple launcher, which `accelerate launch --cpu` selects, sets the rendezvous port but no world size.
    if accelerator.num_processes == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        lines.append("warning: several processes were asked for, but one was started; for two on a CPU use "
                     "accelerate launch --config_file configs/accelerate/cpu-2.yaml")  # fmt: skip
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "no" and kernels.load() is None:
        lines.append("warning: no C compiler with OpenMP was found; with one (apt install gcc) training is up to "
                     "twice as fast")  # fmt: skip
    return lines


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    ours = {"smallm": __version__, "python": platform.python_version()}  # a checkout need not be installed
    return ours | {package: version(package) for package in ("torch", "accelerate", "numpy")}
