"""`--minutes`: measures machine and text, and makes a whole config of what the user has set and what is chosen."""

import bz2
import math
import sys
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from smallm.runs.config_file import flatten
from smallm.tokenizer.vocabulary import Vocabulary
from smallm.training.budget import planner as plan
from smallm.training.budget.clock import Clock
from smallm.training.budget.planner import Plan
from smallm.training.budget.probe import flops_per_second
from smallm.training.config import Config, DataConfig, ModelConfig
from smallm.training.data.corpus import BYTES, Corpus, corpus_of
from smallm.training.distributed import broadcast_from_main
from smallm.training.optim.schedule import divide_batch

PROBES = {"cpu": (ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=128), 12)}  # shape, sequences of a process
OTHER_PROBE = (ModelConfig(n_layer=8, n_head=6, n_embd=384, block_size=256), 64)
MIN_BATCH = {"cpu": 512}  # ids of a process below which a step gets no faster
OTHER_LEAST_BATCH = 16384
PROBE_SECONDS, OWN_PROBE_SECONDS, PROBE_SHARE = 2.0, 1.0, 0.015  # at most, and of the time
SAMPLE_IDS, SAMPLE_PIECES = 1 << 20, 4  # of the text, to estimate its information
MIN_SECONDS = 1.0  # to plan for, however little is left


def open_text(accelerator: Accelerator, data: DataConfig, base: Vocabulary = BYTES) -> Corpus:
    """The text, with its characters added to `base`; on each machine one process encodes it, the others open that.

    Machines that share a cache find each other by its lock; on those with a cache of their own each has to encode.
    """
    with accelerator.local_main_process_first():
        return corpus_of(data, base, progress=accelerator.is_main_process)


def plan_run(
    accelerator: Accelerator, config: Config, corpus: Corpus, explicit: Set[str], clock: Clock,
    base: Vocabulary = BYTES,
) -> tuple[Config, Corpus, int]:
    """The config for `config.train.minutes`, the text split for it, and about how many steps to expect.

    explicit: the settings, as `section.field`, that are not to be chosen; base: as of `open_text`. Says in three lines
    on stderr what it found and chose.
    """
    minutes, kind = config.train.minutes, accelerator.device.type
    config, corpus = _with_tail(accelerator, config, corpus, explicit, base)
    kept = {key: value for key, value in flatten(config.to_dict()).items() if key in explicit}
    text = {"train_ids": len(corpus.train_ids), "val_ids": len(corpus.val_ids), "information": compressed_bytes(corpus),
            "vocabulary": corpus.vocabulary.size, "ranks": accelerator.num_processes,
            "least_batch": MIN_BATCH.get(kind, OTHER_LEAST_BATCH) * accelerator.num_processes}  # fmt: skip

    def choose(speed: float, explicit: Mapping[str, Any]) -> Plan:
        (taken,) = broadcast_from_main(accelerator, clock.seconds + clock.end_seconds)
        seconds = max(MIN_SECONDS, 60 * minutes - taken)
        return plan.choose(**text, seconds=seconds, flops_per_second=speed, explicit=explicit)

    def measure(config: Config, rows: int, most: float) -> float:
        seconds = min(most, PROBE_SHARE * 60 * minutes)
        return flops_per_second(accelerator, config, corpus.vocabulary.size, rows, seconds)

    shape, rows = PROBES.get(kind, OTHER_PROBE)
    first = choose(measure(replace(config, model=shape), rows, PROBE_SECONDS), kept)
    trial = first.config(config)
    rows, _ = divide_batch(trial.train.batch_size, trial.train.micro_batch_size, accelerator.num_processes)
    speed = measure(trial, rows, OWN_PROBE_SECONDS)
    shape = {key: value for key, value in first.settings.items() if key in plan.SHAPE}  # stays; what goes with it moves
    final = choose(speed, kept | shape)
    config = final.config(first.config(config))
    if accelerator.is_main_process:
        print(*_words(final, config, corpus, text["information"], speed), sep="\n", file=sys.stderr)
    return config, corpus, final.steps


def compressed_bytes(corpus: Corpus) -> float:
    """Bytes that the training part takes when compressed, judged by a sample of it."""
    ids = corpus.train_ids
    size = min(len(ids), SAMPLE_IDS) // SAMPLE_PIECES
    starts = [(len(ids) - size) * i // max(1, SAMPLE_PIECES - 1) for i in range(SAMPLE_PIECES)]
    sample = b"".join(corpus.vocabulary.decode(ids[start : start + size]).encode() for start in starts)
    return len(bz2.compress(sample)) * len(ids) / max(1, size * SAMPLE_PIECES)


def bz2_nats_per_character(corpus: Corpus) -> float:
    """Nats per character that bz2 needs for the text."""
    return compressed_bytes(corpus) * 8 * math.log(2) / corpus.train_characters


def _with_tail(
    accelerator: Accelerator, config: Config, corpus: Corpus, explicit: Set[str], base: Vocabulary
) -> tuple[Config, Corpus]:
    """With a validation part that can be measured on in the time, unless the user has set its share."""
    if "data.val_fraction" in explicit:
        return config, corpus
    characters = corpus.train_characters + corpus.val_characters
    share = plan.val_fraction(characters, config.train.minutes, config.data.val_fraction)
    if share == config.data.val_fraction:
        return config, corpus
    config = replace(config, data=replace(config.data, val_fraction=share))
    return config, open_text(accelerator, config.data, base)


def _words(chosen: Plan, config: Config, corpus: Corpus, information: float, speed: float) -> list[str]:
    """What was measured, what the text holds, what was chosen; a line each."""
    m, t = config.model, config.train
    end = f"; {plan.MAX_EPOCHS} times is the most, so it ends before its time" if chosen.short_text else ""
    return [
        f"plan   this machine trains at {speed / 1e9:,.0f} GFLOP/s, so {t.minutes:g} minutes buy "
        f"{chosen.ids / 1e6:,.1f} M ids of text, with the start and the end taken off",
        f"plan   the text holds about {information / 1e3:,.0f} KB of information in {corpus.train_characters:,} "
        f"characters to learn; the run reads it {chosen.epochs:,.1f} times{end}",
        f"plan   {m.n_layer} layers x {m.n_embd}, {chosen.parameters / 1e6:,.1f} M parameters, context {m.block_size}, "
        f"{t.batch_size} sequences a step, dropout {m.dropout:g}, about {chosen.steps:,} steps",
    ]
