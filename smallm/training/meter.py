"""Mean loss and speed between two lines of the log."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Collects losses on the device, so that the loop waits for it only when a line is due."""

    def __init__(self, accelerator: Accelerator, seconds_before: float, started: float):
        """seconds_before: what earlier parts of a resumed run took; started: time.perf_counter() as this began."""
        self._accelerator = accelerator
        self._mark = time.perf_counter()
        self._start = started - seconds_before
        self.paused_seconds = 0.0
        self._total, self._steps = torch.zeros(2, device=accelerator.device), 0  # sum of the losses, their number
        self._sum_since_evaluation, self._steps_since_evaluation = 0.0, 0

    @property
    def seconds(self) -> float:
        """Since the start of the run, evaluations, checkpoints and its earlier parts included."""
        return time.perf_counter() - self._start

    def add(self, loss: Tensor) -> None:
        """The loss of one step on this process, still on the device; one that is not finite does not count."""
        counts = loss.isfinite()
        self._total += torch.stack([torch.where(counts, loss, 0), counts])
        self._steps += 1

    def read(self) -> tuple[float, float]:
        """Mean loss over the steps since the last reading and over the processes, and steps per second.

        NaN if no loss of them counts.
        """
        total, number = self._accelerator.reduce(self._total, "sum").tolist()
        mean = total / number if number else math.nan
        now, steps = time.perf_counter(), self._steps
        speed = steps / (now - self._mark)
        if number:
            self._sum_since_evaluation += mean * steps
            self._steps_since_evaluation += steps
        self._total, self._steps, self._mark = torch.zeros_like(self._total), 0, now
        return mean, speed

    def since_evaluation(self) -> float | None:
        """Mean loss since this was last asked; None if no step was read since."""
        total, steps = self._sum_since_evaluation, self._steps_since_evaluation
        self._sum_since_evaluation, self._steps_since_evaluation = 0.0, 0
        return total / steps if steps else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within does not count as training speed."""
        begun = time.perf_counter()
        yield
        pause = time.perf_counter() - begun
        self._mark += pause
        self.paused_seconds += pause
