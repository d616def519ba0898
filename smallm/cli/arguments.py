"""The parser of the small commands: a wrong argument is a `UserError`, thus one line and exit code 2."""

import argparse
from typing import Any, NoReturn

from smallm.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without abbreviated options that raises `UserError` instead of exiting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
