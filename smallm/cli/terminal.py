"""Terminals: colours, and lines with a history."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

HISTORY_LINES = 1000


def takes_colours(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether a stream is a terminal with colours, and the user has not switched colours off with NO_COLOR."""
    return takes_control_codes(stream, environment) and not environment.get("NO_COLOR")


def takes_control_codes(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and environment.get("TERM") != "dumb"


@contextmanager
def line_editing(completions: Callable[[str], list[str]]) -> Iterator[None]:
    """Within this context `input` completes commands and has a history, stored in the user's state folder.

    Without readline, or without a folder for the history, `input` works as usual.
    """
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    readline.set_completer_delims("")
    readline.set_completer(lambda line, number: dict(enumerate(completions(line))).get(number))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_history_length(HISTORY_LINES)
    file = None
    with suppress(OSError, RuntimeError):  # no home
        state = os.environ.get("XDG_STATE_HOME")
        file = (Path(state) if state else Path.home() / ".local" / "state") / "smallm" / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(file)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                readline.write_history_file(file)
