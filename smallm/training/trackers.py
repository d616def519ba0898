"""Experiment trackers (TensorBoard, Weights & Biases and others), through Accelerate; they get every metrics record.

No data leaves the machine unless the user asks for it: trackers run offline unless the environment says otherwise.
"""

import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from smallm.errors import UserError
from smallm.runs.config_file import flatten
from smallm.training.config import Config
from smallm.training.output import Output

LOGS = "logs"  # folder within the run that trackers write to
PROJECT = "smallm"
RUN_ID = "run-id"  # file with the identifier under which a tracker continues a resumed run
MAX_REASON = 200  # characters of a tracker's error message that are shown
OFFLINE = {
    "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "COMET_START_ONLINE": "0",
    "COMET_INTERNAL_REPORTING": "0", "COMET_INTERNAL_SENTRY_DSN": "", "CLEARML_OFFLINE_MODE": "1",
    "SWANLAB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true", "DVC_NO_ANALYTICS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}  # fmt: skip


def check(names: Sequence[str]) -> None:
    """Raises `UserError` for a tracker that Accelerate does not know or that is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"there is no tracker {name!r}; train.log_with knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise UserError(f"{name} is not installed; pip install {name}, or leave it out of train.log_with")


@contextmanager
def started(accelerator: Accelerator, config: Config, run: Path, step: int) -> Iterator[None]:
    """Starts the trackers of `config.train.log_with` on the main process, in `accelerator.trackers`, and ends them.

    step: the step of the run; above 0 the trackers continue their logs. Raises `UserError` if a tracker cannot start.
    """
    names = config.train.trackers
    if not names or not accelerator.is_main_process:
        yield
        return
    for variable, value in OFFLINE.items():
        os.environ.setdefault(variable, value)
    folder = run / LOGS
    settings = None if step else {key: value if isinstance(value, int | float | str) else " ".join(map(str, value))
                                  for key, value in flatten(config.to_dict()).items()}  # fmt: skip
    try:
        folder.mkdir(exist_ok=True)
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.log_with = filter_trackers(list(names), folder)
        accelerator.init_trackers(PROJECT, settings, _tracker_settings(folder, step))
    except Exception as error:  # each tracker raises errors of other classes
        if not step:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{', '.join(names)} cannot start ({_reason(error)}); solve this problem, or leave the "
                        "tracker out of train.log_with") from None  # fmt: skip
    try:
        with _hide_thread_errors():
            yield
    finally:
        for tracker in accelerator.trackers:
            _guarded(tracker, tracker.finish, lambda line: print(line, file=Output("stderr")))
        accelerator.trackers.clear()  # otherwise Accelerate would end them a second time


@contextmanager
def _hide_thread_errors() -> Iterator[None]:
    """Hides the traceback of a tracker's thread that cannot write; the next call of the tracker reports the error."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def log_record(record: dict[str, Any], trackers: list[GeneralTracker], say: Callable[[str], None]) -> None:
    """Sends a record of metrics.jsonl to all trackers; `say` reports one that fails, which leaves the list."""
    trackers[:] = [tracker for tracker in trackers if _guarded(tracker, partial(_log, tracker, record), say)]


def _log(tracker: GeneralTracker, record: dict[str, Any]) -> None:
    """Logs the numbers and the sample of a record. Trackers differ in how they take a text; some take none."""
    kind, step, text = record["kind"], record["step"], record.get("sample")
    numbers = {f"{kind}/{key}": value for key, value in record.items()
               if isinstance(value, int | float) and key != "step"}  # fmt: skip
    tracker.log(numbers, step=step)
    if not text:
        return
    if tracker.name == "tensorboard":  # shows Markdown; an indented block keeps line breaks and symbols
        tracker.log({f"{kind}/sample": indent(text, "    ", lambda _: True)}, step=step)
    elif hasattr(tracker, "log_table"):
        tracker.log_table(f"{kind}/sample", ["step", "text"], [[step, text]], step=step)
    elif hasattr(tracker.tracker, "log_text"):
        tracker.tracker.log_text(text, step=step)


def _guarded(tracker: GeneralTracker, call: Callable[[], None], say: Callable[[str], None]) -> bool:
    try:
        call()
    except Exception as error:
        say(f"warning: {tracker.name} failed ({_reason(error)}); training continues without it")
        return False
    return True


def _tracker_settings(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """Options by tracker, with which a resumed run continues its earlier log."""
    file = folder / RUN_ID
    if not step or not file.is_file():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    name, id = folder.resolve().parent.name, file.read_text(encoding="utf-8")
    return {
        "tensorboard": {"purge_step": step + 1},  # the steps after the checkpoint are repeated
        "wandb": {"dir": str(folder), "name": name, "id": id, "resume": "allow"},
    }


def _reason(error: Exception) -> str:
    """The error message on one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text[:MAX_REASON] or type(error).__name__
