"""The `smallm` command, and the one place where a user's mistake becomes a line on stderr."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from smallm.errors import ProcessError, UserError

USAGE = """\
usage: smallm COMMAND [options]

  smallm train    train a model on a text            (also: python train.py)
  smallm export   write a trained model as ONNX      (also: python export.py)
  smallm infer    generate text, measure perplexity  (also: python infer.py)
  smallm runs     what is in runs/, newest first
  smallm show     all about one run

`smallm COMMAND --help` lists the options of a command."""

LONGEST_LINE = 2000  # characters of a complaint

COMMANDS = {"train": "smallm.training.cli", "export": "smallm.export.cli", "infer": "smallm.cli.infer",
            "runs": "smallm.cli.runs", "show": "smallm.cli.show"}  # fmt: skip


def train(argv: Sequence[str]) -> int | None:
    """`smallm train`; needs the `train` extra."""
    return _call("train", argv)


def export(argv: Sequence[str]) -> int | None:
    """`smallm export`; needs the `train` extra."""
    return _call("export", argv)


def infer(argv: Sequence[str]) -> int | None:
    """`smallm infer`; the base install is enough."""
    return _call("infer", argv)


def runs(argv: Sequence[str]) -> int | None:
    """`smallm runs`; the base install is enough."""
    return _call("runs", argv)


def show(argv: Sequence[str]) -> int | None:
    """`smallm show`; the base install is enough."""
    return _call("show", argv)


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
        if isinstance(error, ProcessError):
            print(file=sys.stderr)  # below the progress bar of the first process
            _complain(str(error))
        elif os.environ.get("RANK", "0") == "0":  # several processes make the same mistake; one says so
            _complain(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:  # PyTorch's is of the second kind
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _complain("there is not enough memory for this; use a smaller model, batch or text")
        return 2
    except KeyboardInterrupt:
        print("smallm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout (head, less) has seen enough
        _give_up_stdout()
        return 0
    except OSError as error:  # a full disk behind our stdout, say
        _give_up_stdout()
        _complain(f"{error}; make room or write elsewhere")
        return 2


def _complain(message: str) -> None:
    """One line, whatever it quotes: names and values from strangers may hold newlines and commands to the terminal."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:LONGEST_LINE])
    print(f"smallm: {line}", file=sys.stderr)


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
        extra = "smallm[train]" if command in ("train", "export") else "smallm"
        raise UserError(f"{command} needs the package {error.name!r}; install it with: pip install '{extra}'") from None
