"""Reads TOML files of settings: the `config.toml` of a run, and those that users write."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallm.errors import UserError
from smallm.runs.layout import CONFIG


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a file, by section. Raises `UserError` if the file cannot be read or is not valid TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable TOML file: {error}") from None


def read_config(run: Path) -> dict[str, Any]:
    """The settings with which a run began, by section; empty if its config.toml is missing or broken."""
    try:
        return read_toml(run / CONFIG)
    except UserError:
        return {}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by section -> settings by `section.field`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
