"""The options of generation: what they are called, what they mean, what they are when left out, what is refused."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypedDict

from smallm.errors import UserError
from smallm.generation.allowed_characters import AllowedCharacters
from smallm.generation.sampler import Rng, Sampling, check
from smallm.model_file.manifest import Manifest

OVERFLOWS = ("crop", "shift", "slide")
Overflow = Literal[OVERFLOWS]
PENALTIES = (0.01, 100.0)  # the least and the most


class Options(TypedDict, total=False):
    """Options of generation; what is left out takes the model's own default (`LanguageModel.metadata.sampling`)."""

    temperature: float | None
    """0 = always the likeliest id."""
    top_k: int | None
    """Choose from the k likeliest ids; 0 = all."""
    top_p: float | None
    """Choose from the likeliest ids that make up this probability."""
    min_p: float | None
    """Least probability, relative to the likeliest id."""
    repetition_penalty: float
    """Above 1: ids that came up lately become less likely, below 1 likelier; 1 = off."""
    repetition_window: int
    """How many of the last ids the penalty looks at, seed included, at most block_size; 0 = block_size."""
    allowed: str | None
    """The only characters that may be written; None = all."""
    banned: str
    """Characters that are not written."""
    rng_seed: int | None
    """Equal rng_seed and stream_number give equal text; None = a random one."""
    stream_number: int
    """Tells several texts of one rng_seed apart."""
    stop: str | Sequence[str]
    """Generation ends before the first of these texts; only new text counts, and '' is no stop."""
    min_length: int
    """A stop that begins within so many new characters is text like any other."""
    overflow: Overflow | None
    """What happens past block_size, see `LanguageModel`; None = "slide" for a model with a window, else "crop"."""


@dataclass(frozen=True)
class Request:
    """The options of a text, complete and checked."""

    sampling: Sampling
    max_length: int
    min_length: int
    stops: tuple[str, ...]
    permitted: AllowedCharacters | None
    repetition_penalty: float
    repetition_window: int
    overflow: Overflow
    rng_seed: int
    stream_number: int

    def rng(self, number: int = 0) -> Rng:
        """The draws of the text with this number among those of one request."""
        return Rng(self.rng_seed, self.stream_number + number)


def resolve(
    model: Manifest,
    max_length: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    repetition_window: int = 0,
    allowed: str | None = None,
    banned: str = "",
    rng_seed: int | None = None,
    stream_number: int = 0,
    stop: str | Sequence[str] = (),
    min_length: int = 0,
    overflow: Overflow | None = None,
) -> Request:
    """Options as `Options` has them -> all of them. Raises `UserError` for values out of range or at odds."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    low, high = PENALTIES
    fits = isinstance(repetition_penalty, Real) and low <= repetition_penalty <= high
    check(fits, "repetition_penalty", repetition_penalty, f"from {low} to {high:g} (1 = off)")
    size = model.block_size
    fits = isinstance(repetition_window, Integral) and 0 <= repetition_window <= size
    check(fits, "repetition_window", repetition_window, f"from 0 to block_size = {size} (0 = block_size)")
    for name, length in (("max_length", max_length), ("min_length", min_length)):
        check(isinstance(length, Integral) and length >= 0, name, length, "0 or more")
    if min_length > max_length:
        raise UserError(f"min_length = {min_length} is more than max_length = {max_length}; they leave no text")
    overflow = ("slide" if model.window else "crop") if overflow is None else overflow
    if overflow not in OVERFLOWS:
        raise UserError(f"overflow = {overflow!r} is unknown; it must be 'crop', 'shift' or 'slide'")
    if overflow == "slide" and not model.window:
        raise UserError("overflow = 'slide' needs a model that was trained with model.window; use 'crop' or 'shift'")
    return Request(
        sampling=Sampling.resolve(given, model.sampling),
        max_length=max_length,
        min_length=min_length,
        stops=_stops(stop),
        permitted=None if allowed is None and banned == "" else AllowedCharacters(model.vocabulary, allowed, banned),
        repetition_penalty=repetition_penalty,
        repetition_window=repetition_window or size,
        overflow=overflow,
        rng_seed=secrets.randbits(32) if rng_seed is None else rng_seed,
        stream_number=stream_number,
    )


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = tuple(word for word in ([stop] if isinstance(stop, str) else stop) if word)
    for word in stops:
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise UserError(f"stop = {word!r:.40} has a lone surrogate, which no text can hold; leave it out")
    return stops
