"""Tensors that are spread over processes (FSDP2), made whole and spread again; all others pass through."""

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
