"""The parser of the small commands: a wrong argument is a `UserError`, thus one line and exit code 2."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from smallm.errors import UserError, command, quoted

TEXT_FLAGS = ("--data", "--seed")
"""The flags whose name newcomers leave out."""


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without abbreviated options that raises `UserError` instead of exiting."""

    def __init__(self, name: str, **options: Any) -> None:
        """name: of the command, such as "train"; the texts call it `smallm train`, the user reads what was typed."""
        typed = command(name)
        for part in {"usage", "description", "epilog"} & options.keys():
            options[part] = options[part].replace(f"smallm {name}", typed)
        super().__init__(prog=typed, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses the arguments; the message on an unknown flag names the nearest one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; {self._hint(unknown[0])}")
        return found

    def _hint(self, word: str) -> str:
        known = list(self._option_string_actions)
        if not word.startswith("-"):
            flag = next((f"{flag} {quoted(word)}" for flag in TEXT_FLAGS if flag in known), "")
            advice = "quote a value that holds spaces or *"
            return f"did you mean {flag}? ({advice})" if flag else f"{advice}; see --help"
        flags = {f"--{flag.split('.')[-1].lstrip('-')}": flag for flag in known} | {flag: flag for flag in known}
        flags = {name.replace("_", "-"): flag for name, flag in reversed(flags.items())}
        near = get_close_matches(word.split("=")[0].lower().replace("_", "-"), flags, n=1, cutoff=0.7)
        return f"did you mean {flags[near[0]]}?" if near else "see --help"
