"""The `smallm` command, and the one place where a user's mistake becomes a line on stderr."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from smallm.errors import ProcessError, UserError, missing_package
from smallm.html.escape import printable

USAGE = """\
usage: smallm COMMAND [options]    (also: python -m smallm COMMAND)

  smallm train    train a model on a text            (also: python train.py)
  smallm export   write a trained model as ONNX      (also: python export.py)
  smallm infer    generate text, measure perplexity  (also: python infer.py)
  smallm serve    serve a model to clients of OpenAI's API and to browsers
  smallm runs     list the runs in runs/, newest first
  smallm show     all about one run
  smallm watch    follow a run that trains in another terminal or on a mounted folder
  smallm compare  where the settings of runs differ, and their losses
  smallm plot     draw the losses of one or several runs
  smallm cache    sizes of what is cached; clear the cache
  smallm doctor   versions, devices and what works here, for a bug report
  smallm push     upload an export to the Hugging Face hub

`smallm COMMAND --help` lists the options of a command."""

MAX_MESSAGE = 2000  # characters of an error message
ADVICE = {errno.ENOSPC: "make room or write elsewhere", errno.EDQUOT: "make room or write elsewhere",
          errno.ENAMETOOLONG: "choose a shorter name"}  # fmt: skip
"""What to do about an error of the system."""
COMMANDS = {"train": "smallm.training.cli", "export": "smallm.export.cli", "infer": "smallm.cli.infer",
            "runs": "smallm.cli.runs", "show": "smallm.cli.show", "plot": "smallm.training.report.plot",
            "watch": "smallm.cli.watch", "compare": "smallm.cli.compare", "cache": "smallm.cli.cache",
            "doctor": "smallm.cli.doctor", "push": "smallm.export.push",
            "serve": "smallm.serve.cli"}  # fmt: skip
"""Command -> the module whose `main(argv)` runs it."""
EXTRAS = {"train": "train", "export": "train", "plot": "train", "serve": "serve", "push": "hub"}
"""Command -> the extra that it needs; the others need no more than the base install."""


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
    """Runs a command and returns its exit code; a `UserError` is one line on stderr and code 2.

    argv: the arguments; default: those of the process. A standard stream that is missing is an empty one meanwhile.
    """
    with _no_missing_streams():
        return _run(command, sys.argv[1:] if argv is None else argv)


def _run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters of names and texts
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command(argv) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        if isinstance(error, ProcessError):
            _print_error(str(error), before="\n")  # below the progress bar of the main process
        elif os.environ.get("RANK", "0") == "0":  # all processes make the same mistake; one of them prints the error
            _print_error(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:  # PyTorch raises RuntimeError when it runs out of memory
        if "can't start new thread" in str(error):  # CPython's message
            _print_error("the system allows no more threads; raise the limit (`ulimit -u`) or end other programs")
            return 2
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _print_error("there is not enough memory for this; use a smaller model, batch or text")
        return 2
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our stdout, such as `head`, has closed it
        _discard_stdout()
        return 0
    except OSError as error:  # for instance a full disk behind our stdout
        _discard_stdout()
        if sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None:  # a closed pipe, there
            return 0
        advice = ADVICE.get(error.errno or 0)
        _print_error(f"{error}; {advice}" if advice else str(error))
        return 2


def _print_error(message: str, before: str = "") -> None:
    """One line, because names and values from strangers may hold newlines and control characters."""
    with suppress(OSError, ValueError):  # nobody reads stderr
        print(f"{before}smallm: {printable(message[:MAX_MESSAGE])}", file=sys.stderr)


def _discard_stdout() -> None:
    """Discards what stdout cannot take; otherwise Python would report an error when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # a stream of a host program may have no file descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _no_missing_streams() -> Iterator[None]:
    """A standard stream that was closed (`2>&-`), or that a program without a console lacks, is the null device."""
    with ExitStack() as stack:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, stack.enter_context(Path(os.devnull).open(mode, encoding="utf-8")))
                stack.callback(setattr, sys, name, None)
        yield


def _call(command: str, argv: Sequence[str], shown: str = "") -> int | None:
    """Runs a command. shown: how messages name it; default: its name."""
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; use one of: {', '.join(COMMANDS)}")
    try:
        code: int | None = import_module(COMMANDS[command]).main(argv)
        return code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "smallm":
            raise
        raise missing_package(shown or command, error.name, EXTRAS.get(command, "")) from None


train, export, infer, runs, show, plot, watch, compare, cache, doctor, push, serve = (
    partial(_call, name) for name in COMMANDS
)
