"""Options with one definition each: a dataclass field holds the default, the help text and the valid values."""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

from smallm.errors import UserError

KINDS: dict[type, tuple[Any, str]] = {int: (Integral, "a whole number"), float: (Real, "a number"),
                                      str: (str, "a string")}  # fmt: skip
Class = TypeVar("Class")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclass(frozen=True)
class Option:
    """The definition of one option. `options_of` lists those of a dataclass, with names and defaults."""

    kind: type
    """int, float or str."""
    help: str
    """One line, with the unit, without the default."""
    metavar: str = ""
    """Stands for the value in `--help`."""
    flag: str | None = ""
    """Name on the command line and in the REPL, without dashes in front; "" = from the name, None = not there."""
    unset: str = "none"
    """What the default None means, for `--help` and tables."""
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    note: str = ""
    """What special values mean, for error messages."""
    choices: tuple[str, ...] = ()
    repeated: bool = False
    """Whether a sequence of values is valid as well, and the flag may be given several times."""
    name: str = ""
    default: Any = None

    @property
    def parser(self) -> Callable[[str], Any]:
        """Reads a value that was typed: int, float, or for free text `unescaped`."""
        return self.kind if self.choices or self.kind is not str else unescaped

    @property
    def rule(self) -> str:
        """The valid values in words."""
        if self.choices:
            return " or ".join((", ".join(map(repr, self.choices[:-1])), repr(self.choices[-1])))
        if self.kind is str:
            return "a string or a list of strings" if self.repeated else "a string"
        if self.at_most == math.inf:
            rule = f"{self.at_least} or more"
        elif self.above > -math.inf:
            rule = f"above {self.above} and at most {self.at_most}"
        else:
            rule = f"from {self.at_least} to {self.at_most}"
        return f"{rule} ({self.note})" if self.note else rule

    @property
    def shown_default(self) -> str:
        """The default for `--help` and tables."""
        if self.default is None:
            return self.unset
        return repr(self.default) if self.kind is not str else self.default or "none"

    def check(self, value: Any) -> None:
        """Raises `UserError` for a value of the wrong type or out of range. None is valid if it is the default."""
        if value is None and self.default is None:
            return
        kind, word = KINDS[self.kind]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{self.name} = {value!r:.40} is not {word}; it must be {self.rule}")
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                raise UserError(f"{self.name} = {value!r:.40} is unknown; it must be {self.rule}")
            if any("\ud800" <= c <= "\udfff" for c in value):
                raise UserError(
                    f"{self.name} = {value!r:.40} has a lone surrogate, which no text can hold; leave it out"
                )
        elif not (self.at_least <= value <= self.at_most and self.above < value < math.inf):  # false for NaN, too
            raise UserError(f"{self.name} = {value} is out of range; it must be {self.rule}")


def option(default: Any, kind: type, help: str, **more: Any) -> Any:
    """A dataclass field with the definition of its option; more: other fields of `Option`."""
    return field(default=default, metadata={"option": Option(kind, help, **more)})


def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a dataclass, in order."""
    return tuple(
        replace(f.metadata["option"], name=f.name, default=f.default,
                flag=f.name.replace("_", "-") if f.metadata["option"].flag == "" else f.metadata["option"].flag)
        for f in fields(cls)
    )  # fmt: skip


def check_options(values: Any) -> None:
    """Checks each option of a dataclass instance. Raises `UserError`."""
    for each in options_of(type(values)):
        each.check(getattr(values, each.name))


def check_int(name: str, value: Any, at_least: int, at_most: float = math.inf, note: str = "") -> None:
    """Raises `UserError` unless the argument of this name is a whole number in the range."""
    Option(int, "", name=name, default=0, at_least=at_least, at_most=at_most, note=note).check(value)


def check_bool(name: str, value: Any) -> None:
    """Raises `UserError` unless the argument of this name is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} = {value!r:.40} is not a truth value; it must be True or False")


def as_path(name: str, value: Any) -> Path:
    """The argument of this name as a path. Raises `UserError` unless it is a string or a path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} = {value!r:.40} is not a path; pass a string or a Path")
    return Path(value)


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises `UserError` for the first unknown name, with the nearest known name."""
    known = tuple(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise UserError(f"there is no option {name}; {hint}")


def with_hints(cls: type[Class]) -> type[Class]:
    """Calls of the class and of its public methods with wrong names or numbers of arguments raise `UserError`."""
    for name, member in vars(cls).copy().items():
        if isinstance(member, FunctionType) and (name == "__init__" or not name.startswith("_")):
            setattr(cls, name, _with_hints(member))
        elif isinstance(member, classmethod):
            setattr(cls, name, classmethod(_with_hints(member.__func__)))
    return cls


def _with_hints(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **named: Any) -> Any:
        try:
            return method(*args, **named)
        except TypeError:
            signature, shown = inspect.signature(method), method.__qualname__.removesuffix(".__init__")
            try:
                signature.bind(*args, **named)
            except TypeError as error:
                check_names(named, list(signature.parameters)[1:])
                raise UserError(f"{shown}: {error}; see help({shown})") from None
            raise

    return call


def unescaped(text: str) -> str:
    """The text with the escapes \\n, \\t, \\r and \\\\ replaced by their characters."""
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)
