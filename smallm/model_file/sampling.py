"""How the next id is chosen: the four options that a model file has defaults for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from smallm.options import check_options, option


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler, see `smallm.generation.sampler`. Raises `UserError` for invalid values."""

    temperature: float = option(
        0.8, float, "Divides the logits: above 1 the text varies more, below 1 less; 0 = always the most likely "
        "character.", metavar="T", at_least=0, note="0 = always the most likely character", unset="the model's",
    )  # fmt: skip
    top_k: int = option(
        0, int, "Sample from the K most likely ids; 0 = all ids.", metavar="K", at_least=0, note="0 = all ids",
        unset="the model's",
    )  # fmt: skip
    top_p: float = option(
        1.0, float, "Sample from the fewest most likely ids whose probabilities sum to at least P (nucleus sampling); "
        "1 = all ids.", metavar="P", above=0, at_most=1, note="1 = all ids", unset="the model's",
    )  # fmt: skip
    min_p: float = option(
        0.0, float, "Lowest probability of an id, as a fraction of that of the most likely id; 0 = no limit.",
        metavar="P", at_least=0, at_most=1, note="0 = no limit", unset="the model's",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def resolve(cls, given: Mapping[str, float | None], defaults: Mapping[str, float]) -> "Sampling":
        """The given values; where a value is None, the model's default."""
        chosen = {f.name: given.get(f.name) for f in fields(cls)}
        values: dict[str, Any] = {k: defaults.get(k, getattr(cls, k)) if v is None else v for k, v in chosen.items()}
        return cls(**values)
