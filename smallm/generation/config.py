"""`GenerationConfig`: the one definition of the options of generation.

Keyword arguments and `help()` of `LanguageModel`, flags of `infer.py`, commands of the REPL, validation and the table
in the documentation are all made from its fields.
"""

import inspect
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, TypeVar

from smallm.errors import UserError
from smallm.generation.rng import MAX_SEED
from smallm.model_file.manifest import Manifest
from smallm.model_file.sampling import Sampling
from smallm.options import Option, option, options_of, with_hints

Overflow = Literal["crop", "shift", "slide"]
CHARACTERS = 0x110000 - 0x800  # Unicode code points without the surrogates
Method = TypeVar("Method", bound=Callable[..., Any])


def _sampling_option(name: str) -> Any:
    """The option of `Sampling`; its default None stands for the model's own value."""
    return field(default=None, metadata=Sampling.__dataclass_fields__[name].metadata)


@with_hints
@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of generation. Raises `UserError` for unknown names, wrong types and values out of range.

    >>> config = GenerationConfig(max_length=200, temperature=0.7, stop="\\n")
    >>> lm.generate("O God, O God!", config=config)
    """

    max_length: int = option(500, int, "Number of new characters at most.", metavar="N", at_least=0)
    min_length: int = option(
        0, int, "A stop string that begins within the first N new characters does not end the text.", metavar="N",
        at_least=0,
    )  # fmt: skip
    temperature: float | None = _sampling_option("temperature")
    top_k: int | None = _sampling_option("top_k")
    top_p: float | None = _sampling_option("top_p")
    min_p: float | None = _sampling_option("min_p")
    repetition_penalty: float = option(
        1.0, float, "Makes ids that occurred recently less likely (above 1) or more likely (below 1); 1 = off.",
        metavar="R", at_least=0.01, at_most=100, note="1 = off",
    )  # fmt: skip
    repetition_window: int = option(
        0, int, "Number of last ids, seed text included, that the repetition penalty considers; 0 = block_size.",
        metavar="N", at_least=0, note="0 = block_size",
    )  # fmt: skip
    allowed: str | None = option(
        None, str, "The only characters that may be written.", metavar="CHARS", flag="allow", unset="all characters"
    )
    banned: str = option("", str, "Characters that are not written, for instance \\n.", metavar="CHARS", flag="ban")
    stop: str | Sequence[str] = option(
        (), str, "The text ends before this string, for instance \\n; several strings are possible.", metavar="TEXT",
        repeated=True,
    )  # fmt: skip
    overflow: Overflow | None = option(
        None, str, "What the model sees after block_size ids: shift = the newest half of them, and from there on "
        "(fast); crop = the last block_size ids, computed again for each id (exact, slow); slide = exact and fast, for "
        "models trained with a window.", choices=("crop", "shift", "slide"),
        unset="slide for a model with a window, otherwise shift",
    )  # fmt: skip
    rng_seed: int | None = option(
        None, int, "Random seed: the same N gives the same text.", metavar="N", at_least=0, at_most=MAX_SEED,
        unset="a random number",
    )  # fmt: skip
    stream_number: int = option(
        0, int, "Distinguishes several texts of one rng_seed.", metavar="N", at_least=0, at_most=MAX_SEED, flag=None
    )

    def __post_init__(self) -> None:
        for each in self.options():
            if each.name != "stop":
                each.check(getattr(self, each.name))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if self.min_length > self.max_length:
            raise UserError(
                f"min_length = {self.min_length} is more than max_length = {self.max_length}; they leave no text"
            )
        banned = set(self.banned)
        if len(banned) == CHARACTERS if self.allowed is None else not set(self.allowed) - banned:
            raise UserError("allowed and banned leave no character; allow one that is not banned")

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The definition of each option: name, type, default, help, valid values, flag, parser."""
        return options_of(cls)

    def resolve(self, model: Manifest) -> "GenerationConfig":
        """These options for one model: its defaults filled in, a random rng_seed drawn.

        In the result only `allowed` may be None. Raises `UserError` for options that do not suit the model.
        """
        size = model.block_size
        if self.repetition_window > size:
            raise UserError(
                f"repetition_window = {self.repetition_window} is out of range; "
                f"it must be from 0 to block_size = {size} (0 = block_size)"
            )
        if self.overflow == "slide" and not model.window:
            raise UserError(
                "overflow = 'slide' needs a model that was trained with model.window; use 'crop' or 'shift'"
            )
        return replace(
            self,
            **asdict(Sampling.resolve(vars(self), model.sampling)),
            repetition_window=self.repetition_window or size,
            overflow=self.overflow or ("slide" if model.window else "shift"),
            rng_seed=secrets.randbits(32) if self.rng_seed is None else self.rng_seed,
        )

    @property
    def sampling(self) -> Sampling:
        """The options of the sampler. Only for the result of `resolve`."""
        return Sampling.resolve(vars(self), {})


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationConfig` except max_length, for type checkers; a test holds the two together."""

    min_length: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    repetition_window: int
    allowed: str | None
    banned: str
    stop: str | Sequence[str]
    overflow: Overflow | None
    rng_seed: int | None
    stream_number: int


def with_options(method: Method) -> Method:
    """Shows every option of `GenerationConfig` in the signature and in the docstring of a method that takes them."""
    signature = inspect.signature(method)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(GenerationConfig)
        if f.name not in signature.parameters
    ]
    method.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
    lines = [f"    {each.name}: {each.help} Default: {each.shown_default}." for each in GenerationConfig.options()]
    method.__doc__ = "\n".join((inspect.cleandoc(method.__doc__ or ""), "", "Options:", *lines))
    return method


def options_table() -> str:
    """The options as a Markdown table, for docs/generation.md: `python -c 'from smallm.generation.config import …'`."""
    rows = ["| Python | command line | default | meaning |", "|---|---|---|---|"]
    for each in GenerationConfig.options():
        flag = f"`--{each.flag}`" if each.flag else ""
        rows.append(f"| `{each.name}` | {flag} | {each.shown_default} | {each.help} |".replace("\\", "\\\\"))
    return "\n".join(rows) + "\n"


def _stop_strings(stop: object) -> tuple[str, ...]:
    """The stop strings without empty ones. Raises `UserError` for values that are neither a string nor strings."""
    definition = next(each for each in GenerationConfig.options() if each.name == "stop")
    stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    for each in stops:
        definition.check(each)
    return tuple(filter(None, stops))
