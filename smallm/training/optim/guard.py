"""Keeps what is no number away from the weights: such a step is left out, and too many of them end the run."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor

from smallm.errors import UserError

MAX_IN_A_ROW = 10


class StepGuard:
    """Counts the steps that were left out because the gradient's norm was infinite or no number."""

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer):
        self._optimizer, self._device = optimizer, accelerator.device
        self._scaled = accelerator.scaler is not None
        # Asking the device makes the host wait for it. A GPU is asked for nothing: the optimisers look for themselves.
        self._on_host = accelerator.device.type == "cpu" or accelerator.distributed_type == DistributedType.FSDP
        self.restore(0, 0)

    def step(self, norm: Tensor) -> None:
        """Lets the optimiser make its step, unless `norm`, that of the whole gradient, is not finite."""
        wrong = ~norm.isfinite()
        if self._scaled:  # fp16 has its own way: the step is left out and the loss scaled down
            self._optimizer.step()
            wrong = torch.tensor(self._optimizer.step_was_skipped, device=self._device)
        elif not self._on_host:
            self._optimizer.optimizer.found_inf = wrong.float()  # as PyTorch's fused optimisers know it
            self._optimizer.step()
        elif not wrong:
            self._optimizer.step()
        self._counts = torch.stack([self._counts[0] + wrong, (self._counts[1] + 1) * wrong])

    @property
    def counts(self) -> tuple[int, int]:
        """Steps left out in the whole run, and how many of them are the last ones."""
        total, in_a_row = self._counts.tolist()
        return total, in_a_row

    def check(self, step: int, run: Path) -> tuple[int, int]:
        """The counts. Raises `UserError` if too many of the steps up to this one were left out in a row."""
        total, in_a_row = self.counts
        if in_a_row >= MAX_IN_A_ROW:
            raise UserError(
                f"the last {in_a_row} steps to step {step} had no finite gradient and were left out; lower "
                f"optim.learning_rate or raise optim.warmup_steps, then train anew (checkpoints in {run} are good)"
            )
        return total, in_a_row

    def restore(self, total: int, in_a_row: int) -> None:
        """Goes on counting from there."""
        self._counts = torch.tensor([total, in_a_row], device=self._device)
