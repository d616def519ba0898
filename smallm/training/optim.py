"""Adam, AdamW, and Muon with AdamW for what is no matrix."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from smallm.training.config import OptimConfig


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Writes `factor` times each group's peak into its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `config.name` asks for. Decay is for matrices; embedding and gains go without."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name != "wte.weight"]
    rest = [p for name, p in named if p.ndim != 2 or name == "wte.weight"]
    if config.name == "muon":
        groups = [
            {"params": matrices, "peak_lr": config.learning_rate, "weight_decay": config.weight_decay, "muon": True},
            {"params": rest, "peak_lr": config.adam_learning_rate, "weight_decay": 0.0, "muon": False},
        ]
        return MuonAdamW(groups, lr=config.learning_rate, momentum=config.momentum, betas=config.betas)
    decay = config.weight_decay if config.name == "adamw" else 0.0
    groups = [
        {"params": matrices, "peak_lr": config.learning_rate, "weight_decay": decay},
        {"params": rest, "peak_lr": config.learning_rate, "weight_decay": 0.0},
    ]
    adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return adam(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Parameter -> names of the tensors that the optimiser keeps for it, once it has made a step."""
    adam, muon = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
    return {p: muon if group.get("muon") else adam for group in optimizer.param_groups for p in group["params"]}


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the groups with `muon=True`, AdamW for the others, in one step.

    The arithmetic is that of `torch.optim.Muon` and `torch.optim.AdamW`, except that matrices of one shape are
    orthogonalised together. Being one optimiser, it works under fp16 loss scaling, which would otherwise unscale the
    gradients twice.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float, betas: tuple[float, float], ns_steps: int = 5):
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "muon": False}
        super().__init__(params, defaults)
        self.ns_steps = ns_steps
        rest = [p for group in self.param_groups if not group["muon"] for p in group["params"]]
        self._adamw = torch.optim.AdamW(rest, fused=True)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
        self._adamw.state = self.state
        self._adamw.param_groups = [self._adamw.defaults | g for g in self.param_groups if not g["muon"]]
        self._adamw.step()

    def _muon_step(self, group: dict) -> None:
        for parameters in _same_shape([p for p in group["params"] if p.grad is not None]):
            gradients = [p.grad for p in parameters]
            momenta = [self._momentum(p) for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
            updates = orthogonalise(torch.stack(nesterov), self.ns_steps)  # (n, rows, columns)
            rows, columns = parameters[0].shape
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(updates), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """(n, rows, columns) -> matrices with about the same singular vectors and all singular values near 1.

    The quintic Newton-Schulz iteration of Muon; in bf16 on GPUs, where it is exact enough and twice as fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _same_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    return list(by_shape.values())
