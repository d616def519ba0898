"""Skips optimiser steps whose gradient norm is not finite; aborts after ten in a row."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor

from smallm.errors import UserError

MAX_IN_A_ROW = 10


class StepGuard:
    """Makes the optimiser's steps, skips those whose gradient norm is infinite or NaN, and counts the skipped steps."""

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer):
        self._optimizer, self._device = optimizer, accelerator.device
        self._scaled = accelerator.scaler is not None
        # Reading the norm makes the host wait for the device. On CUDA and XPU devices PyTorch's fused optimisers check
        # `found_inf` themselves; on MPS they ignore it.
        on_device = accelerator.device.type in ("cuda", "xpu") and accelerator.distributed_type != DistributedType.FSDP
        self._on_host = not on_device
        self._counts = torch.zeros(2, dtype=torch.int64, device=self._device)

    def step(self, norm: Tensor) -> None:
        """Makes an optimiser step unless `norm`, the norm of the whole gradient, is not finite."""
        skip = ~norm.isfinite()
        if self._scaled:  # fp16: the loss scaler skips the step and lowers the scale
            self._optimizer.step()  # `step_was_skipped` is always False for fused optimisers (accelerate#4242)
        elif not self._on_host:
            self._optimizer.optimizer.found_inf = skip.float()  # read by PyTorch's fused optimisers
            self._optimizer.step()
        elif not skip:
            self._optimizer.step()
        self._counts = torch.stack([self._counts[0] + skip, (self._counts[1] + 1) * skip])

    @property
    def counts(self) -> tuple[int, int]:
        """Skipped steps of the whole run, and skipped steps in a row up to now."""
        total, in_a_row = self._counts.tolist()
        return total, in_a_row

    def check(self, step: int, run: Path) -> None:
        """Raises `UserError` if the last MAX_IN_A_ROW steps up to `step` were all skipped."""
        in_a_row = self.counts[1]
        if in_a_row >= MAX_IN_A_ROW:
            raise UserError(
                f"the last {in_a_row} steps up to step {step} had no finite gradient and were skipped; lower "
                f"optim.learning_rate or raise optim.warmup_steps, then train again (checkpoints in {run} are intact)"
            )

    def restore(self, total: int, in_a_row: int) -> None:
        """Continues counting from the counts of a checkpoint."""
        self._counts = torch.tensor([total, in_a_row], device=self._device)
