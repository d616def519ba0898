"""`train.py`: its flags, one for every field of `Config`, and its exit code."""

import argparse
import gc
import os
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError
from smallm.options import unescaped
from smallm.training.config import SECTIONS
from smallm.training.model.kernels.compiler import compile_kernels, has_bf16
from smallm.training.output import Output
from smallm.training.request import Request, load_config, resolve

DESCRIPTION = """\
Trains a character-level language model on a text and writes a run folder with checkpoints, metrics and a report.

  smallm train                                built-in text, less than a minute on two cores
  smallm train --data my.txt                  your own text
  smallm train --data my.txt --minutes 5      size, batch and schedule are chosen for this text, machine and time
  smallm train --config shakespeare-cpu --data shakespeare --out runs/shakespeare
  smallm train --resume runs/shakespeare      continues a run exactly where it stopped
  smallm train --init-from runs/shakespeare --data my.txt    fine-tunes its model on another text, in a new run
  smallm train --eval-only runs/shakespeare --data my.txt    measures its best checkpoint; trains nothing
  smallm train --check my.txt                 reports problems of a text and how to solve them; trains nothing

Every setting below is also a line of a TOML file: --model.n_layer 6 is n_layer = 6 in the section [model]. Flags
override files."""

MAX_WAIT = 2.0  # duration of the imports beside a compiler at most, as a multiple of their processor time
MODE_OPTIONS = ("check", "eval_only", "json", "profile")
"""The options that `resolve` does not take."""
TITLES = {"data": "the text", "model": "the Transformer", "optim": "the optimiser and the learning rate",
          "train": "length, batches, evaluation, checkpoints", "sample": "samples and sampling defaults"}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs `train.py` with these arguments and returns its exit code. Raises `UserError`."""
    started = time.perf_counter()
    settings, options = _parse_flags(argv)
    mode = {name: options.pop(name) for name in MODE_OPTIONS}
    if mode["check"] is not None:
        return _check_text(mode["check"], settings, options)
    if mode["eval_only"] is not None:
        return _evaluate_only(Path(mode["eval_only"]), mode["json"], settings, options)
    if mode["json"]:
        raise UserError("--json goes with --eval-only RUN; leave it out")
    request = replace(resolve(settings, **options), profile=mode["profile"])
    with ThreadPoolExecutor() as beside:  # the kernels compile while PyTorch is imported
        wall, busy, compiled = time.perf_counter(), time.thread_time(), []
        for bf16 in {False, has_bf16()}:
            beside.submit(compile_kernels, bf16).add_done_callback(lambda _: compiled.append(time.perf_counter()))
        gc.disable()  # collecting garbage during the imports would take 0.2 s and find none
        from smallm.training.run import run_training

        imported, busy = time.perf_counter() - wall, time.thread_time() - busy
        gc.enable()
        gc.freeze()
    code = run_training(request, started, imports=import_seconds(imported, busy, max(compiled) - wall))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _exit_at_once(code)
    return code


def import_seconds(wall: float, busy: float, compiling: float) -> float:
    """Seconds that the imports took, or would have taken if the kernels had been compiled already.

    wall, busy: their duration and their processor time; compiling: seconds until the kernels were ready.
    """
    return min(wall, MAX_WAIT * busy) if compiling > wall / 2 else wall


def parse(argv: Sequence[str]) -> Request:
    """The training that these arguments of `train.py` ask for. Raises `UserError`."""
    settings, options = _parse_flags(argv)
    for name in MODE_OPTIONS:
        del options[name]
    return resolve(settings, **options)


def build_parser() -> ArgumentParser:
    """The parser of `train.py`; its result holds only the settings that are given."""
    parser = ArgumentParser(
        "train",
        usage="smallm train [--data TEXT] [--minutes N] [--config TOML] [--out DIR] [--section.setting VALUE ...]\n"
        "       smallm train --resume RUN [--section.setting VALUE ...]",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", dest="data.source", action="append", metavar="TEXT",
        help="text to train on; the same as --data.source; may be repeated")  # fmt: skip
    add("--encoding", dest="data.encoding", metavar="NAME", help="its encoding; the same as --data.encoding")
    add("--minutes", dest="train.minutes", metavar="N", help="time for the whole command; the same as --train.minutes")
    add("--init-from", dest="train.init_from", metavar="RUN", help="model to fine-tune; the same as --train.init_from")
    add("--config", dest="configs", action="append", default=[], metavar="TOML",
        help="settings: a TOML file or the name of one in configs/; of several, later files win")  # fmt: skip
    add("--out", default=None, metavar="DIR", help="run folder (default: runs/<name of the config>)")
    add("--resume", default=None, metavar="RUN", help="continue this run")
    add("--check", default=None, metavar="TEXT", help="report problems of this text and train nothing")
    add("--eval-only", default=None, metavar="RUN", help="print the loss of this checkpoint, or of the best one of "
        "this run, on the run's validation text or on --data, and train nothing")  # fmt: skip
    add("--json", action="store_true", default=False, help="for --eval-only: print a JSON object")
    add("--profile", action="store_true", default=False, help="write a trace of five steps (torch.profiler) into the "
        "run folder, trace.json")  # fmt: skip
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(f"[{name}] {TITLES[name]}")
        for f in fields(section):
            text = f"{f.metadata['help']} (default: {_shown(f.default)})".replace("%", "%%")
            action = "append" if f"{name}.{f.name}" == "data.source" else "store"
            group.add_argument(f"--{name}.{f.name}", action=action, metavar=_metavar(f.type), help=text)
    return parser


def _parse_flags(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are given, by `section.field`, and the other options."""
    given = vars(build_parser().parse_args(argv))
    options = {name: given.pop(name) for name in ("configs", "out", "resume", *MODE_OPTIONS)}
    if "data.source" in given and len(given["data.source"]) == 1:
        given["data.source"] = given["data.source"][0]
    types = {f"{name}.{f.name}": f.type for name, section in SECTIONS.items() for f in fields(section)}
    settings = {key: _read(text, types[key]) for key, text in given.items()}
    if "data.separator" in settings:
        settings["data.separator"] = unescaped(settings["data.separator"])
    return settings, options


def _evaluate_only(run: Path, as_json: bool, settings: dict[str, Any], options: dict[str, Any]) -> int:
    if any(options.values()) or not set(settings) <= {"data.source", "data.encoding", "data.field"}:
        taken = "--data, --data.field, --encoding and --json"
        raise UserError(f"--eval-only measures a trained model; it takes {taken} only")
    from smallm.training.eval_only import evaluate_only

    evaluate_only(run, {key.removeprefix("data."): value for key, value in settings.items()}, as_json)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _exit_at_once(0)
    return 0


def _check_text(text: str, settings: dict[str, Any], options: dict[str, Any]) -> int:
    if options["resume"] or options["out"]:
        raise UserError("--check only reports on a text; leave out --resume and --out, or --check")
    if "data.source" in settings:
        raise UserError("--check TEXT names the text; leave out --data")
    from smallm.training.analysis.text_check import check

    return check(load_config(*options["configs"], settings=settings | {"data.source": text}))


def _read(text: Any, kind: Any) -> Any:
    """The value of a flag; a text that is no such value is returned as it is, and `Config` refuses it by name."""
    try:
        if isinstance(text, list):
            return text
        if kind in (int, float):
            return kind(text)
        if text.startswith("[") and text.endswith("]") and get_origin(kind) in (tuple, UnionType):
            return tomllib.loads(f"x = {text}")["x"]
        if get_origin(kind) is tuple:
            return [get_args(kind)[0](part) for part in text.split(",")]
    except ValueError:
        pass
    return text


def _metavar(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"{{{','.join(parts)}}}"
    if origin is tuple:
        return f"{_metavar(parts[0])},..."
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _shown(default: Any) -> str:
    if default in ("", ()):
        return "none"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _exit_at_once(code: int) -> NoReturn:
    """Ends one process of several without Python's shutdown, and without ending its process group.

    Either would abort or block a run that has succeeded if a thread of gloo still needs Python's lock, to release a
    tensor (pytorch/pytorch#179291).
    """
    Output("stdout").flush()
    Output("stderr").flush()
    os._exit(code)
