"""The commands that use a run, train it further or reproduce it, quoted for a shell."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallm.errors import command
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
    commands = {}
    if config:
        again = ("train", "--out", Path(f"{run}-again"))
        commands["reproduce"] = command(*again, "--config", run / CONFIG)
        if changed is not None:
            commands["reproduce without this folder"] = command(*again, *_flags(changed))
    longer = {"finished": _twice_as_long(config, steps), "out of patience": "--train.patience=0"}.get(state)
    purpose, flags = ("train for longer", [longer]) if longer else ("resume", [])
    commands[purpose] = command("train", "--resume", run, *flags)
    commands["fine-tune"] = command("train", "--init-from", run, "--data", "OTHER.txt")
    commands["export"] = command("export", run)
    commands["generate"] = command("infer", "--model", run, "--seed", str(config.get("sample.seed") or "The "))
    commands["measure perplexity"] = command("infer", "--model", run, "--perplexity")
    commands["write this page again"] = command("plot", run, "--html", run / "report.html")
    return commands


def longer_training(config: Mapping[str, Any], changed: Mapping[str, Any], seconds: float) -> str:
    """The command that trains a new model on the same text for longer, of a size that suits this time.

    config: the run's settings as `section.field`; changed: those that differ from their defaults; seconds: duration of
    the run. The new run takes 5 minutes, or 4 times as long as this run if that is more.
    """
    sources = config["data.source"]
    words: list[str | Path] = []
    for source in [sources] if isinstance(sources, str) else sources:
        words += ["--data", source if source == "-" else Path(source)]
    if config["train.init_from"]:
        words += ["--init-from", Path(config["train.init_from"])]
    words += _flags({key: value for key, value in changed.items() if key.startswith("data.") and key != "data.source"})
    return command("train", *words, "--minutes", str(max(5, math.ceil(4 * seconds / 60))))


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags = []
    for key, value in settings.items():
        repeated = value if key == "data.source" and isinstance(value, list) else [value]
        flags += [f"--{key}={_typed(each)}" for each in repeated]
    return flags


def _typed(value: Any) -> str:
    """A value as a flag takes it: `a,b` for a list, or TOML for a list that this cannot express."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple) and value and not any("," in str(each) for each in value):
        joined = ",".join(map(str, value))
        return joined if joined and not joined.startswith("[") else str(list(value))
    return str(value)


def _twice_as_long(config: Mapping[str, Any], steps: int | None) -> str:
    for key in ("train.minutes", "train.epochs"):
        if isinstance(number := config.get(key), int | float) and number:
            return f"--{key}={2 * number}"
    return f"--train.max_steps={2 * steps if steps else 'N'}"
