"""The learning rate, window length and number of steps of a run: pure functions of the config."""

import math
from itertools import accumulate

from smallm.errors import UserError
from smallm.training.config import Config, OptimConfig

DEFAULT_STEPS = 800  # if neither max_steps nor epochs is set


def learning_rate_factor(step: int, config: OptimConfig, total_steps: int, steps_per_epoch: float) -> float:
    """Learning rate at `step` (0-based) of `total_steps`, as a fraction of the peak.

    The warm-up is linear over the first `config.warmup_steps`. Afterwards `config.schedule` decides:

    constant: stays at the peak.
    exponential: multiplied by `gamma` at the start of each epoch.
    cosine: falls to `min_lr` at the end of the run (Loshchilov and Hutter 2017).
    wsd: stays at the peak, then falls linearly to `min_lr` over the last `decay_fraction` of the run (warm-up, stable,
        decay; MiniCPM, Hu et al. 2024).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr / config.learning_rate
    if config.schedule == "exponential":
        return config.gamma ** int(step / steps_per_epoch)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "wsd":
        remaining = (total_steps - step) / max(1.0, config.decay_fraction * total_steps)
        return floor + (1 - floor) * max(0.0, min(1.0, remaining))
    return 1.0


def window_length(step: int, config: Config, total_steps: int) -> int:
    """Length of the training windows at `step`: the short windows first, then block_size.

    Short windows are faster, and a model learns short-range patterns first.
    """
    for window, until in zip(config.train.short_windows, config.train.short_until, strict=True):
        if step < until * total_steps:
            return window
    return config.model.block_size


def member_shares(size: int) -> list[float]:
    """Fractions of the steps of a run that each model of an ensemble gets: the last one twice as many as each other."""
    return [1 / (size + 1)] * (size - 1) + [2 / (size + 1)] if size > 1 else [1.0]


def step_cost(teachers: int) -> float:
    """Duration of a step with so many teachers, in steps of a single model: a teacher's forward pass takes a third."""
    return 1 + teachers / 3


def mean_step_cost(size: int) -> float:
    """Duration of a mean step of an ensemble, in steps of a single model."""
    return sum(share * step_cost(teachers) for teachers, share in enumerate(member_shares(size)))


def cost_done(step: int, member: int, member_start: int) -> float:
    """Duration of the first `step` steps of an ensemble, in steps of a single model.

    member: the model that trains, from 0; member_start: its first step. The models before it had equal shares.
    """
    before = sum(map(step_cost, range(member))) / max(1, member)
    return member_start * before + (step - member_start) * step_cost(member)


def cost_left(step: int, total_steps: float, member: int, size: int) -> float:
    """Duration of the steps from `step` to the end of an ensemble, in steps of a single model."""
    return total_steps * _cost_from(member, size) - step * step_cost(member)


def steps_at_cost(left: float, step: int, member: int, size: int) -> float:
    """The `total_steps` with which `cost_left` is `left`."""
    return (left + step * step_cost(member)) / _cost_from(member, size)


def _cost_from(member: int, size: int) -> float:
    """As `mean_step_cost`, if all steps before the end of a model were its own."""
    shares = member_shares(size)
    later = sum(share * step_cost(teachers) for teachers, share in enumerate(shares) if teachers > member)
    return list(accumulate(shares))[member] * step_cost(member) + later


def divide_batch(batch_size: int, micro_batch_size: int, ranks: int) -> tuple[int, int]:
    """Divides the global batch: (sequences per process and micro-step, number of micro-steps).

    micro_batch_size: the former, or 0 = all sequences of a process at once. Raises `UserError` that names the nearest
    valid sizes if batch_size is not divisible.
    """
    micro = micro_batch_size or max(1, batch_size // ranks)
    if batch_size % (micro * ranks):
        unit = micro * ranks if micro_batch_size else ranks
        near = sorted({max(unit, batch_size // unit * unit), (batch_size // unit + 1) * unit})
        raise UserError(
            f"train.batch_size = {batch_size} cannot be divided among {ranks} process(es)"
            + (f" with micro_batch_size = {micro}" if micro_batch_size else "")
            + f"; use batch_size {' or '.join(map(str, near))}"
        )
    return micro, batch_size // (micro * ranks)


def total_steps(max_steps: int, epochs: float, steps_per_epoch: float) -> int:
    """Number of optimiser steps: max_steps or the steps of `epochs`, the smaller of the two; 0 = not set.

    If both are 0, the number is DEFAULT_STEPS.
    """
    if not max_steps and not epochs:
        return DEFAULT_STEPS
    by_epochs = max(1, math.ceil(epochs * steps_per_epoch)) if epochs else math.inf
    return int(min(max_steps or math.inf, by_epochs))
