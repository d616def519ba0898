"""Values and tensors shared between processes: broadcasts, FSDP2 shards made whole and split again, divided work."""

from collections.abc import Callable

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast
from torch import Tensor


def broadcast_from_main(accelerator: Accelerator | PartialState, *values: float) -> tuple[float, ...]:
    """The values of the main process, so that all processes decide alike; all processes must call this."""
    if accelerator.num_processes == 1:
        return values
    numbers = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return tuple(broadcast(numbers).tolist())


def sum_over_processes(accelerator: Accelerator, value: float) -> float:
    """The sum of the values of all processes, in float64; all processes must call this."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=accelerator.device), "sum"))


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. If the tensor is sharded (FSDP2), all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter: Tensor | None, tensor: Tensor) -> Tensor:
    """A whole tensor, sharded as `parameter` is; unchanged if `parameter` is not sharded."""
    if parameter is None or not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def divide_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """function(rows), computed by all processes together: each process computes a slice of the rows.

    `function` must treat each row (n, …) separately and keep its shape. All processes must call this with the same
    rows, and all get the whole result.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1:
        return function(rows)
    rank, result = torch.distributed.get_rank(), torch.zeros_like(rows)
    mine = slice(len(rows) * rank // ranks, len(rows) * (rank + 1) // ranks)
    if mine.start < mine.stop:
        result[mine] = function(rows[mine])
    torch.distributed.all_reduce(result)  # a sum with zeros; all_gather of the slices is no faster over gloo
    return result
