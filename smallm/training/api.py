"""`smallm.train`: training from a program or a notebook, with the options of `train.py`."""

import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallm.errors import UserError, missing_package
from smallm.options import as_path
from smallm.runs.config_file import flatten
from smallm.runs.summary import Run, read_run

MAX_SOURCE = 1000  # characters; a longer string is a text, not its path
_TRAINING = threading.Lock()  # Accelerate keeps its state per process, not per training


def train(
    source: str | Path | None = None,
    *,
    minutes: float | None = None,
    config: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    encoding: str | None = None,
    init_from: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Trains a character-level language model on a text and returns its run folder, as `train.py` does.

    >>> run = smallm.train("my.txt", minutes=5)
    >>> run.val_loss, run.path, run.best_checkpoint
    >>> smallm.train("my.txt", out="runs/small", model={"n_layer": 2, "n_embd": 64, "n_head": 2}, train={"epochs": 3})
    >>> smallm.train(resume="runs/small", train={"epochs": 6})

    source: the text: a file, a folder of .txt files, or the name of a built-in text ("python-docs", "shakespeare"). The
        default is the text of the config, or python-docs. A string that holds the text itself is refused.
    minutes: time for the whole training, in minutes; every setting that is not given is then chosen to suit the time,
        the machine and the text. Without it, the settings give the length of the run (800 steps by default).
    config: a TOML file with settings, or the name of one in configs/, such as "shakespeare-cpu". Default: none.
    out: the folder of the new run. Default: the first free one of runs/NAME, runs/NAME-2, …, where NAME is the name of
        the config, or quickstart.
    resume: the folder of an interrupted run to continue, or of a finished run to train longer. Its settings and its
        folder are kept: leave out config, out and init_from, and also source unless the text has moved.
    encoding: encoding of the text. Default: "utf-8".
    init_from: a run or a checkpoint whose model the new run starts from (fine-tuning). Default: random weights.
    settings: all other settings, by section, as in the TOML files: `data`, `model`, `optim`, `train` and `sample` are
        mappings of names to values, such as `optim={"learning_rate": 0.01}`; `**{"optim.learning_rate": 0.01}` is the
        same. `python train.py --help` lists every setting with its default.

    Returns a record of the run (`smallm.Run`) with its path, val_loss (nats per character), best_checkpoint, metrics
    (every loss) and more. The folder of the run also holds report.html.

    Progress and samples are printed as by `train.py`. Ctrl-C (or "interrupt" in a notebook) saves a checkpoint and then
    raises KeyboardInterrupt; SIGTERM, SIGHUP and SIGUSR1 save a checkpoint and then take their usual effect. The
    function may be called from any thread, for one training at a time; outside the main thread it handles no
    signals. It needs the extra packages of `pip install 'smallm[train]'`.

    Raises `UserError`, with a message of one line, for every mistake in the arguments, the text or the run folder.
    """
    started = time.perf_counter()
    try:
        from smallm.training.request import resolve
        from smallm.training.run import run_training

        imports = time.perf_counter() - started
    except ModuleNotFoundError as error:
        raise missing_package("train", error.name, "train") from None
    shortcuts = {"source": source, "encoding": encoding, "minutes": minutes, "init_from": init_from}
    given = _settings(settings, shortcuts)
    if isinstance(source, str) and ("\n" in source or len(source) > MAX_SOURCE):
        raise UserError("source is the path or the name of a text, not the text itself; write the text to a file first")
    paths = {"source": source, "config": config, "out": out, "resume": resume, "init_from": init_from}
    for name, path in paths.items():
        if path is not None:
            as_path(name, path)
    request = resolve(given, configs=() if config is None else (config,), out=out, resume=resume)
    if not _TRAINING.acquire(blocking=False):
        raise UserError("another training is running in this process; wait for it, or start a second process")
    try:
        code = run_training(request, started, imports, last=False)
    finally:
        _TRAINING.release()
    if code:
        signal.raise_signal(code - 128)
    return read_run(request.out, max_bytes=None)


def _settings(sections: Mapping[str, Any], shortcuts: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that are given, by `section.field`."""
    settings = flatten(sections)
    for name, value in shortcuts.items():
        if value is not None:
            key = f"data.{name}" if name in ("source", "encoding") else f"train.{name}"
            if key in settings:
                raise UserError(f"{name} and {key} are the same setting; leave out one of the two")
            settings[key] = str(value) if isinstance(value, Path) else value
    return settings
