"""Everything that can be set, in five sections: `[data] [model] [optim] [train] [sample]`.

The same field is a line in a TOML file (`[model]` / `n_layer = 6`), a flag (`--model.n_layer 6`) and an attribute
(`config.model.n_layer`). The defaults below are the quick start, `configs/quickstart.toml`.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from smallm.errors import UserError
from smallm.generation.sampler import Sampling
from smallm.training.checks import check, check_types

MAX_LAYERS, WIDEST = 999, (1 << 24) - 1  # as in the manifest of an exported model


@dataclass(frozen=True)
class DataConfig:
    source: str = "python-docs"
    """Text to train on: a file, a folder of .txt files, or a name: python-docs, shakespeare."""
    encoding: str = "utf-8"
    """Encoding of the files."""
    min_count: int = 10
    """A non-ASCII character seen at least this often gets an id of its own; rarer ones are spelled in UTF-8 bytes."""
    val_fraction: float = 0.1
    """Share of the text, at its end, that is kept for validation."""
    normalise: Literal["none", "nfc"] = "none"
    """Unicode form to bring the text into; nfc = a letter and its accents are one character where Unicode has it."""
    newlines: Literal["keep", "lf"] = "keep"
    """What becomes of line ends; lf = CR LF and CR are read as one LF."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        check(self.min_count >= 1, "data.min_count", self.min_count, "must be at least 1")
        check(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must lie between 0 and 1")


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = 3
    """Number of Transformer blocks."""
    n_head: int = 3
    """Number of attention heads."""
    n_kv_head: int = 0
    """Number of key/value heads (grouped-query attention); 0 = n_head."""
    n_embd: int = 96
    """Width of the model."""
    n_inner: int = 0
    """Width of the feed-forward layer; 0 = 8/3 of n_embd, rounded up to a multiple of 32."""
    block_size: int = 128
    """Longest context, in ids (one id a character, for ASCII text)."""
    window: int = 0
    """Positions that attention sees, its own included: a model with a window writes endless texts exactly, at constant
    speed; 0 = the whole context."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for name in ("n_kv_head", "n_inner"):
            check(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must be 0 (automatic) or more")
        most = f"must be from 0 (no window) to model.block_size = {self.block_size}"
        check(0 <= self.window <= self.block_size, "model.window", self.window, most)
        for name in ("n_layer", "n_head", "n_embd", "block_size", "n_inner"):
            most = MAX_LAYERS if name == "n_layer" else WIDEST
            check(getattr(self, name) <= most, f"model.{name}", getattr(self, name), f"must be at most {most}")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be at least 0 and less than 1")
        check(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "must be positive")
        if self.n_embd % self.n_head:
            raise UserError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}; "
                f"use n_embd = {self.n_embd // self.n_head * self.n_head or self.n_head} or another n_head"
            )
        if self.n_head % self.kv_heads:
            raise UserError(f"model.n_head = {self.n_head} is not divisible by model.n_kv_head = {self.n_kv_head}")
        if self.head_dim % 16:
            raise UserError(
                f"model.n_embd / model.n_head = {self.head_dim} is not a multiple of 16, which the exported model "
                "needs; 32 or 64 are good sizes of a head"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        """Width of the feed-forward layer, resolved."""
        return self.n_inner or -(-8 * self.n_embd // (3 * 32)) * 32

    @property
    def packed_rows(self) -> dict[str, tuple[int, ...]]:
        """Weights that hold several matrices: name within a block -> rows of each (q, k, v; gate, up)."""
        q, kv = self.n_head * self.head_dim, self.kv_heads * self.head_dim
        return {"attn.c_attn.weight": (q, kv, kv), "mlp.c_fc.weight": (self.inner, self.inner)}


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adam", "adamw", "muon"] = "muon"
    """Optimiser; muon = Muon for the matrices of the blocks, AdamW for embedding and gains."""
    learning_rate: float = 0.02
    """Peak learning rate (under muon: of the matrices)."""
    adam_learning_rate: float = 0.005
    """Peak learning rate of embedding and gains under muon; unused by adam and adamw."""
    schedule: Literal["constant", "exponential", "cosine", "wsd"] = "wsd"
    """Course of the learning rate after warm-up; wsd = warm-up, stable, linear decay."""
    gamma: float = 0.95
    """Factor per epoch of the exponential schedule."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    decay_fraction: float = 0.6
    """Last part of the run in which wsd decays."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine and wsd."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices (adamw and muon)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    momentum: float = 0.9
    """Momentum of Muon."""
    newton_schulz_steps: int = 3
    """Iterations of Muon's orthogonalisation."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        for name in ("learning_rate", "adam_learning_rate", "gamma"):
            check(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "must be positive")
        for name in ("warmup_steps", "min_lr", "weight_decay", "grad_clip"):
            check(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must not be negative")
        steps = self.newton_schulz_steps
        check(1 <= steps <= 8, "optim.newton_schulz_steps", steps, "must lie between 1 and 8")
        for value in (*self.betas, self.momentum):
            check(0 <= value < 1, "optim.betas and optim.momentum", value, "must be at least 0 and less than 1")
        check(0 <= self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "must lie between 0 and 1")
        check(self.min_lr <= self.learning_rate, "optim.min_lr", self.min_lr, "must not exceed learning_rate")


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 12
    """Sequences per step over all processes."""
    short_windows: tuple[int, ...] = ()
    """Window lengths that the run begins with instead of block_size, such as 64 128; the ids per step stay the same."""
    short_until: tuple[float, ...] = ()
    """Share of the run at which each of the short windows ends, such as 0.2 0.8."""
    micro_batch_size: int = 0
    """Sequences per process and forward pass; 0 = batch_size / processes, without accumulation."""
    max_steps: int = 0
    """Steps (optimiser updates) to train; 0 = as many as epochs says, or 560 if that is 0 too."""
    epochs: float = 0.0
    """Passes over the training text; 0 = as many as max_steps says. With both, what comes first ends the run."""
    minutes: float = 0.0
    """Minutes that all may take; what is not set is chosen for them. 0 = as long as max_steps and epochs say."""
    eval_every: int = 140
    """Steps between evaluations on the whole validation text; 0 = once an epoch."""
    save_every: int = 0
    """Steps between checkpoints, besides those at the best evaluation and at the end; 0 = eval_every."""
    keep_last: int = 2
    """Newest checkpoints to keep, besides the best."""
    patience: int = 0
    """Evaluations without improvement after which the run stops; 0 = never."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    log_with: tuple[str, ...] | str = ()
    """Trackers that get the figures and samples too, such as tensorboard or wandb (offline unless
    WANDB_MODE says more); several with commas; nothing = none."""
    sample_length: int = 120
    """Characters generated at each evaluation; 0 = none."""
    init_from: str = ""
    """Run or checkpoint whose model to go on from with another text, in a new run; empty = from nothing."""
    seed: int = 1
    """Random seed of initialisation, batches and dropout."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Arithmetic; auto = bf16 or fp16 on a GPU that has it, bf16 on a CPU where it proves faster, else fp32."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Use torch.compile; auto = on a GPU, for runs of over about three minutes."""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        for name in ("batch_size", "keep_last", "log_every"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        for name in ("micro_batch_size", "max_steps", "epochs", "eval_every", "save_every", "patience",
                     "sample_length", "seed"):  # fmt: skip
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must not be negative")
        most = 100_000
        check(self.sample_length <= most, "train.sample_length", self.sample_length, f"must be at most {most}")
        check(self.minutes >= 0, "train.minutes", self.minutes, "must be a number of minutes, such as 5")
        other = next((name for name in ("max_steps", "epochs") if getattr(self, name)), "")
        if self.minutes and other:
            raise UserError(f"train.minutes and train.{other} both say how long the run is; set one of them to 0")
        until, number = self.short_until, len(self.short_windows)
        check(len(until) == number, "train.short_until", until, f"must be {number} numbers, one per short window")
        rises = all(a < b for a, b in pairwise((0.0, *until, 1.0)))
        check(rises, "train.short_until", until, "must rise from above 0 to below 1")
        check(self.seed < 1 << 32, "train.seed", self.seed, "must be less than 4294967296")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in log_with, each once."""
        names = re.split(r"[\s,]+", self.log_with) if isinstance(self.log_with, str) else self.log_with
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class SampleConfig:
    seed: str = ""
    """Seed text of the samples shown in training; empty = as at the start of a line."""
    temperature: float = 0.8
    """Default temperature; 0 = always the likeliest character."""
    top_k: int = 40
    """Default number of likeliest ids to choose from; 0 = all."""
    top_p: float = 1.0
    """Default share of probability to choose from."""
    min_p: float = 0.0
    """Default least probability, relative to the likeliest id."""

    def __post_init__(self) -> None:
        check_types(self, "sample.")
        _ = self.sampling  # checks the ranges

    @property
    def sampling(self) -> Sampling:
        """The defaults as the sampler takes them."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Config:
    """A whole run, resolved; saved in each checkpoint."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        T = self.model.block_size
        for window in self.train.short_windows:
            divides = 0 < window < T and T % window == 0
            check(divides, "train.short_windows", window, f"must be shorter than model.block_size = {T} and divide it")

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, Any]]) -> "Config":
        """The inverse of `to_dict`; a missing field takes its default, an unknown one is a `UserError`."""
        for key in flatten(values):
            if key not in KEYS:
                raise UserError(f"unknown setting {key}{nearest(key)}")
        return cls(**{name: section(**_tuples(values.get(name, {}))) for name, section in SECTIONS.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain sections of numbers, strings and lists, as TOML and JSON hold them."""
        return {name: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
                for name, section in asdict(self).items()}  # fmt: skip


SECTIONS = {f.name: f.default_factory for f in fields(Config)}
KEYS = tuple(f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"n_layer": 6}}` -> `{"model.n_layer": 6}`."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nearest(key: str) -> str:
    """`; did you mean model.n_layer?`, or nothing when no setting is like `key`."""
    from difflib import get_close_matches

    close = get_close_matches(key, KEYS, n=1, cutoff=0.5)
    if not close:  # a right name in the wrong section, or without one
        close = [k for k in KEYS if k.split(".")[1] == key.split(".")[-1]]
    return f"; did you mean {close[0]}?" if close else ""


def _tuples(section: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
