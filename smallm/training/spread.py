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
    part = -(-len(rows) // ranks)
    mine = rows[part * torch.distributed.get_rank() :][:part]
    done = rows.new_zeros(part, *rows.shape[1:])
    if len(mine):
        done[: len(mine)] = work(mine)
    whole = rows.new_empty(part * ranks, *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, done)
    return whole[: len(rows)]
