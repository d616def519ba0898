"""The `smallm` command, and the one place where a user's mistake becomes a line on stderr."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from smallm.errors import UserError

USAGE = """\
usage: smallm COMMAND [options]

  smallm train    train a model on a text            (also: python train.py)
  smallm export   write a trained model as ONNX      (also: python export.py)
  smallm infer    generate text, measure perplexity  (also: python infer.py)

`smallm COMMAND --help` lists the options of a command."""

COMMANDS = {"train": "smallm.training.cli", "export": "smallm.export.cli", "infer": "smallm.infer"}


def train(argv: Sequence[str]) -> int | None:
    """`smallm train`; needs the `train` extra."""
    return _call("train", argv)


def export(argv: Sequence[str]) -> int | None:
    """`smallm export`; needs the `train` extra."""
    return _call("export", argv)


def infer(argv: Sequence[str]) -> int | None:
    """`smallm infer`; the base install is enough."""
    return _call("infer", argv)


def main() -> int:
    """Entry point of the console script `smallm`."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from smallm import __version__

        print(f"smallm {__version__}")
        return 0
    return run(partial(_call, command), argv)


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; a `UserError` is one line on stderr and code 2."""
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # several processes make the same mistake; one says so
            print(f"smallm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("smallm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout (head, less) has seen enough
        _give_up_stdout()
        return 0
    except OSError as error:  # a full disk behind our stdout, say
        _give_up_stdout()
        print(f"smallm: {error}; make room or write elsewhere", file=sys.stderr)
        return 2


def _give_up_stdout() -> None:
    """What is still buffered goes nowhere, or Python would complain about it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _call(command: str, argv: Sequence[str]) -> int | None:
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; use one of: {', '.join(COMMANDS)}")
    try:
        return import_module(COMMANDS[command]).main(argv)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "smallm":
            raise
        extra = "smallm" if command == "infer" else "smallm[train]"
        raise UserError(f"{command} needs the package {error.name!r}; install it with: pip install '{extra}'") from None
