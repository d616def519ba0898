"""Trackers (TensorBoard, Weights & Biases and others), through Accelerate: the records of metrics.jsonl as they come.

Nothing leaves the machine by itself: what could send is told to stay offline unless the user's environment says more.
"""

import os
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from smallm.errors import UserError
from smallm.runs.config_file import flatten
from smallm.training.config import Config

LOGS = "logs"
"""The folder of a run that trackers write to."""
PROJECT = "smallm"
RUN_ID = "run-id"  # the file that has the name by which a tracker knows a run that is resumed
LONGEST_REASON = 200  # characters of a tracker's complaint
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
    """Within it, the trackers of `config.train.log_with` are in `accelerator.trackers`, of the first process only.

    step: the run's; above 0 the trackers go on with what they have. Raises `UserError` if they cannot start.
    """
    names = config.train.trackers
    if not names or not accelerator.is_main_process:
        yield
        return
    for variable, value in OFFLINE.items():
        os.environ.setdefault(variable, value)
    folder = run / LOGS
    settings = None if step else {key: _simple(value) for key, value in flatten(config.to_dict()).items()}
    try:
        folder.mkdir(exist_ok=True)
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.log_with = filter_trackers(list(names), folder)
        accelerator.init_trackers(PROJECT, settings, _own_settings(folder, step))
    except Exception as error:  # each tracker has its own kinds
        if not step:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{', '.join(names)} cannot start ({_reason(error)}); mend that, or leave it out of "
                        "train.log_with") from None  # fmt: skip
    try:
        with _quiet_threads():
            yield
    finally:
        for tracker in accelerator.trackers:
            _guarded(tracker, tracker.finish, lambda line: print(line, file=sys.stderr))
        accelerator.trackers.clear()  # or Accelerate would end them once more


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Within it, a tracker's thread that cannot write shows no traceback: the next call of the tracker says it."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def log_record(record: dict[str, Any], trackers: list[GeneralTracker], say: Callable[[str], None]) -> None:
    """A record of metrics.jsonl to all trackers; one that fails is said, and left out from then on."""
    kind, step = record["kind"], record["step"]
    numbers = {f"{kind}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
    del numbers[f"{kind}/step"]
    for tracker in list(trackers):

        def log(tracker: GeneralTracker = tracker) -> None:
            tracker.log(numbers, step=step)
            if record.get("sample"):
                _log_text(tracker, f"{kind}/sample", record["sample"], step)

        if not _guarded(tracker, log, say):
            trackers.remove(tracker)


def _guarded(tracker: GeneralTracker, call: Callable[[], None], say: Callable[[str], None]) -> bool:
    try:
        call()
    except Exception as error:
        say(f"warning: {tracker.name} failed ({_reason(error)}); training goes on without it")
        return False
    return True


def _log_text(tracker: GeneralTracker, key: str, text: str, step: int) -> None:
    """Each tracker has a way of its own with texts; those that have none are not troubled."""
    if tracker.name == "tensorboard":
        tracker.log({key: indent(text, "    ", lambda _: True)}, step=step)  # Markdown: lines and signs stay
    elif hasattr(tracker, "log_table"):
        tracker.log_table(key, ["step", "text"], [[step, text]], step=step)
    elif hasattr(tracker.tracker, "log_text"):
        tracker.tracker.log_text(text, step=step)


def _own_settings(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """What a tracker is to be told at its start, so that a resumed run goes on in its own log."""
    file = folder / RUN_ID
    if not step or not file.is_file():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    name, id = folder.resolve().parent.name, file.read_text(encoding="utf-8")
    return {
        "tensorboard": {"purge_step": step + 1},  # what came after the checkpoint comes again
        "wandb": {"dir": str(folder), "name": name, "id": id, "resume": "allow"},
    }


def _simple(value: Any) -> int | float | str:
    return value if isinstance(value, int | float | str) else " ".join(map(str, value))


def _reason(error: Exception) -> str:
    """What it says, on one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text[:LONGEST_REASON] or type(error).__name__
