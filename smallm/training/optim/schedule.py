"""How a run divides into steps, and the learning rate of each: pure functions of the config."""

import math

from smallm.errors import UserError
from smallm.training.config import Config, OptimConfig

QUICK_STEPS = 560  # of a run that sets neither max_steps nor epochs


def learning_rate_factor(step: int, config: OptimConfig, total_steps: int, steps_per_epoch: float) -> float:
    """Share of the peak learning rate at `step` (0-based) of `total_steps`.

    Warm-up is linear over the first `warmup_steps`; `exponential` then multiplies by gamma at the start of each epoch,
    `cosine` falls to min_lr at the end, and `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM) falls to min_lr
    over the last `decay_fraction` of the run, linearly.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr / config.learning_rate
    if config.schedule == "exponential":
        return config.gamma ** int(step / steps_per_epoch)
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "wsd":
        left = (total_steps - step) / max(1.0, config.decay_fraction * total_steps)
        return floor + (1 - floor) * max(0.0, min(1.0, left))
    return 1.0


def window_length(step: int, config: Config, total_steps: int) -> int:
    """Length of the windows at `step`: short ones first, since what is near is learned first, then block_size."""
    for window, until in zip(config.train.short_windows, config.train.short_until, strict=True):
        if step < until * total_steps:
            return window
    return config.model.block_size


def divide_batch(batch_size: int, micro_batch_size: int, ranks: int) -> tuple[int, int]:
    """Global batch -> (sequences per process and pass, passes). Raises `UserError` naming sizes that divide."""
    micro = micro_batch_size or max(1, batch_size // ranks)
    if batch_size % (micro * ranks):
        unit = micro * ranks if micro_batch_size else ranks
        near = sorted({max(unit, batch_size // unit * unit), (batch_size // unit + 1) * unit})
        raise UserError(
            f"train.batch_size = {batch_size} cannot be shared by {ranks} process(es)"
            + (f" in passes of micro_batch_size = {micro}" if micro_batch_size else "")
            + f"; use batch_size {' or '.join(map(str, near))}"
        )
    return micro, batch_size // (micro * ranks)


def total_steps(max_steps: int, epochs: float, steps_per_epoch: float) -> int:
    """Steps to run: max_steps or those that make up the epochs, whichever comes first (0 = not set; both 0 = 560)."""
    if not max_steps and not epochs:
        return QUICK_STEPS
    by_epochs = max(1, math.ceil(epochs * steps_per_epoch)) if epochs else math.inf
    return int(min(max_steps or math.inf, by_epochs))
