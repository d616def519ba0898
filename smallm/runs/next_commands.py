"""The commands that use a run, train it further or reproduce it, quoted for a shell."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallm.runs.layout import CONFIG


def next_commands(
    run: Path,
    config: Mapping[str, Any],
    state: str,
    steps: int | None = None,
    changed: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The command lines for a run, by their purpose.

    config: the run's settings as `section.field`; empty if they are unknown.
    state: "finished" and "out of patience" give a command that trains for longer, other states one that resumes.
    steps: planned length of the run; the longer run gets twice as many.
    changed: the settings that reproduce the run when all others have their defaults; None if unknown.
    """
    folder = _path(run)
    commands = {}
    if config:
        again = ("python", "train.py", "--out", f"{folder}-again")
        commands["reproduce"] = command_line(*again, "--config", f"{folder}/{CONFIG}")
        if changed is not None:
            commands["reproduce without this folder"] = command_line(*again, *_flags(changed))
    longer = {"finished": _twice_as_long(config, steps), "out of patience": "--train.patience=0"}.get(state)
    resume = ["python", "train.py", "--resume", folder]
    commands["train for longer" if longer else "resume"] = command_line(*resume, *([longer] if longer else []))
    commands["fine-tune"] = command_line("python", "train.py", "--init-from", folder, "--data", "OTHER.txt")
    commands["export"] = export_command(run)
    infer = ("python", "infer.py", "--model", folder)
    commands["generate"] = command_line(*infer, "--seed", str(config.get("sample.seed") or "The "))
    commands["measure perplexity"] = command_line(*infer, "--perplexity")
    plot = ("python", "-m", "smallm", "plot", folder, "--html", f"{folder}/report.html")
    commands["write this page again"] = command_line(*plot)
    return commands


def export_command(run: Path) -> str:
    """The command that exports a run to ONNX."""
    return command_line("python", "export.py", _path(run))


def command_line(*words: str) -> str:
    """A command line for sh, bash and zsh; words with control characters as $'…', which sh does not know.

    On Windows a command line for cmd.exe and PowerShell.
    """
    if sys.platform == "win32":
        return subprocess.list2cmdline(words)
    return " ".join(shlex.quote(word) if word.isprintable() else _dollar_quoted(word) for word in words)


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


def _path(run: Path) -> str:
    return f"./{run}" if str(run).startswith("-") else str(run)


def _dollar_quoted(word: str) -> str:
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    shown = (escapes.get(c) or (c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode())) for c in word)
    return f"$'{''.join(shown)}'"


def _twice_as_long(config: Mapping[str, Any], steps: int | None) -> str:
    for key in ("train.minutes", "train.epochs"):
        if isinstance(number := config.get(key), int | float) and number:
            return f"--{key}={2 * number}"
    return f"--train.max_steps={2 * steps if steps else 'N'}"
