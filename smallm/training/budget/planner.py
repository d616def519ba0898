"""What a given time buys: from the speed of the machine and the size of the text to the settings of a run.

The rules are numbers from measured runs of one to twenty minutes on two CPU cores (texts of 0.2 to 20 MB), carried on
to larger machines where nothing was measured:

shape       The blocks get 0.85 M parameters for a compute of 17e12 FLOP, and more with its power 0.6: the nearest step
            of the ladder 2x64, 3x96, 4x128, 6x128, 6x160, 6x192, 6x256, 8x320, 8x384, 10x512, 12x640, 12x768 (layers x
            width). Never much more than 12 for each byte of information in the text, which it would learn by heart.
batch       768 ids a step for a run of 215,000 ids, growing with the power 0.29 of its length.
windows     64 ids in the shortest runs, then 128, 256, 512; short ones first; never over a quarter of the text.
dropout     by the number of times that the text is read: none up to 1.5, 0.1 at 6, 0.3 from 25. Never over 60 times:
            a run that has read the text as often ends before its time.
optimiser   Muon with warm-up, a stable part and a long decay; momentum and Newton-Schulz steps by the run's length.

What the user has set stays as it is, and the rest is chosen to go with it.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from smallm.runs.config_file import flatten
from smallm.training.config import Config

LADDER = ((2, 64), (3, 96), (4, 128), (6, 128), (6, 160), (6, 192), (6, 256), (8, 320), (8, 384), (10, 512), (12, 640),
          (12, 768))  # fmt: skip
SHAPE = ("model.n_layer", "model.n_head", "model.n_embd")
PARAMETERS, COMPUTE, POWER = 0.85e6, 17e12, 0.6  # 4x128 beat 6x128 at 10e12 FLOP, 6x160 beat 6x128 at 45e12
PARAMETERS_PER_BYTE = 12  # of information: 3.5 M parameters still gain on Shakespeare's 290 KB, more do not
NARROW, NARROW_HEAD, WIDE_HEAD = 256, 32, 64  # width up to which heads of 32 are better than half as many of 64
BATCH_IDS, BATCH_RUN, BATCH_POWER = 768, 215e3, 0.29  # best ids a step for the shortest run; its growth, fitted
WINDOW_RUNS = ((0, 64), (400e3, 128), (1e6, 256), (60e6, 512))  # ids of the run from which a longer window pays
SHORT = ((256, (4, 2), (0.15, 0.8)), (128, (2,), (0.5,)), (64, (2,), (0.4,)))  # window from, its parts, until
WINDOWS_IN_TEXT = 4  # at least, or there is hardly a batch
NEAR_THETA, NEAR_WINDOW, FAR_THETA = 1000.0, 256, 10000.0  # windows of 256 want no rotation slower than they are long
DROPOUT = ((1.5, 0.0), (3, 0.05), (6, 0.1), (12, 0.2), (25, 0.3))  # times the text is read -> dropout, best of each
MAX_EPOCHS = 60  # beyond, every dropout overfits
MOMENTUM = ((0, 0.75), (400e3, 0.9), (30e6, 0.95))  # ids of the run -> how long Muon's memory pays
NEWTON_SCHULZ = ((0, 3), (5e6, 5))  # ids of the run -> iterations; in short runs their time is worth more as steps
CLIPPED_FROM = 30e6  # ids; shorter runs under Muon gain nothing from clipping and lose its time
WARMUP, DECAY = 0.02, 0.7  # shares of the run
EVALUATIONS, EVALUATION_SHARE = 5, 0.02  # in a run, and the share of its time that each may take
TAIL_PER_MINUTE, TAIL_LEAST, TAIL_MOST = 60e3, 50e3, 2e6  # characters of validation text that this allows
FORECAST = (0.43, 0.41)  # loss at the end = the one of that after a tenth + the other of what bz2 needs, fitted
FORECAST_SPREAD = 0.1  # share of it by which runs on four texts missed it, one of them by 0.17
FORECAST_FROM, FORECAST_AT = 0.09, 0.1  # part of the run whose mean loss is the base of the forecast


@dataclass(frozen=True)
class Plan:
    """A chosen run.

    settings: "section.field" -> value, of the fields that the user did not set; parameters: of the blocks; ids, steps,
    epochs: the length of the run, as far as it can be known; short_text: the text is at its end before the time is.
    """

    settings: dict[str, Any]
    parameters: float
    ids: float
    steps: int
    epochs: float
    short_text: bool

    def config(self, config: Config) -> Config:
        """`config` with the settings of the plan."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in (flatten(config.to_dict()) | self.settings).items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        return Config.from_dict(sections)


def choose(
    *,
    train_ids: int,
    val_ids: int,
    vocabulary: int,
    information: float,
    seconds: float,
    flops_per_second: float,
    explicit: Mapping[str, Any],
    ranks: int = 1,
    least_batch: int = 512,
) -> Plan:
    """The settings for a run of `seconds` of training and evaluation.

    train_ids, val_ids: lengths of the text's parts; vocabulary: its size; information: bytes in the training part;
    flops_per_second: as measured in training on all `ranks` processes; least_batch: ids of a step below which it gets
    no faster; explicit: "section.field" -> value of what is set already.
    """
    compute = seconds * (1 - EVALUATIONS * EVALUATION_SHARE) * flops_per_second
    settings = _shape(compute, information, explicit) | {"optim.name": "muon"} | explicit
    layers, width = settings["model.n_layer"], settings["model.n_embd"]
    parameters, most = 12.0 * layers * width**2, float(MAX_EPOCHS * train_ids)
    matrices = 6 * (parameters + vocabulary * width)
    window = _window(min(most, compute / matrices), train_ids)
    flops_per_id = matrices + 6 * layers * width * explicit.get("model.block_size", window)
    ids = min(most, compute / flops_per_id)
    epochs = ids / train_ids
    settings = {"model.block_size": window, "model.dropout": dropout(epochs)} | settings
    window = settings["model.block_size"]
    settings = _windows(window, explicit) | _batch(ids, window, ranks, least_batch, explicit) | settings
    steps = max(1, round(ids / (settings["train.batch_size"] * window)))
    evaluations = EVALUATION_SHARE * EVALUATIONS * seconds / (val_ids * flops_per_id / 3 / flops_per_second)
    settings = _optimiser(ids, steps, settings["optim.name"]) | _intervals(steps, evaluations) | settings
    chosen = {key: value for key, value in settings.items() if key not in explicit}
    return Plan(chosen, parameters, ids, steps, epochs, short_text=ids == most)


def val_fraction(characters: int, minutes: float, usual: float) -> float:
    """Share of a text to validate on: the usual one, or less where measuring on it would take too much of the time."""
    tail = min(TAIL_MOST, max(TAIL_LEAST, TAIL_PER_MINUTE * minutes))
    return min(usual, float(f"{tail / characters:.4g}"))


def dropout(epochs: float) -> float:
    """For a run that reads its text so many times; linear in the logarithm between the measured points."""
    if epochs <= DROPOUT[0][0]:
        return DROPOUT[0][1]
    for (before, low), (after, high) in pairwise(DROPOUT):
        if epochs < after:
            return round(low + (high - low) * math.log(epochs / before) / math.log(after / before), 2)
    return DROPOUT[-1][1]


def expected_loss(loss_at_tenth: float, compressed: float) -> tuple[float, float]:
    """Validation loss at the end of the run, and how far off it may be; all in nats per character.

    loss_at_tenth: training loss around the first tenth of the run; compressed: what the text takes under bz2.
    """
    final = FORECAST[0] * loss_at_tenth + FORECAST[1] * compressed
    return final, FORECAST_SPREAD * final


def _shape(compute: float, information: float, explicit: Mapping[str, Any]) -> dict[str, int]:
    size = min(PARAMETERS * (compute / COMPUTE) ** POWER, PARAMETERS_PER_BYTE * information)
    layers, width = min(LADDER, key=lambda shape: abs(math.log(12 * shape[0] * shape[1] ** 2 / size)))
    layers, width, heads = (explicit.get(f"model.{k}", v) for k, v in
                            (("n_layer", layers), ("n_embd", width), ("n_head", 0)))  # fmt: skip
    if "model.n_embd" not in explicit and ("model.n_layer" in explicit or heads):  # the width that goes with them
        unit = NARROW_HEAD * (heads or 1)
        width = unit * max(1, round((size / (12 * layers)) ** 0.5 / unit))
    if not heads:
        sizes = (WIDE_HEAD, NARROW_HEAD, 16) if width > NARROW else (NARROW_HEAD, 16)
        heads = width // next((size for size in sizes if width % size == 0), width)
    return {"model.n_layer": layers, "model.n_embd": width, "model.n_head": heads}


def _window(ids: float, train_ids: int) -> int:
    window = _step(WINDOW_RUNS, ids)
    while window > 1 and window * WINDOWS_IN_TEXT > train_ids:
        window //= 2
    return window


def _windows(window: int, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Short windows before `window`, and what goes with its length."""
    settings: dict[str, Any] = {"model.rope_theta": NEAR_THETA if window <= NEAR_WINDOW else FAR_THETA}
    for least, parts, until in SHORT:
        if window >= least and window % max(parts) == 0:
            if not {"train.short_windows", "train.short_until"} & explicit.keys():  # they go together
                settings |= {"train.short_windows": [window // n for n in parts], "train.short_until": list(until)}
            break
    return settings


def _batch(ids: float, window: int, ranks: int, least: int, explicit: Mapping[str, Any]) -> dict[str, int]:
    """Sequences a step, a multiple of what the processes take in one pass."""
    unit = ranks * (explicit.get("train.micro_batch_size", 0) or 1)
    step = max(least, BATCH_IDS * (ids / BATCH_RUN) ** BATCH_POWER)
    return {"train.batch_size": max(-(-2 // unit), round(step / (window * unit))) * unit}


def _optimiser(ids: float, steps: int, name: str) -> dict[str, Any]:
    settings = {"schedule": "wsd", "decay_fraction": DECAY, "warmup_steps": max(1, round(WARMUP * steps)),
                "weight_decay": 0.1}  # fmt: skip
    if name == "muon":
        settings |= {"learning_rate": 0.02, "adam_learning_rate": 0.004, "momentum": _step(MOMENTUM, ids),
                     "newton_schulz_steps": _step(NEWTON_SCHULZ, ids),
                     "grad_clip": 0.0 if ids < CLIPPED_FROM else 1.0}  # fmt: skip
    else:
        settings |= {"learning_rate": 0.002, "grad_clip": 1.0}
    return {f"optim.{key}": value for key, value in settings.items()}


def _intervals(steps: int, evaluations: float) -> dict[str, int]:
    """`evaluations` fit into the time. The last is at the end, wherever that will be; the others well before it."""
    number = max(1, min(EVALUATIONS, int(evaluations)))
    return {"train.eval_every": math.ceil(steps / (number - 0.5)), "train.log_every": min(100, max(1, steps // 200))}


def _step(rule: tuple[tuple[float, Any], ...], ids: float) -> Any:
    return rule[max(0, bisect_right(rule, ids, key=lambda point: point[0]) - 1)][1]
