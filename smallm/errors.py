"""The exceptions that users see, and the commands that messages tell them to type."""

import shlex
import sys
from pathlib import Path

SCRIPTS = ("train", "export", "infer")
"""The commands that are also scripts beside the package, such as `train.py`."""


class UserError(ValueError):
    """A mistake that the caller can correct. The message is one line: what is wrong, and what to do.

    The command line prints `smallm: <message>` and exits with code 2.
    """


class ProcessError(UserError):
    """A mistake that only one of several processes notices; this process prints the message, whatever its rank."""


def command(name: str, *arguments: str | Path) -> str:
    """The command line of the smallm command `name`, such as "export", quoted for a shell.

    A user of `train.py` reads `python export.py`, a user of the console script `smallm export`, and a user of
    `python -m smallm`, a program or a notebook `python -m smallm export`, which works wherever smallm is installed.
    """
    started = Path(sys.argv[0] if sys.argv else "")
    is_script = started.stem in SCRIPTS and started.resolve().parent == Path(__file__).resolve().parents[1]
    if started.name.removesuffix(".exe") == "smallm":
        words = ["smallm", name]
    elif is_script and name in SCRIPTS:
        words = ["python", str(started.with_name(f"{name}.py"))]
    else:
        words = ["python", "-m", "smallm", name]
    return quoted(*words, *(_path(each) if isinstance(each, Path) else each for each in arguments))


def pip_install(package: str) -> str:
    """The command that installs a package, such as "smallm[train]", quoted for a shell."""
    return quoted("pip", "install", package)


def missing_package(what: str, package: str | None, extra: str = "") -> UserError:
    """The error for a package that is not installed.

    what: the command or option that needs it; extra: the extra of smallm that installs it, default: the base install.
    """
    install = pip_install(f"smallm[{extra}]" if extra else "smallm")
    return UserError(f"{what} needs the package {package!r}; install it with: {install}")


def quoted(*words: str) -> str:
    """A command line for sh, bash and zsh; words with control characters as $'…', which sh does not know.

    On Windows a command line for cmd.exe and PowerShell.
    """
    if sys.platform == "win32":
        from subprocess import list2cmdline  # takes milliseconds to import

        return list2cmdline(words)
    return " ".join(shlex.quote(word) if word.isprintable() else _dollar_quoted(word) for word in words)


def _path(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)


def _dollar_quoted(word: str) -> str:
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    shown = (escapes.get(c) or (c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode())) for c in word)
    return f"$'{''.join(shown)}'"
