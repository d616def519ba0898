"""Chooses the settings of a run under `--minutes`: model size, batch, windows, dropout, schedule.

The inputs are the speed of the machine, the time and the size of the text. The rules are the constants below, fitted to
measured runs of one to twenty minutes on two CPU cores (texts of 0.2 to 20 MB) and extrapolated to larger machines.
Settings that the user has set explicitly are kept, and the others are chosen to match.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from smallm.runs.config_file import flatten
from smallm.training.config import Config
from smallm.training.optim.schedule import mean_step_cost, member_shares

LADDER = ((2, 64), (3, 96), (4, 128), (6, 128), (6, 160), (6, 192), (6, 256), (8, 320), (8, 384), (10, 512), (12, 640),
          (12, 768))  # fmt: skip
SHAPE = ("model.n_layer", "model.n_head", "model.n_embd")
# Parameters of the blocks at this number of FLOP, and growth. A larger model would memorise the text.
PARAMETERS, COMPUTE, POWER = 0.85e6, 17e12, 0.6  # 4x128 beat 6x128 at 10e12 FLOP, 6x160 beat 6x128 at 45e12
PARAMETERS_PER_BYTE = 12  # of compressed text: up to 3.5 M parameters help on Shakespeare's 290 KB, more do not
NARROW, NARROW_HEAD, WIDE_HEAD = 256, 32, 64  # up to this width, heads of 32 are better than half the number of 64
BATCH_IDS, BATCH_RUN, BATCH_POWER = 768, 215e3, 0.29  # best ids per step for the shortest run; fitted growth
WINDOW_RUNS = ((0, 64), (400e3, 128), (1e6, 256), (60e6, 512))  # (ids of the run at least, window)
SHORT = ((256, (4, 2), (0.15, 0.8)), (128, (2,), (0.5,)), (64, (2,), (0.4,)))  # window at least, divisors, until
MIN_WINDOWS = 4  # windows in the training part, at least
NEAR_THETA, NEAR_WINDOW, FAR_THETA = 1000.0, 256, 10000.0  # up to 256 positions, slower rotations are useless
DROPOUT = ((5, 0.0), (12, 0.1), (25, 0.2))  # (epochs, best dropout)
ENSEMBLE_FROM, ENSEMBLE = 8, 2  # epochs from which a model taught by another one is better; models of the run
ENSEMBLE_DROPOUT = 0.05  # at most: a model that is taught hardly overfits
MAX_EPOCHS = 60  # beyond this, the model overfits with any dropout
MOMENTUM = ((0, 0.75), (400e3, 0.9), (30e6, 0.95))  # (ids of the run, momentum of Muon)
NEWTON_SCHULZ = ((0, 3), (5e6, 5))  # (ids of the run, iterations): short runs gain more from more steps
CLIPPED_FROM = 30e6  # ids of the run; clipping costs time and does not help shorter runs under Muon
WARMUP, DECAY = 0.02, 0.7  # fractions of the run
# Steps of the model that a run keeps. On tiny Shakespeare 2x64 first beats gzip (3.10 bits) after 200: 2.91; 100: 3.17.
MIN_STEPS = 200
MAX_EVALUATIONS, EVALUATION_TIME = 5, 0.02  # number per run, and fraction of the time that each may take
LONGER = 1.05  # factor by which the search for the least time proceeds
VALIDATION_PER_MINUTE, MIN_VALIDATION, MAX_VALIDATION = 60e3, 50e3, 2e6  # characters of the validation part


@dataclass(frozen=True)
class Plan:
    """The chosen settings and the expected length of a run."""

    settings: dict[str, Any]
    """"section.field" -> value, for the fields that the user did not set."""
    parameters: float
    """Number of parameters of the blocks."""
    ids: float
    """Expected number of ids to train on."""
    steps: int
    """Expected number of steps."""
    kept_steps: float
    """Those of the model that the run keeps: all, or those of the last model of an ensemble."""
    epochs: float
    """Expected number of epochs."""
    short_text: bool
    """Whether the run reaches MAX_EPOCHS before its time is up."""

    def config(self, config: Config) -> Config:
        """`config` with the chosen settings."""
        return Config.from_dict(flatten(config.to_dict()) | self.settings)


def choose_settings(
    *,
    train_ids: int,
    val_ids: int,
    vocab_size: int,
    compressed_bytes: float,
    seconds: float,
    flops_per_second: float,
    explicit: Mapping[str, Any],
    ranks: int = 1,
    min_batch_ids: int = 512,
) -> Plan:
    """The settings for a run of a given duration.

    Args:
        train_ids, val_ids: lengths of the training and the validation part, in ids.
        vocab_size: size of the vocabulary.
        compressed_bytes: size of the training part compressed by bz2, in bytes.
        seconds: duration of training and evaluation.
        flops_per_second: speed of training, measured on all processes together.
        explicit: "section.field" -> value of the settings that the user has set.
        ranks: number of processes.
        min_batch_ids: ids per step below which a step becomes no faster.
    """
    compute = seconds * (1 - MAX_EVALUATIONS * EVALUATION_TIME) * flops_per_second
    settings: dict[str, Any] = {**_shape(compute, compressed_bytes, explicit), "optim.name": "muon", **explicit}
    layers, width = settings["model.n_layer"], settings["model.n_embd"]
    parameters, max_ids = 12.0 * layers * width**2, float(MAX_EPOCHS * train_ids)
    matrices = 6 * (parameters + vocab_size * width)
    window = _window(min(max_ids, compute / matrices), train_ids)
    flops_per_id = matrices + 6 * layers * width * explicit.get("model.block_size", window)
    ids = min(max_ids, compute / flops_per_id)
    single = ids < ENSEMBLE_FROM * train_ids or explicit.get("train.init_from")
    settings = {"train.ensemble": 1 if single else ENSEMBLE, "model.block_size": window} | settings
    size, share = settings["train.ensemble"], member_shares(settings["train.ensemble"])[0]
    ids = min(max_ids, compute / (mean_step_cost(size) * flops_per_id))
    epochs = ids / train_ids
    dropout, window = choose_dropout(share * epochs), settings["model.block_size"]
    settings = {"model.dropout": min(dropout, ENSEMBLE_DROPOUT) if size > 1 else dropout} | settings
    settings = _windows(window, explicit) | _batch(ids, window, ranks, min_batch_ids, explicit) | settings
    steps = max(1, round(ids / (settings["train.batch_size"] * window)))
    evaluations = EVALUATION_TIME * MAX_EVALUATIONS * seconds / (val_ids * flops_per_id / 3 / flops_per_second)
    optimiser = _optimiser(share * ids, share * steps, settings["optim.name"])
    settings = optimiser | _intervals(steps, evaluations) | settings
    chosen = {key: value for key, value in settings.items() if key not in explicit}
    kept_steps = member_shares(size)[-1] * steps
    return Plan(chosen, parameters, ids, steps, kept_steps, epochs, short_text=ids == max_ids)


def least_seconds(plan: Callable[[float], Plan], seconds: float) -> float:
    """The shortest duration above `seconds` in which the model that is kept makes MIN_STEPS, or reads all it should.

    plan: gives the plan for a duration.
    """
    while not (found := plan(seconds)).short_text and found.kept_steps < MIN_STEPS:
        seconds *= LONGER
    return seconds


def has_few_steps(total_steps: int, steps_per_epoch: float, models: int) -> bool:
    """Whether the time, rather than the text, leaves the model that a run keeps fewer than MIN_STEPS."""
    return member_shares(models)[-1] * total_steps < MIN_STEPS and total_steps < int(MAX_EPOCHS * steps_per_epoch)


def choose_val_fraction(characters: int, minutes: float, default: float) -> float:
    """Fraction of the text for validation: the default, or less if its evaluation would take too much time."""
    validation = min(MAX_VALIDATION, max(MIN_VALIDATION, VALIDATION_PER_MINUTE * minutes))
    return min(default, float(f"{validation / max(1, characters):.4g}"))


def choose_dropout(epochs: float) -> float:
    """Dropout for a number of epochs: interpolates DROPOUT, linearly in the logarithm of the epochs."""
    if epochs <= DROPOUT[0][0]:
        return DROPOUT[0][1]
    for (before, low), (after, high) in pairwise(DROPOUT):
        if epochs < after:
            return round(low + (high - low) * math.log(epochs / before) / math.log(after / before), 2)
    return DROPOUT[-1][1]


def _shape(compute: float, compressed_bytes: float, explicit: Mapping[str, Any]) -> dict[str, int]:
    size = min(PARAMETERS * (compute / COMPUTE) ** POWER, PARAMETERS_PER_BYTE * compressed_bytes)
    layers, width = min(LADDER, key=lambda shape: abs(math.log(12 * shape[0] * shape[1] ** 2 / size)))
    layers, width, heads = (explicit.get(f"model.{k}", v) for k, v in
                            (("n_layer", layers), ("n_embd", width), ("n_head", 0)))  # fmt: skip
    if "model.n_embd" not in explicit and ("model.n_layer" in explicit or heads):  # match the width to them
        unit = NARROW_HEAD * (heads or 1)
        width = unit * max(1, round((size / (12 * layers)) ** 0.5 / unit))
    if not heads:
        sizes = (WIDE_HEAD, NARROW_HEAD, 16) if width > NARROW else (NARROW_HEAD, 16)
        heads = width // next((size for size in sizes if width % size == 0), width)
    return {"model.n_layer": layers, "model.n_embd": width, "model.n_head": heads}


def _window(ids: float, train_ids: int) -> int:
    window = _lookup(WINDOW_RUNS, ids)
    while window > 1 and window * MIN_WINDOWS > train_ids:
        window //= 2
    return window


def _windows(window: int, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Short windows before `window`, and the RoPE base for its length."""
    settings: dict[str, Any] = {"model.rope_theta": NEAR_THETA if window <= NEAR_WINDOW else FAR_THETA}
    for minimum, divisors, until in SHORT:
        if window >= minimum and window % max(divisors) == 0:
            if not {"train.short_windows", "train.short_until"} & explicit.keys():  # set together
                settings |= {"train.short_windows": [window // n for n in divisors], "train.short_until": list(until)}
            break
    return settings


def _batch(ids: float, window: int, ranks: int, min_ids: int, explicit: Mapping[str, Any]) -> dict[str, int]:
    """Sequences per step, a multiple of the sequences of one micro-step on all processes."""
    unit = ranks * (explicit.get("train.micro_batch_size", 0) or 1)
    batch_ids = max(min_ids, BATCH_IDS * (ids / BATCH_RUN) ** BATCH_POWER)
    return {"train.batch_size": max(-(-2 // unit), round(batch_ids / (window * unit))) * unit}


def _optimiser(ids: float, steps: float, name: str) -> dict[str, Any]:
    settings = {"schedule": "wsd", "decay_fraction": DECAY, "warmup_steps": max(1, round(WARMUP * steps)),
                "weight_decay": 0.1}  # fmt: skip
    if name == "muon":
        settings |= {"learning_rate": 0.02, "adam_learning_rate": 0.004, "momentum": _lookup(MOMENTUM, ids),
                     "newton_schulz_steps": _lookup(NEWTON_SCHULZ, ids),
                     "grad_clip": 0.0 if ids < CLIPPED_FROM else 1.0}  # fmt: skip
    else:
        settings |= {"learning_rate": 0.002, "grad_clip": 1.0}
    return {f"optim.{key}": value for key, value in settings.items()}


def _intervals(steps: int, evaluations: float) -> dict[str, int]:
    """Intervals for `evaluations` evaluations: the last at the end of the run, the one before well before the end."""
    count = max(1, min(MAX_EVALUATIONS, int(evaluations)))
    return {"train.eval_every": math.ceil(steps / (count - 0.5)), "train.log_every": min(100, max(1, steps // 200))}


def _lookup(rule: tuple[tuple[float, Any], ...], ids: float) -> Any:
    """The value of the last entry whose ids are at most `ids`."""
    return rule[max(0, bisect_right(rule, ids, key=lambda point: point[0]) - 1)][1]
