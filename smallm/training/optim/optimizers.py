"""Adam, AdamW, and Muon combined with AdamW."""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from smallm.training.config import OptimConfig
from smallm.training.devices import multiplies_bf16
from smallm.training.distributed import divide_rows, full_tensor, shard_like
from smallm.training.model.operations import polynomial_iteration
from smallm.training.model.transformer import TransformerLanguageModel

# Coefficients (a, b, c) of the iterations of Polar Express (Amsel et al. 2025): each quintic is the best one for the
# range of singular values that the previous iteration leaves, starting with 0.001 to 1. A few iterations bring the
# singular values closer to 1 than repeating one fixed polynomial.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Divides the argument of each polynomial in bf16 (Amsel et al. 2025): rounding moves singular values beyond the range
# of the next polynomial, and the later iterations would multiply them by 10 to 1,000.
BF16_SAFETY = 1.01
MAX_GATHERED = 1 << 26  # elements of sharded matrices that are whole at the same time


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of each parameter group to `factor` times the peak of the group."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def build_optimizer(model: TransformerLanguageModel, config: OptimConfig, bf16: bool = False) -> torch.optim.Optimizer:
    """The optimiser `config.name`: "adam", "adamw" or "muon" (matrices by Muon, embedding and gains by AdamW).

    Weight decay applies to matrices only, not to the embedding and the gains, and never under "adam". Each parameter
    group has its own "peak_lr", which `set_learning_rate` scales. bf16: see `orthogonalise`.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name != "wte.weight"]
    rest = [p for name, p in named if p.ndim != 2 or name == "wte.weight"]
    muon, decay = config.name == "muon", 0.0 if config.name == "adam" else config.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": matrices, "peak_lr": config.learning_rate, "weight_decay": decay, "muon": muon},
        {"params": rest, "peak_lr": config.adam_learning_rate if muon else config.learning_rate, "weight_decay": 0.0},
    ]
    if muon:
        packed = {p: model.config.packed_rows.get(name.split(".", 2)[-1]) for name, p in named}
        groups[0]["rows"] = [packed[p] or (p.size(0),) for p in matrices]
        return MuonAdamW(groups, config, bf16)
    adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return adam(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def moment_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Parameter -> names of the tensors in its optimiser state after the first step."""
    adam, muon = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
    return {p: muon if group.get("muon") else adam for group in optimizer.param_groups for p in group["params"]}


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for parameter groups with `muon=True`, AdamW for the others.

    Matrices that are packed in one weight, such as q, k and v, are orthogonalised separately. All matrices of one
    shape, or of its transpose, are orthogonalised in one batch, which the processes divide among themselves. Muon and
    AdamW are one optimiser, because fp16 loss scaling would unscale the gradients of two optimisers twice. If
    `found_inf` is 1, a step changes nothing, as in PyTorch's fused optimisers.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[dict[str, Any]], config: OptimConfig, bf16: bool = False):
        """params: parameter groups; a group with `muon=True` has a list "rows" with, for each parameter, the numbers of
        rows of the matrices packed in it. bf16: see `orthogonalise`.
        """
        defaults = {"lr": config.learning_rate, "betas": config.betas, "eps": 1e-8, "weight_decay": 0.0, "muon": False}
        super().__init__(params, defaults)
        self.momentum, self.coefficients = config.momentum, POLAR_EXPRESS[: config.newton_schulz_steps]
        self.bf16 = bf16

    # The decorators of these methods import PyTorch's compiler, which takes as long as the first 50 steps of a small
    # model. AdamW.step imports it too, so `_adamw_step` calls the functional form.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is not supported
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["muon"]:
                for some in _chunks(parameters):
                    self._muon_step(group, some)
            elif parameters:
                self._adamw_step(group, parameters)

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device)}
                self.state[p] |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        steps, means, squares = ([self.state[p][key] for p in parameters] for key in ("step", "exp_avg", "exp_avg_sq"))
        adamw(parameters, _gradients(parameters), means, squares, [], steps, fused=True, amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False, found_inf=self.found_inf)  # fmt: skip

    def _muon_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        gradients, momenta = _gradients(parameters), [self.state[p]["momentum_buffer"] for p in parameters]
        keep: Tensor | float = 1.0
        if self.found_inf is not None:  # computed on the device, so that the host need not wait for found_inf
            keep = 1 - self.found_inf
            gradients = [torch.where(keep.bool(), g, m) for g, m in zip(gradients, momenta, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        nesterov = [full_tensor(update) for update in torch._foreach_lerp(gradients, momenta, self.momentum)]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * keep)
        # Orthogonalisation needs whole matrices. For a sharded parameter the update is collected in zeros of the full
        # shape, then sharded and added.
        weights = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) if _is_sharded(p) else p for p in parameters]
        rows_of = dict(zip(group["params"], group["rows"], strict=True))
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)  # (matrix, update), as views
        for parameter, weight, update in zip(parameters, weights, nesterov, strict=True):
            for pair in zip(weight.split(rows_of[parameter]), update.split(rows_of[parameter]), strict=True):
                by_shape[tuple(sorted(pair[0].shape))].append(pair)
        for matrices in by_shape.values():
            wide = torch.stack([update if update.size(0) <= update.size(1) else update.mT for _, update in matrices])
            updates = divide_rows(lambda x: orthogonalise(x, self.coefficients, self.bf16), wide)
            if self.found_inf is not None:
                updates = updates * keep
            for (weight, _), update in zip(matrices, updates, strict=True):
                rows, columns = weight.shape
                step = group["lr"] * max(1.0, rows / columns) ** 0.5
                weight.add_(update if rows <= columns else update.mT, alpha=-step)
        for parameter, weight in zip(parameters, weights, strict=True):
            if weight is not parameter:
                parameter.add_(shard_like(parameter, weight))


def orthogonalise(
    matrices: Tensor, coefficients: Sequence[tuple[float, float, float]], bf16: bool = False
) -> Tensor:
    """matrices (n, rows, columns) -> the same singular vectors with all singular values near 1.

    Runs one quintic Newton-Schulz iteration per (a, b, c) of the coefficients; fastest with rows <= columns. GPUs that
    multiply bf16 in hardware compute in bf16, which is precise enough and twice as fast. bf16: whether CPUs that have
    kernels for bf16 use them.
    """
    x = matrices.bfloat16() if multiplies_bf16(matrices.device) else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01).clamp(min=1e-7)
    if bf16 or x.dtype == torch.bfloat16:
        s = BF16_SAFETY
        coefficients = [(a / s, b / s**3, c / s**5) for a, b, c in coefficients]
    return polynomial_iteration(x, coefficients, bf16).to(matrices.dtype)


def _chunks(parameters: list[Tensor]) -> Iterable[list[Tensor]]:
    """All parameters at once; sharded ones in lists of about MAX_GATHERED elements, to bound the memory of a step."""
    chunk: list[Tensor] = []
    for parameter in parameters:
        if chunk and _is_sharded(parameter) and sum(p.numel() for p in [*chunk, parameter]) > MAX_GATHERED:
            yield chunk
            chunk = []
        chunk.append(parameter)
    yield chunk


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")
