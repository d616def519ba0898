"""What to type to make a run again, to go on with it and to use it, quoted for a shell."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smallm.runs.config_file import flatten
from smallm.runs.layout import CONFIG
from smallm.training.config import Config
from smallm.training.optim.schedule import QUICK_STEPS


def commands(run: Path, config: Mapping[str, Any], state: str) -> Iterator[tuple[str, str]]:
    """What for, and the line.

    config: the run's settings as `section.field`, or nothing where they are not known; state: as in a `RunRecord`.
    """
    folder = f"./{run}" if str(run).startswith("-") else str(run)
    if config:
        again = ["python", "train.py", "--out", f"{folder}-again"]
        yield "reproduce", line(*again, "--config", f"{folder}/{CONFIG}")
        yield "reproduce without this folder", line(*again, *flags(config))
    more = {"finished": _twice_as_long(config), "out of patience": ["--train.patience=0"]}.get(state, [])
    yield "train for longer" if more else "resume", line("python", "train.py", "--resume", folder, *more)
    yield "export", line("python", "export.py", folder)
    yield "generate", line("python", "infer.py", "--model", folder, "--seed", str(config.get("sample.seed") or "The "))
    yield "measure", line("python", "infer.py", "--model", folder, "--perplexity")
    again = ("python", "-m", "smallm.training.report.plot", folder, "--html", f"{folder}/report.html")
    yield "this page again", line(*again)


def flags(config: Mapping[str, Any]) -> list[str]:
    """The settings that are not at their defaults, as flags of train.py; under train.minutes, which would choose what
    is not given, all of them.
    """
    defaults = flatten(Config().to_dict())
    given = {key: value for key, value in config.items() if config.get("train.minutes") or value != defaults.get(key)}
    return [f"--{key}={_value(value)}" for key, value in given.items()]


def line(*words: str) -> str:
    """A command line for sh, bash and zsh; a word with control characters in the form that the last two know."""
    return " ".join(shlex.quote(word) if word.isprintable() else _dollar_quoted(word) for word in words)


def _dollar_quoted(word: str) -> str:
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    shown = (escapes.get(c) or (c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode())) for c in word)
    return f"$'{''.join(shown)}'"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _twice_as_long(config: Mapping[str, Any]) -> list[str]:
    for key in ("train.minutes", "train.epochs", "train.max_steps"):
        if isinstance(number := config.get(key), int | float) and number:
            return [f"--{key}={2 * number}"]
    return [f"--train.max_steps={2 * QUICK_STEPS}"]
