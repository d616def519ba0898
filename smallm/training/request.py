"""From config files and settings to a `Request`: the resolved `Config` of a run and its folder.

`train.py` and `smallm.train` share this module; it does not import PyTorch, so that mistakes are reported at once.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smallm.errors import UserError
from smallm.runs.config_file import flatten, read_toml
from smallm.runs.layout import check_path, new_run
from smallm.training.checkpoint.safe_load import check_memory
from smallm.training.config import KEYS, MAY_CHANGE, Config, check_keys

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Precision in the facts of a checkpoint -> train.mixed_precision."""


@dataclass(frozen=True)
class Request:
    """A training that was asked for."""

    config: Config
    out: Path
    """The run folder."""
    resume: bool
    explicit: frozenset[str] = frozenset()
    """The settings that a config file or the caller gives, as `section.field`; `train.minutes` leaves them alone."""
    precision: str = ""
    """The precision that the resumed run uses where train.mixed_precision is `auto`; empty = not chosen yet."""
    threads: int = 0
    """The number of threads that each process of the resumed run uses on a CPU; 0 = not chosen yet."""
    profile: bool = False
    """Whether to write a trace of some steps into the run folder."""


def resolve(
    settings: Mapping[str, Any],
    *,
    configs: Sequence[str | Path] = (),
    out: str | Path | None = None,
    resume: str | Path | None = None,
) -> Request:
    """What to train, from the defaults, then config files (or the resumed run's settings), then `settings`.

    settings: by `section.field`; configs: TOML files or names of shipped ones, later files win; out: the run folder, by
    default the first free one of `runs/<config>`, `runs/<config>-2`, …; resume: a run to continue.
    Raises `UserError` for every mistake.
    """
    check_keys(settings)
    if resume:
        request = _resumed(settings, Path(resume), bool(configs or out))
    else:
        files = [find_config(config) for config in configs]
        values, explicit = _merge(settings, files)
        if values["train.init_from"]:
            from smallm.training.finetune import inherit_model_config

            explicit = inherit_model_config(values, explicit)
        if values["train.minutes"]:
            values |= _matching_shape(values, explicit)
        config = Config.from_dict(_one_length(values, settings))
        request = Request(config, new_run(out, files[-1].stem if files else "quickstart"), False, explicit)
    check_memory(request.config.model)
    return request


def load_config(*configs: str | Path, settings: Mapping[str, Any] | None = None) -> Config:
    """The settings of TOML files over the defaults, and `settings` (by `section.field`) over them.

    Raises `UserError`.
    """
    settings = settings or {}
    values, _ = _merge(settings, [find_config(config) for config in configs])
    return Config.from_dict(_one_length(values, settings))


def find_config(name: str | Path) -> Path:
    """The path of a TOML file, or of one that comes with smallm and has this name, such as `shakespeare-cpu`."""
    path = Path(name)
    if path.is_file():
        return path
    bare = str(path.parent) == "."
    package = Path(__file__).parents[1]
    folders = [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]
    for folder in folders:
        if bare and path.suffix in ("", ".toml") and (shipped := folder / f"{path.stem}.toml").is_file():
            return shipped
    names = sorted({file.stem for folder in folders for file in folder.glob("*.toml")})
    raise UserError(f"there is no config {name}; give a TOML file or one of: {', '.join(names)}")


def _resumed(settings: Mapping[str, Any], run: Path, more: bool) -> Request:
    if more:
        raise UserError("resume takes the settings and the folder of the run; leave out config and out")
    if "train.init_from" in settings:
        raise UserError("resume continues a run and init_from starts a new one; leave out one of them")
    from smallm.training.checkpoint.manager import saved_config

    check_path(run)
    saved, facts = saved_config(run)
    precision = PRECISIONS.get(str(facts.get("precision")), "")
    threads = facts.get("threads", 0)
    old = flatten(saved.to_dict())
    if settings.get("train.mixed_precision") == precision != "":
        settings = {**settings, "train.mixed_precision": saved.train.mixed_precision}
    config = Config.from_dict(_one_length(old | dict(settings), settings))
    for key, value in flatten(config.to_dict()).items():
        if value != old[key] and key not in MAY_CHANGE:
            if key == "train.mixed_precision" and precision:
                old[key] = precision
            raise UserError(f"{run} was trained with {key} = {old[key]!r}, not {value!r}; leave out {key}, or start "
                            "a new run")  # fmt: skip
    return Request(config, run, True, frozenset(KEYS), precision, threads if type(threads) is int else 0)


def _merge(settings: Mapping[str, Any], files: Sequence[Path]) -> tuple[dict[str, Any], frozenset[str]]:
    """All values, and the settings that are not defaults."""
    given: dict[str, Any] = {}
    for file in files:
        settings_of_file = flatten(read_toml(file))
        check_keys(settings_of_file, file)
        given |= settings_of_file
    given |= settings
    return flatten(Config().to_dict()) | given, frozenset(given)


def _one_length(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A length of the run in `settings` (minutes, or steps and epochs) replaces one from a file or a resumed run."""
    by_time, by_steps = "train.minutes" in settings, settings.get("train.max_steps") or settings.get("train.epochs")
    if by_time and not values["train.minutes"]:
        raise UserError("minutes = 0 leaves no time to train; give more, such as 5")
    if by_time and not by_steps:
        return values | {"train.max_steps": 0, "train.epochs": 0.0}
    return values | {"train.minutes": 0.0} if by_steps and not by_time else values


def _matching_shape(values: Mapping[str, Any], explicit: Set[str]) -> dict[str, int]:
    """The number of heads for a given width, or the width for a given number of heads, until the planner chooses it."""
    width, heads = "model.n_embd" in explicit, "model.n_head" in explicit
    if width and not heads:
        return {"model.n_head": 1}
    return {"model.n_embd": 32 * values["model.n_head"]} if heads and not width else {}
