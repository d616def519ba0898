"""The manifest of an exported model: everything that a host needs besides the weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from smallm.errors import UserError, command
from smallm.model_file.onnx_reader import OnnxFile
from smallm.model_file.sampling import Sampling
from smallm.tokenizer.vocabulary import Vocabulary

FORMAT_VERSION = 1
MANIFEST_FILE = "smallm.json"
MAX_SAMPLING = 1 << 53  # of temperature and top_k: exact in the numbers of every host
MIN_CACHE_LIMIT = 64 << 20  # bytes that the KV cache of any model may take, however small its file is
FACTS = {"text": str, "onnxruntime": str, "characters": int, "parameters": int, "step": int, "val_loss": float}
"""The facts that pages, cards and messages show, with their types."""


@dataclass(frozen=True)
class Manifest:
    """Sizes, vocabulary and defaults of a model; stored in the ONNX metadata and, identically, in `smallm.json`."""

    block_size: int
    """Longest context, in ids."""
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    head_dim: int
    vocab_size: int
    tokens: str
    """The tokens of the vocabulary from id 256 up: the UTF-8 bytes of each in hexadecimal, separated by spaces."""
    start_text: str
    """The text that replaces an empty seed."""
    sampling: dict[str, float] = field(default_factory=dict)
    """Default temperature, top_k, top_p, min_p."""
    training: dict[str, Any] = field(default_factory=dict)
    """Facts about the training: name of the text, steps, validation loss and others."""
    precision: str = "fp32"
    """Precision of the matrices: fp32, int8 or int4."""
    quality: dict[str, Any] = field(default_factory=dict)
    """Measurements of the export: size in bytes, bits per character, characters per second, oldest ONNX Runtime."""
    window: int = 0
    """Number of positions that attention sees, including the current one; 0 = the whole context."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding, needed to shift cached keys of models with a window past block_size."""
    checksum: int = 0
    """Adler-32 of the graph in the ONNX file, weights included; 0 = unknown, as in exports of earlier versions."""
    format_version: int = FORMAT_VERSION

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary with these `tokens`."""
        return Vocabulary.from_hex_tokens(self.tokens)

    def to_metadata(self) -> dict[str, str]:
        """Each field as JSON, by `smallm.<field>`, for the `metadata_props` of an ONNX file."""
        return {f"smallm.{k}": json.dumps(v, ensure_ascii=True) for k, v in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: object) -> "Manifest":
        """The inverse of `to_metadata`. Raises `UserError`, which names `source`, if the metadata is not valid."""
        values = {k.removeprefix("smallm."): v for k, v in metadata.items() if k.startswith("smallm.")}
        if not values:
            raise UserError(f"{source} is not a smallm model; write one with: {command('export')}")
        try:
            found = {k: json.loads(v) for k, v in values.items()}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source} has broken metadata ({error}); export the model again") from None
        return cls.from_dict(found, source)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: object) -> "Manifest":
        """The manifest with these values. Raises `UserError`, naming `source`, if a value is missing or invalid."""
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{source} has format version {version!r:.40}; this smallm reads {FORMAT_VERSION}: "
                "export the model again, or install the smallm that wrote it"
            )
        known = {f.name for f in fields(cls)}
        try:
            manifest = cls(**{k: v for k, v in values.items() if k in known})
            manifest._check()
        except (TypeError, ValueError):  # Vocabulary raises UserError, which is a ValueError
            raise UserError(f"{source} has broken metadata; export the model again") from None
        return manifest

    def check_file(self, file: OnnxFile, source: object) -> None:
        """Raises `UserError` if the file is damaged, or a host would allocate far more memory than its size explains.

        An element of the embedding takes at least half a byte in the file, one of the rotary tables at least a byte.
        """
        if self.checksum not in (0, file.checksum):
            raise UserError(f"{source} is damaged: it does not match its checksum; copy it again, or export it again")
        file_bytes = len(file.data)
        cache = 8 * self.n_layer * self.n_kv_head * self.head_dim * self.block_size  # bytes, in float32
        small = max(self.vocab_size * self.n_embd // 2, self.block_size * self.head_dim) <= file_bytes
        if not small or cache > MIN_CACHE_LIMIT + 64 * file_bytes:
            raise UserError(f"{source} is too small for the sizes in its metadata; export the model again")

    def _check(self) -> None:
        """Raises `ValueError` or `TypeError` if a host cannot rely on the values."""
        sizes = [self.block_size, self.n_layer, self.n_head, self.n_kv_head, self.n_embd, self.head_dim]
        sizes += [self.vocab_size]
        sane = all(type(size) is int and 0 < size < 1 << 24 for size in sizes) and self.n_layer < 1000
        sane = sane and self.n_head % self.n_kv_head == 0 and self.head_dim % 2 == 0
        sane &= type(self.window) is int and 0 <= self.window <= self.block_size
        sane &= type(self.rope_theta) in (int, float) and 0 < self.rope_theta < 1e30
        sane &= isinstance(self.tokens, str) and self.vocabulary.size == self.vocab_size
        sane &= isinstance(self.start_text, str) and 0 < len(self.vocabulary.encode(self.start_text)) < 1000
        sane &= all(isinstance(each, dict) for each in (self.sampling, self.training, self.quality))
        sane &= isinstance(self.precision, str) and re.fullmatch("[a-z0-9]{1,16}", self.precision) is not None
        sane &= type(self.checksum) is int and 0 <= self.checksum < 1 << 32
        if not sane:
            raise ValueError
        check_facts(self.training)
        check_facts(self.quality)
        defaults = Sampling.resolve({}, self.sampling)
        if max(defaults.temperature, defaults.top_k) > MAX_SAMPLING:
            raise ValueError


def check_facts(values: Mapping[str, Any]) -> None:
    """Raises `ValueError` if one of FACTS has another type, or is a number out of range. None is valid."""
    for name in FACTS.keys() & values.keys():
        value, kind = values[name], FACTS[name]
        is_count = type(value) is int and kind is not str and 0 <= value < 1 << 53
        if not (value is None or is_count or (type(value) is kind and kind is not int)):
            raise ValueError(f"{name} = {value!r:.40} is out of range")
