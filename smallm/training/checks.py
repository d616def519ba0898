"""What a setting may be, before anything relies on it."""

from dataclasses import fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from smallm.errors import UserError

MOST = 1 << 53  # largest number of any kind: a float still tells it from its neighbours
KINDS = {int: "a whole number", float: "a number", str: "a text that UTF-8 can hold", bool: "true or false"}


def check_types(values: Any, prefix: str = "") -> None:
    """Raises `UserError` if a field of a dataclass is not of its type, or is a number that is not finite or huge.

    Files know no types but their own, and not every reader goes by the annotations.
    """
    for f in fields(values):
        if not _fits(value := getattr(values, f.name), f.type):
            kind = KINDS.get(f.type, str(f.type).removeprefix("typing."))
            raise UserError(f"{prefix}{f.name} = {value!r:.80} must be {kind}")


def _fits(value: object, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        count = len(value) if Ellipsis in parts and isinstance(value, tuple) else len(parts)
        return isinstance(value, tuple) and len(value) == count and all(_fits(v, parts[0]) for v in value)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)  # no UTF-8 holds those
    if kind in (int, float):
        return type(value) in (int, kind) and -MOST <= value <= MOST  # also false for NaN
    return isinstance(value, origin or kind)


def check(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises `UserError` unless the condition holds."""
    if not condition:
        raise UserError(f"{name} = {value} {rule}")
