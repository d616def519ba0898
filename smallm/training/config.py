"""Everything that can be set, in five sections: `[data] [model] [optim] [train] [sample]`.

Each field is at once a line in a TOML file (`[model]` / `n_layer = 6`), a flag (`--model.n_layer 6`), a keyword of
`smallm.train` (`model={"n_layer": 6}`) and an attribute (`config.model.n_layer`). The defaults are the quick start,
`configs/quickstart.toml`.
"""

import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from itertools import pairwise
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from smallm.errors import UserError
from smallm.model_file.sampling import Sampling
from smallm.runs.config_file import flatten

MAX_LAYERS, MAX_WIDTH = 999, (1 << 24) - 1  # the limits of an exported model's manifest
MAX_NUMBER = 1 << 53  # the largest whole number up to which a float tells all neighbours apart
MAX_SAMPLE = 100_000  # characters
MAX_BATCH = 1 << 20  # sequences
BOUNDS = {"at_least": operator.ge, "more_than": operator.gt, "at_most": operator.le, "less_than": operator.lt}


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with a line for `--help` and bounds for its value (or for each number of a tuple).

    bounds: any of `at_least`, `more_than`, `at_most`, `less_than`.
    """
    return field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True)
class DataConfig:
    source: tuple[str, ...] | str = option(
        "python-docs", "Text to train on: a file (.gz, .bz2, .xz, .zst and .zip are unpacked; .jsonl and .csv are "
        "read by record), a folder, a pattern such as 'notes/**/*.md', - for standard input, hf:NAME[:CONFIG[:SPLIT]] "
        "for a dataset of the Hugging Face hub, or a built-in one: python-docs, shakespeare. Several texts follow one "
        "another.",
    )  # fmt: skip
    include: tuple[str, ...] = option(("*.txt",), "Patterns of the files that are read from a folder.")
    exclude: tuple[str, ...] = option((), "Patterns of the files that are not read from a folder or pattern.")
    field: str = option("text", "Key of JSON lines, or column of CSV, that holds the text.")
    encoding: str = option("utf-8", "Encoding of the files.")
    min_count: int = option(
        10, "Number of times that a non-ASCII character must occur to get its own id; rarer characters are spelled in "
        "UTF-8 bytes.", at_least=1,
    )  # fmt: skip
    val_fraction: float = option(
        0.1, "Fraction of the text that is held out for validation.", more_than=0, less_than=1
    )
    weights: tuple[float, ...] = option(
        (), "Shares of the training windows that are drawn from each of several texts, such as 2,1 for twice as many "
        "from the first as from the second; each text is split separately. Empty = in proportion to their lengths.",
        more_than=0,
    )  # fmt: skip
    split: Literal["tail", "blocks", "documents"] = option(
        "tail", "Part of the text that is held out: tail = its end; blocks = the ends of 50 blocks of the same length, "
        "for a text whose end differs from the rest; documents = whole documents, which are shuffled.",
    )  # fmt: skip
    separator: str = option(
        "", "String that ends each document, such as '<|endoftext|>'; written after each record and each file that "
        "does not end with it. Empty = a newline, and each record, or else each file, is a document.",
    )  # fmt: skip
    normalise: Literal["none", "nfc"] = option(
        "none", "Unicode normalisation; nfc joins a letter and its accents into one character where Unicode has one."
    )
    newlines: Literal["keep", "lf"] = option("keep", "Line ends; lf replaces CR LF and CR by LF.")

    def __post_init__(self) -> None:
        check_section(self, "data")
        texts = 1 if isinstance(self.source, str) else len(self.source)
        if self.weights and len(self.weights) != texts:
            raise UserError(f"data.weights = {self.weights} must be one number for each --data, {texts} in all")


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = option(3, "Number of Transformer blocks.", at_least=1, at_most=MAX_LAYERS)
    n_head: int = option(3, "Number of attention heads.", at_least=1, at_most=MAX_WIDTH)
    n_kv_head: int = option(0, "Number of key/value heads (grouped-query attention); 0 = n_head.", at_least=0)
    n_embd: int = option(96, "Width of the model (the embedding).", at_least=1, at_most=MAX_WIDTH)
    n_inner: int = option(
        0, "Width of the feed-forward layer; 0 = 8/3 of n_embd, rounded up to a multiple of 32.", at_least=0,
        at_most=MAX_WIDTH,
    )  # fmt: skip
    block_size: int = option(256, "Context length in ids; an ASCII character is one id.", at_least=1, at_most=MAX_WIDTH)
    window: int = option(
        0, "Positions that attention sees, including the current one; 0 = the whole context. A model with a window "
        "generates texts longer than block_size exactly and at constant speed.", at_least=0,
    )  # fmt: skip
    dropout: float = option(0.0, "Dropout probability during training.", at_least=0, less_than=1)
    rope_theta: float = option(1000.0, "Base of the rotary position embedding.", more_than=0)

    def __post_init__(self) -> None:
        check_section(self, "model")
        if self.window > self.block_size:
            raise UserError(f"model.window = {self.window} must be at most model.block_size = {self.block_size}")
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
                "needs; heads of 32 or 64 work well"
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
    name: Literal["adam", "adamw", "muon"] = option(
        "muon", "Optimiser; muon = Muon for the weight matrices of the blocks, AdamW for the embedding and the gains."
    )
    learning_rate: float = option(0.02, "Peak learning rate; with muon, that of the matrices.", more_than=0)
    adam_learning_rate: float = option(
        0.004, "Peak learning rate of the embedding and the gains with muon; adam and adamw ignore it.", more_than=0
    )
    schedule: Literal["constant", "exponential", "cosine", "wsd"] = option(
        "wsd", "Learning rate after the warm-up; exponential = times gamma each epoch, cosine = falls to min_lr, "
        "wsd = stays at the peak, then falls linearly to min_lr.",
    )  # fmt: skip
    gamma: float = option(0.95, "Factor per epoch of the exponential schedule.", more_than=0)
    warmup_steps: int = option(20, "Steps of linear warm-up.", at_least=0)
    decay_fraction: float = option(
        0.7, "Fraction of the run, at its end, in which wsd lowers the learning rate.", at_least=0, at_most=1
    )
    min_lr: float = option(0.0, "Learning rate at the end of cosine and wsd.", at_least=0)
    weight_decay: float = option(0.1, "Decoupled weight decay of the matrices (adamw and muon).", at_least=0)
    betas: tuple[float, float] = option(
        (0.9, 0.95), "Decay rates of Adam's first and second moments.", at_least=0, less_than=1
    )
    momentum: float = option(0.9, "Momentum of Muon.", at_least=0, less_than=1)
    newton_schulz_steps: int = option(3, "Newton-Schulz iterations of Muon.", at_least=1, at_most=8)
    grad_clip: float = option(
        1.0, "Largest gradient norm; a longer gradient is scaled down to this norm; 0 = no clipping.", at_least=0
    )

    def __post_init__(self) -> None:
        check_section(self, "optim")
        if self.min_lr > self.learning_rate:
            raise UserError(f"optim.min_lr = {self.min_lr} must be at most optim.learning_rate = {self.learning_rate}")


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = option(8, "Sequences per step, over all processes.", at_least=1, at_most=MAX_BATCH)
    short_windows: tuple[int, ...] = option(
        (), "Context lengths below block_size to start training with, such as 64,128; the ids per step stay the same."
    )
    short_until: tuple[float, ...] = option(
        (), "Fraction of the run at which each of the short windows ends, such as 0.2,0.8."
    )
    noise: float = option(
        0.0, "Fraction of the input characters that are replaced by random ones while training, such as 0.05; helps "
        "against overfitting when a text is read many times.", at_least=0, less_than=1,
    )  # fmt: skip
    micro_batch_size: int = option(
        0, "Sequences per process and forward pass; 0 = batch_size / processes, without gradient accumulation.",
        at_least=0,
    )  # fmt: skip
    max_steps: int = option(
        0, "Steps (optimiser updates) to train; 0 = the number given by epochs, or 800 if epochs is 0 too.", at_least=0
    )
    epochs: float = option(
        0.0, "Passes over the training text; 0 = the number given by max_steps. With both, the shorter run counts.",
        at_least=0,
    )  # fmt: skip
    minutes: float = option(
        0.0, "Time for the whole command, in minutes; every setting that is not given is chosen to suit this time, the "
        "machine and the text. 0 = no limit; max_steps and epochs give the length.", at_least=0,
    )  # fmt: skip
    eval_every: int = option(
        200, "Steps between evaluations on the whole validation text; 0 = once per epoch.", at_least=0
    )
    save_every: int = option(
        0, "Steps between checkpoints, in addition to those of the best evaluation and of the last step; "
        "0 = eval_every.", at_least=0,
    )  # fmt: skip
    keep_last: int = option(2, "Number of newest checkpoints to keep, in addition to the best one.", at_least=1)
    patience: int = option(
        0, "Number of evaluations in a row without improvement after which the run stops; 0 = never.", at_least=0
    )
    log_every: int = option(10, "Steps between records in metrics.jsonl.", at_least=1)
    log_with: tuple[str, ...] | str = option(
        (), "Experiment trackers that get the metrics and samples too, separated by commas, such as tensorboard,wandb. "
        "They stay offline unless the environment says otherwise (WANDB_MODE=online).",
    )  # fmt: skip
    sample_length: int = option(
        120, "Characters to generate at each evaluation; 0 = no sample.", at_least=0, at_most=MAX_SAMPLE
    )
    ensemble: int = option(
        1, "Number of models that the run trains, one after another; each learns from the text and from the mean "
        "prediction of those before it. The last one, which gets twice as many steps as each other, is the result. "
        "2 gives a lower loss if the text is read many times.", at_least=1, at_most=16,
    )  # fmt: skip
    init_from: str = option(
        "", "Run or checkpoint whose model a new run starts from, to learn another text (fine-tuning); empty = random "
        "weights.",
    )  # fmt: skip
    seed: int = option(1, "Random seed of initialisation, batches and dropout.", at_least=0, less_than=1 << 32)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "Precision of the arithmetic; auto = bf16 or fp16 on a GPU that has it, bf16 on a CPU if a short "
        "measurement finds it faster, no (fp32) otherwise.",
    )  # fmt: skip
    compile: Literal["auto", "yes", "no"] = option(
        "auto", "Whether to use torch.compile; auto = on a GPU, for runs longer than about three minutes."
    )

    def __post_init__(self) -> None:
        check_section(self, "train")
        other = next((name for name in ("max_steps", "epochs") if getattr(self, name)), "")
        if self.minutes and other:
            raise UserError(f"train.minutes and train.{other} both give the length of the run; set one of them to 0")
        if self.ensemble > 1 and self.init_from:
            raise UserError("train.ensemble trains new models and train.init_from continues one; leave out one of them")
        until, count = self.short_until, len(self.short_windows)
        if len(until) != count:
            raise UserError(f"train.short_until = {until} must be {count} numbers, one per short window")
        if not all(a < b for a, b in pairwise((0.0, *until, 1.0))):
            raise UserError(f"train.short_until = {until} must rise from above 0 to below 1")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in log_with, each once."""
        names = re.split(r"[\s,]+", self.log_with) if isinstance(self.log_with, str) else self.log_with
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True)
class SampleConfig:
    seed: str = option("", "Seed text of the samples shown during training; empty = a newline.")
    temperature: float = option(0.8, "Default sampling temperature of the model; 0 = always the most likely character.")
    top_k: int = option(40, "Default number of most likely ids to sample from; 0 = all.")
    top_p: float = option(1.0, "Default probability mass to sample from (nucleus sampling); 1 = all.")
    min_p: float = option(
        0.0, "Default lower limit of an id's probability, as a fraction of the most likely id's; 0 = no limit."
    )

    def __post_init__(self) -> None:
        check_section(self, "sample")
        _ = self.sampling  # checks the ranges

    @property
    def sampling(self) -> Sampling:
        """The defaults in the sampler's form."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Config:
    """All settings of a run, with every value resolved; stored in each checkpoint."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        T = self.model.block_size
        for window in self.train.short_windows:
            if not 0 < window < T or T % window:
                raise UserError(
                    f"train.short_windows = {window} must be shorter than model.block_size = {T} and divide it"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`; also takes keys like `model.n_layer`. A missing field takes its default.

        Raises `UserError` for an unknown setting and for a value of the wrong type or out of range.
        """
        flat = {key: tuple(value) if isinstance(value, list) else value for key, value in flatten(values).items()}
        check_keys(flat)
        sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for key, value in flat.items():
            section, name = key.split(".")
            sections[section][name] = value
        return cls(**{name: SECTIONS[name](**section) for name, section in sections.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain sections of numbers, strings and lists, as TOML and JSON hold them."""
        return {name: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
                for name, section in asdict(self).items()}  # fmt: skip

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by `section.field`."""
        defaults = flatten(Config().to_dict())
        return {key: value for key, value in flatten(self.to_dict()).items() if value != defaults[key]}


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(Config)}
KEYS = tuple(f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section))


MAY_CHANGE = frozenset({
    # where the text is; the run compares the text itself
    "data.source", "data.include", "data.exclude", "data.field", "data.encoding",
    "optim.learning_rate", "optim.adam_learning_rate", "optim.schedule", "optim.gamma", "optim.warmup_steps",
    "optim.decay_fraction", "optim.min_lr",
    "train.max_steps", "train.epochs", "train.minutes", "train.patience",
    "train.eval_every", "train.save_every", "train.keep_last", "train.log_every", "train.log_with",
    "train.sample_length", "sample.seed", "sample.temperature", "sample.top_k", "sample.top_p", "sample.min_p",
    "train.micro_batch_size", "train.compile",
})  # fmt: skip
"""The settings that a resumed run may change: length, learning rate, logging, saving, samples, use of the device."""


def check_keys(settings: Mapping[str, Any], file: object = "") -> None:
    """Raises `UserError`, which names the nearest setting, if a key such as `model.n_layer` is unknown.

    file: the file that holds the settings, for the message.
    """
    for key in settings:
        if key not in KEYS:
            close = get_close_matches(key, KEYS, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"unknown setting {key}{f' in {file}' if file else ''}{hint}")


def check_section(section: Any, name: str) -> None:
    """Raises `UserError` if a field of a section has the wrong type or is out of its bounds."""
    check_types(section, f"{name}.")
    for f in fields(section):
        value = getattr(section, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if not all(BOUNDS[bound](number, limit) for bound, limit in f.metadata["bounds"].items()):
                rule = " and ".join(f"{k.replace('_', ' ')} {limit}" for k, limit in f.metadata["bounds"].items())
                raise UserError(f"{name}.{f.name} = {value} must be {rule}")


def check_types(values: Any, prefix: str = "") -> None:
    """Raises `UserError` if a field of a dataclass does not have its annotated type, or is not finite, or is huge.

    prefix: written before the name of the field in the message.
    """
    for f in fields(values):
        if not _fits(value := getattr(values, f.name), f.type):
            raise UserError(f"{prefix}{f.name} = {value!r:.80} must be {_described(f.type)}")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        count = len(value) if Ellipsis in parts and isinstance(value, tuple) else len(parts)
        return isinstance(value, tuple) and len(value) == count and all(_fits(v, parts[0]) for v in value)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)  # UTF-8 has no surrogates
    if kind in (int, float):
        return type(value) in (int, kind) and -MAX_NUMBER <= value <= MAX_NUMBER  # NaN fails the comparison
    return isinstance(value, origin or kind)


def _described(kind: Any) -> str:
    """The type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is UnionType:
        return " or ".join(map(_described, parts))
    if origin is tuple:
        number = "a list, each item" if Ellipsis in parts else f"a list of {len(parts)}, each item"
        return f"{number} {_described(parts[0])}"
    words = {int: "a whole number", float: "a number", str: "a text that UTF-8 can encode", bool: "true or false"}
    return words.get(kind, str(kind))
