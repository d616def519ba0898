"""Tensors that are spread over processes (FSDP2), made whole and spread again; work that processes share."""

from collections.abc import Callable

import torch.distributed
from torch import Tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor. Of one that is spread all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(parameter: Tensor | None, tensor: Tensor) -> Tensor:
    """The whole tensor spread as the parameter is; itself, if that one is whole."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shared(work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """work(rows), where work treats each row (n, …) by itself and keeps its shape: every process does its part of them.

    All processes must call this with the same rows, and all get the same result.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1:
        return work(rows)
    rank, done = torch.distributed.get_rank(), torch.zeros_like(rows)
    mine = slice(len(rows) * rank // ranks, len(rows) * (rank + 1) // ranks)
    if mine.start < mine.stop:
        done[mine] = work(rows[mine])
    torch.distributed.all_reduce(done)  # a sum with zeros; gathering parts is no faster over gloo
    return done
