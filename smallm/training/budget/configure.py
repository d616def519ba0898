"""Completes the config of a run under `--minutes`: measures the machine and the text, and asks the planner."""

import bz2
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator

from smallm.errors import UserError
from smallm.runs.config_file import flatten
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.analysis.baselines import MAX_TIME_SHARE
from smallm.training.budget.clock import Clock
from smallm.training.budget.planner import (
    MAX_EPOCHS,
    MIN_STEPS,
    SHAPE,
    Plan,
    choose_settings,
    choose_val_fraction,
    least_seconds,
)
from smallm.training.budget.probe import flops_per_second
from smallm.training.config import Config, ModelConfig
from smallm.training.data.corpus import BYTES, Corpus, open_corpus
from smallm.training.distributed import broadcast_from_main
from smallm.training.optim.schedule import divide_batch
from smallm.training.output import Output

# Shape and sequences per process of the first probe; ids per process below which a step becomes no faster.
CPU_PROBE, CPU_MIN_BATCH_IDS = (ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=128), 12), 512
GPU_PROBE, GPU_MIN_BATCH_IDS = (ModelConfig(n_layer=8, n_head=6, n_embd=384, block_size=256), 64), 16384
FIRST_PROBE_SECONDS, SECOND_PROBE_SECONDS, PROBE_TIME = 2.0, 1.0, 0.015  # maxima; fraction of all time
SAMPLE_IDS, SAMPLE_PIECES = 1 << 20, 4  # size and number of pieces of the sample that is compressed
MIN_SECONDS = 1.0  # shortest duration to plan for
HANDFUL = 5  # steps below which a run is refused


def open_text(
    accelerator: Accelerator, config: Config, base: Vocabulary = BYTES, smaller_validation: bool = False
) -> Corpus:
    """Opens the text on all processes. On each machine the first process encodes it, then the others open the result.

    Machines that share a cache folder encode once, guarded by a lock; otherwise each machine encodes.

    base: the vocabulary to which the characters of the text are added.
    smaller_validation: makes the validation part of a long text so small that `train.minutes` allow its evaluation.
    """
    minutes, default = config.train.minutes, config.data.val_fraction
    with accelerator.local_main_process_first():
        return open_corpus(
            config.data, base, progress=accelerator.is_main_process, seed=config.train.seed,
            choose_val_fraction=partial(choose_val_fraction, minutes=minutes, default=default)
            if smaller_validation else None,
        )  # fmt: skip


def plan_run(
    accelerator: Accelerator, config: Config, corpus: Corpus, explicit: Set[str], clock: Clock
) -> tuple[Config, int]:
    """Chooses all settings that the user has not set; prints three lines about them to stderr, or a warning too.

    Measures the speed twice: with a standard model, to choose a shape, and with the chosen shape, to choose the rest;
    the second time with the compiled model if the run will compile it.

    explicit: the settings that the user has set, as "section.field". clock: the time that has passed is deducted.
    All processes must call this. Returns the complete config and the estimated number of steps. Raises `UserError` if
    not even a handful of steps fit into the time.
    """
    minutes, on_cpu, ranks = config.train.minutes, accelerator.device.type == "cpu", accelerator.num_processes
    config = replace(config, data=replace(config.data, val_fraction=corpus.val_fraction))
    kept = {key: value for key, value in flatten(config.to_dict()).items() if key in explicit}
    text_bytes = compressed_bytes(corpus)
    min_batch_ids = (CPU_MIN_BATCH_IDS if on_cpu else GPU_MIN_BATCH_IDS) * ranks

    def taken() -> float:
        (seconds,) = broadcast_from_main(accelerator, clock.seconds + clock.end_seconds)
        return seconds

    def choose(seconds: float, speed: float, explicit: Mapping[str, Any]) -> Plan:
        return choose_settings(
            train_ids=len(corpus.train_ids), val_ids=len(corpus.val_ids), vocab_size=corpus.vocabulary.size,
            compressed_bytes=text_bytes, seconds=max(MIN_SECONDS, seconds), flops_per_second=speed,
            explicit=explicit, ranks=ranks, min_batch_ids=min_batch_ids,
        )  # fmt: skip

    def measure(config: Config, rows: int, max_seconds: float, passes: int = 0) -> float:
        seconds = min(max_seconds, PROBE_TIME * 60 * minutes)
        return flops_per_second(accelerator, config, corpus.vocabulary.size, rows, seconds, passes)

    model, rows = CPU_PROBE if on_cpu else GPU_PROBE
    speed = measure(replace(config, model=model), rows, FIRST_PROBE_SECONDS)
    first = choose(60 * minutes - taken(), speed, kept)
    first_config = first.config(config)
    rows, passes = divide_batch(first_config.train.batch_size, first_config.train.micro_batch_size, ranks)
    speed = measure(first_config, rows, SECOND_PROBE_SECONDS, passes * first.steps)
    shape = {key: value for key, value in first.settings.items() if key in SHAPE}
    beside = taken()
    final = choose(60 * minutes - beside, speed, kept | shape)  # keeps the shape, adapts the others to the speed
    warning = check_time(minutes, beside, final, lambda seconds: choose(seconds, speed, kept))
    config = final.config(first_config)
    if accelerator.is_main_process:
        print(*_summary(final, config, corpus, text_bytes, speed), *warning, sep="\n", file=Output("stderr"))
    return config, final.steps


def check_time(minutes: float, beside: float, plan: Plan, longer: Callable[[float], Plan]) -> list[str]:
    """A warning if the time gives a model that has hardly learned anything; otherwise an empty list.

    Args:
        minutes: duration of the whole run.
        beside: seconds of it that are not training: the start, the measurements, the end.
        plan: of the rest of the time, or of MIN_SECONDS if less is left.
        longer: gives the plan for other seconds of training.

    Raises `UserError` if less than HANDFUL steps fit.
    """
    fits = min(1.0, max(0.0, 60 * minutes - beside) / MIN_SECONDS)  # fraction of the planned steps
    steps = int(fits * plan.kept_steps)
    if steps >= MIN_STEPS or (plan.short_text and fits == 1):
        return []
    seconds = beside + least_seconds(longer, max(MIN_SECONDS, 60 * minutes - beside))
    least = seconds / 60 / (1 - 2 * PROBE_TIME - MAX_TIME_SHARE)  # measurements and baselines take more of it too
    least = math.ceil(least if least > 10 else 10 * least) / (1 if least > 10 else 10)
    count = f"{steps} step{'' if steps == 1 else 's'}"
    if steps < HANDFUL:
        raise UserError(f"minutes = {minutes:g} leaves time for {count}, since the start and the end of the run take "
                        f"{beside:.0f} s here; give minutes = {least:g} or more")  # fmt: skip
    return [f"warning: minutes = {minutes:g} leaves the model about {count}, in which it hardly learns anything; give "
            f"minutes = {least:g} or more"]  # fmt: skip


def compressed_bytes(corpus: Corpus) -> float:
    """Size of the training part compressed by bz2, in bytes, estimated from a sample."""
    ids = corpus.train_ids
    size = min(len(ids), SAMPLE_IDS) // SAMPLE_PIECES
    starts = [(len(ids) - size) * i // max(1, SAMPLE_PIECES - 1) for i in range(SAMPLE_PIECES)]
    sample = b"".join(corpus.vocabulary.decode(ids[start : start + size]).encode() for start in starts)
    return len(bz2.compress(sample)) * len(ids) / max(1, size * SAMPLE_PIECES)


def _summary(plan: Plan, config: Config, corpus: Corpus, text_bytes: float, speed: float) -> list[str]:
    """Three lines: the speed, the text, the model."""
    m, t = config.model, config.train
    models = f", {t.ensemble} models one after another, each taught by those before it" if t.ensemble > 1 else ""
    buy = "1 minute buys" if t.minutes == 1 else f"{t.minutes:g} minutes buy"
    end = f"; more than {MAX_EPOCHS} times would not help, so it ends before its time" if plan.short_text else ""
    return [
        f"plan   this machine trains at {speed / 1e9:,.0f} GFLOP/s, so {buy} "
        f"{plan.ids / 1e6:,.1f} M ids of text, after deducting the start and the end",
        f"plan   the text holds about {text_bytes / 1e3:,.0f} KB of information in {corpus.train_characters:,} "
        f"characters to learn; the run reads it {plan.epochs:,.1f} times{end}",
        f"plan   {m.n_layer} layers x {m.n_embd}, {plan.parameters / 1e6:,.1f} M parameters, context {m.block_size}, "
        f"{t.batch_size} sequences a step, dropout {m.dropout:g}, about {plan.steps:,} steps{models}",
    ]
