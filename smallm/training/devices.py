"""The machine that a run trains on: device, precision and processes, and how arrays get to the device."""

import os
import platform
import socket
from datetime import timedelta
from importlib.metadata import version

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smallm import __version__
from smallm.errors import ProcessError, UserError
from smallm.inference.compiler import INSTALL
from smallm.training.config import TrainConfig
from smallm.training.distributed import broadcast_from_main
from smallm.training.model.kernels import loader as kernels
from smallm.training.precision import best_precision

# How long processes wait for the one that encodes the text, writes a checkpoint or measures baselines. The defaults, 10
# minutes under NCCL and 30 under gloo, end runs on texts of many gigabytes. If a process dies, its launcher ends the
# others at once.
COLLECTIVE_TIMEOUT = timedelta(hours=12)
PRECISIONS = ("no", "bf16", "fp16")


def build_accelerator(config: TrainConfig, resumed: str = "", threads: int = 0) -> Accelerator:
    """The Accelerator for this config.

    Precision `auto` is that of the resumed run, or else that of the launcher, or else `best_precision()` of the main
    process. All processes use the same one.

    resumed: the precision that the run has used so far; empty for a new run.
    threads: the number of threads that each process of the run has used on a CPU so far, which is set again unless
        OMP_NUM_THREADS gives another one: it decides the order of sums. 0 for a new run.
    Raises `UserError` for a precision or a launcher setting that cannot work here.
    """
    cpu = not torch.accelerator.is_available()  # or Accelerate expects GPUs under a launcher of several processes
    # Accelerate keeps its settings in a singleton and refuses others; a process may train twice, with two precisions.
    AcceleratorState._reset_state(reset_partial_state=True)
    _check_meeting_point()
    processes = PartialState(cpu, timeout=COLLECTIVE_TIMEOUT)
    if cpu and threads > 0 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    precision = _common_precision(processes, config.mixed_precision, resumed)
    if precision == "fp16" and not torch.cuda.is_available():
        advice = "resume the run on one, or start a new run" if resumed else "use auto, no or bf16"
        raise UserError(f"train.mixed_precision = fp16 needs a GPU; {advice}")
    # dynamo_backend: model/compilation.py decides, when the length of the run is known
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, dynamo_backend="no")
    allow_tf32(accelerator.device)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but they do not find each other; "
            "for several processes on a CPU put ACCELERATE_USE_CPU=true before the command"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate allows FSDP on GPUs only. PyTorch also has it on CPUs, where it can be tried and tested.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin()
        if precision != "no":
            plugin.set_mixed_precision(precision)  # as Accelerate does on GPUs
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP version 1 is not supported; use version 2, as in configs/accelerate/fsdp.yaml")
    return accelerator


def _check_meeting_point() -> None:
    """Raises `ProcessError` if the host at which processes meet has no address; PyTorch would try it for hours."""
    host = os.environ.get("MASTER_ADDR", "")
    if host and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise ProcessError(
                f"the processes cannot meet at MASTER_ADDR = {host!r}: {error.strerror}; give the launcher the address "
                "of the first machine, with --main_process_ip"
            ) from None


def _common_precision(processes: PartialState, configured: str, resumed: str) -> str:
    """The precision of all processes: `no`, `bf16` or `fp16`; a measurement by each could end differently."""
    if configured != "auto":
        return configured
    if resumed:
        return resumed
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched in ("bf16", "fp16"):
        return launched
    main = best_precision() if processes.is_main_process else PRECISIONS[0]
    (index,) = broadcast_from_main(processes, PRECISIONS.index(main))
    return PRECISIONS[int(index)]


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepares model and optimiser for device, precision and processes."""
    tables = [name for name, _ in model.named_buffers()]  # constant, so DDP need not broadcast them in every step
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)
    # device_placement False: the optimiser has no state to move yet, and moving it would import PyTorch's compiler.
    return accelerator.prepare(model, optimizer, device_placement=[True, False])


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device is a CUDA GPU with bf16 and TF32 tensor cores: compute capability 8.0 (Ampere) or higher."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def allow_tf32(device: torch.device) -> None:
    """Lets Ampere and later GPUs multiply float32 matrices in TF32, unless the caller has changed PyTorch's setting.

    Only matters with mixed_precision "no". NVIDIA_TF32_OVERRIDE=0 in the environment forbids TF32 again.
    """
    if multiplies_bf16(device) and torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device; 0 for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, copied without waiting for the GPU's queued kernels."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def environment_facts(accelerator: Accelerator) -> dict[str, str | int]:
    """Device, precision, numbers of processes and threads, and versions of Python and packages."""
    device, threads = str(accelerator.device), torch.get_num_threads()
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    elif accelerator.device.type == "cpu":
        device = f"cpu with {threads} thread{'s' if threads > 1 else ''}"
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return {"device": device, "precision": precision, "processes": accelerator.num_processes,
            "threads": threads, **versions()}  # fmt: skip


def warnings(accelerator: Accelerator) -> list[str]:
    """Warnings about a slow start: processes that were not started, missing kernels; one line each."""
    lines = []
    # The simple launcher, which `accelerate launch --cpu` selects, sets the rendezvous port but no world size.
    if accelerator.num_processes == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        lines.append("several processes were asked for, but one was started; for two on a CPU use "
                     "accelerate launch --config_file configs/accelerate/cpu-2.yaml")  # fmt: skip
    install = INSTALL.get(platform.system())
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "no" and install and kernels.load() is None:
        lines.append(f"no C compiler with OpenMP was found; with one ({install}) training is up to twice as fast")
    return lines


def versions() -> dict[str, str]:
    """Versions of Python, smallm and the packages that results depend on."""
    ours = {"smallm": __version__, "python": platform.python_version()}  # not by metadata: smallm may not be installed
    return ours | {package: version(package) for package in ("torch", "accelerate", "numpy")}
