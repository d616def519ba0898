"""`train.py`: from the command line and TOML files to a resolved `Config` and a run folder."""

import gc
import os
import re
import sys
import time
import tomllib
from argparse import ArgumentError
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from smallm.errors import UserError
from smallm.runs.layout import new_run
from smallm.training.checkpoint.safe_load import check_memory
from smallm.training.config import KEYS, SECTIONS, Config, flatten, nearest
from smallm.training.model.kernels.compiler import has_bf16, library

DESCRIPTION = """\
Trains a character-level language model on a text and leaves everything in a run folder.

  python train.py                                built-in text, half a minute on two cores
  python train.py --data my.txt                  your own text
  python train.py --data my.txt --minutes 5      size, batch and schedule chosen for this text, machine and time
  python train.py --config configs/shakespeare-cpu.toml --data shakespeare --out runs/shakespeare
  python train.py --resume runs/shakespeare      goes on exactly where it stopped
  python train.py --init-from runs/shakespeare --data my.txt    goes on from its model with another text, in a new run
  python train.py --check my.txt                 trains nothing: what is in the text, what is wrong with it, what to do

Every line of a TOML file is also a flag: [model] n_layer = 6 is --model.n_layer 6; flags win."""

SHORT = {"--data": "--data.source", "--encoding": "--data.encoding", "--minutes": "--train.minutes",
         "--init-from": "--train.init_from"}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Config
    out: Path
    resume: bool
    check: bool = False
    """Only look at the text."""
    explicit: frozenset[str] = frozenset()
    """The settings that a flag or a file gives, as `section.field`; the others are at their defaults."""


def main(argv: Sequence[str]) -> int:
    """Runs `train.py` with these arguments."""
    started = time.perf_counter()
    request = parse(argv)
    if request.check:
        from smallm.training.analysis.text_check import check

        return check(request.config.data)
    check_memory(request.config.model)
    with ThreadPoolExecutor() as beside:  # PyTorch takes as long to import as the kernels to compile
        for bf16 in {False, has_bf16()}:
            beside.submit(library, bf16)
        gc.disable()  # an import makes no garbage; looking for it costs 0.2 s
        from smallm.training.run import train  # mistakes were told before

        gc.enable()
        gc.freeze()
    code = train(request.config, request.out, resume=request.resume, explicit=request.explicit, started=started)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """Ends a process of several at once, without Python's shutdown.

    Gloo's threads outlive their process group; one that still wants Python's lock, for a tensor it lets go of, would
    abort a run that has succeeded (pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse(argv: Sequence[str]) -> Request:
    """Defaults, then the TOML file (or the resumed run's settings), then flags; `UserError` for any mistake."""
    argv = _config_first([_long(argument) for argument in argv])
    parser = _parser()
    values = _parse(parser, argv)
    flags = {key for key, file in _keys(argv) if not file}
    if values["check"] is not None:
        if values["resume"] or values["out"]:
            raise UserError("--check only looks at a text; leave out --resume and --out, or --check")
        values["data"]["source"] = values["check"]
        return Request(_config(values, flags), Path(), resume=False, check=True)
    if values["resume"]:
        run = Path(values["resume"])
        if values["config"] or values["out"]:
            raise UserError("--resume takes its settings and its folder from the run; leave out --config and --out")
        if "train.init_from" in flags:
            raise UserError("--resume goes on with a run and --init-from begins one; leave out one of them")
        from smallm.training.checkpoint.manager import saved_config

        parser.set_defaults(flatten(saved_config(run).to_dict()))
        values = _parse(parser, argv)
        return Request(_config(values, flags), run, resume=True, explicit=frozenset(KEYS))
    name = Path(values["config"][-1]).stem if values["config"] else "quickstart"
    explicit = frozenset(key for key, _ in _keys(argv))
    if values["train"]["init_from"]:
        from smallm.training.finetune import inherit_model_config

        explicit = inherit_model_config(values, explicit)
    if values["train"]["minutes"]:
        values["model"] |= _fitting(values["model"], explicit)
    return Request(_config(values, flags), new_run(values["out"], name), resume=False, explicit=explicit)


def load_config(path: str | Path) -> Config:
    """A TOML file's settings over the defaults. Raises `UserError`."""
    return _config(_parse(_parser(), ["--config", str(find_config(path))]))


def find_config(name: str | Path) -> Path:
    """A TOML file, or the name of one that comes with smallm: `shakespeare-cpu`."""
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


def _parser():
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """Types and defaults from the one, the description's own lines from the other."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        description=DESCRIPTION,
        parser_mode="toml",
        print_config=None,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=Formatter,
    )
    parser.add_argument("--config", action="config", metavar="TOML", help="settings; a file or a shipped name")
    parser.add_argument("--out", type=str, default=None, metavar="DIR", help="run folder; default: runs/<config>")
    parser.add_argument("--resume", type=str, default=None, metavar="RUN", help="go on with an interrupted run")
    parser.add_argument("--check", type=str, default=None, metavar="TEXT", help="look at a text, and train nothing")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name, as_group=False)
    return parser


def _parse(parser, argv: Sequence[str]) -> dict[str, Any]:
    _refuse_unknown_keys(argv)
    try:
        return parser.parse_args(argv).as_dict()
    except ArgumentError as error:
        raise UserError(f"{_plain(str(error))}; see --help") from None
    except OverflowError:
        raise UserError("a number is too large; see --help") from None


def _plain(message: str) -> str:
    """The parser's message on one line, without the words of Python's type system."""
    message = " ".join(message.split())
    for pattern, words in (
        (r'^Parser key "([\w.]+)": ', r"\1: "),
        (r"Expected an? <class 'int'>", "expected a whole number"),
        (r"Expected an? <class 'float'>", "expected a number"),
        (r"Expected an? <class 'bool'>", "expected true or false"),
        (r"Expected an? typing\.Literal\[([^]]*)\]", r"expected one of \1"),
        (r"Expected an? <class '(\w+)'>", r"expected \1"),
        (r"\. Got value: (.*)", r", not \1"),
    ):
        message = re.sub(pattern, words, message)
    return message


def _config(values: dict[str, Any], flags: Set[str] = frozenset()) -> Config:
    """The settings; a flag that says how long the run is displaces what a file or the resumed run says of it."""
    sections = {name: dict(values[name]) for name in SECTIONS}
    train = sections["train"]
    if "train.minutes" in flags and not train["minutes"]:
        raise UserError("--minutes 0 leaves no time to train; give it more, such as --minutes 5")
    by_time = "train.minutes" in flags
    by_steps = any(f"train.{name}" in flags and train[name] for name in ("max_steps", "epochs"))
    if by_time and not by_steps:
        train |= {"max_steps": 0, "epochs": 0.0}
    elif by_steps and not by_time:
        train["minutes"] = 0.0
    return Config.from_dict(sections)


def _fitting(model: dict[str, Any], explicit: Set[str]) -> dict[str, int]:
    """Heads or width to go with the other one, where only that is set; under --minutes they are chosen later."""
    width, heads = "model.n_embd" in explicit, "model.n_head" in explicit
    if width and not heads:
        return {"n_head": 1}
    return {"n_embd": 32 * model["n_head"]} if heads and not width else {}


def _refuse_unknown_keys(argv: Sequence[str]) -> None:
    """The commonest mistake gets a better line than the parser's: one that names the nearest setting."""
    for key, file in _keys(argv):
        if key not in KEYS:
            place = f" in {file}" if file else ""
            raise UserError(f"unknown setting {key}{place}{nearest(key)}")


def _keys(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each setting that is given, and the file that gives it, or nothing for a flag."""
    for argument, value in pairwise([*argv, ""]):
        key = argument.removeprefix("--").split("=")[0]
        if argument == "--config":
            yield from ((key, value) for key in flatten(_toml(Path(value))))
        elif argument.startswith("--") and key not in ("out", "resume", "check", "help"):
            yield key, ""


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable TOML file: {error}") from None


def _long(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return SHORT.get(name, name) + equals + value


def _config_first(argv: list[str]) -> list[str]:
    """Moves `--config FILE` to the front, so that flags win wherever they stand."""
    configs, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            argument = f"--config={next(arguments, '')}"
        if argument.startswith("--config="):
            configs += ["--config", str(find_config(argument.removeprefix("--config=")))]
        else:
            rest.append(argument)
    return configs + rest
