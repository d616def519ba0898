"""What a run measures and prints while it trains: mean loss and speed, progress bar, messages, `metrics.jsonl`."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor
from tqdm.auto import tqdm  # a widget in notebooks, text elsewhere

from smallm.atomic_write import atomic_write
from smallm.runs.layout import METRICS
from smallm.runs.metrics import Record, read_metrics
from smallm.training.output import Output
from smallm.training.trackers import log_record


class Meter:
    """Mean loss and speed between two log lines; losses stay on the device until a line is due."""

    def __init__(self, accelerator: Accelerator, start: float):
        """start: `time.perf_counter()` at the start of the run, minus the seconds of its earlier parts."""
        self._accelerator = accelerator
        self.start = start
        self._mark = time.perf_counter()
        self.paused_seconds = 0.0
        self._total, self._steps = torch.zeros(2, device=accelerator.device), 0  # sum of the losses, their number
        self._sum_since_evaluation, self._steps_since_evaluation = 0.0, 0

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run, with evaluations, checkpoints and the earlier parts of the run."""
        return time.perf_counter() - self.start

    def add(self, loss: Tensor) -> None:
        """Adds the loss of one step on this process, still on the device; a loss that is not finite is left out."""
        counts = loss.isfinite()
        self._total += torch.stack([torch.where(counts, loss, 0), counts])
        self._steps += 1

    def read(self) -> tuple[float, float]:
        """Mean loss over processes and steps since the last reading (NaN without a finite loss), and steps per second.

        All processes must call this.
        """
        total, count = self._accelerator.reduce(self._total, "sum").tolist()
        mean = total / count if count else math.nan
        now, steps = time.perf_counter(), self._steps
        speed = steps / (now - self._mark)
        if count:
            self._sum_since_evaluation += mean * steps
            self._steps_since_evaluation += steps
        self._total, self._steps, self._mark = torch.zeros_like(self._total), 0, now
        return mean, speed

    def since_evaluation(self) -> float | None:
        """Mean of the readings since the last call; None without a reading."""
        total, steps = self._sum_since_evaluation, self._steps_since_evaluation
        self._sum_since_evaluation, self._steps_since_evaluation = 0.0, 0
        return total / steps if steps else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in this context does not count as training speed."""
        begun = time.perf_counter()
        yield
        pause = time.perf_counter() - begun
        self._mark += pause
        self.paused_seconds += pause


class Logger:
    """Progress bar, messages, metrics and trackers of a run; silent on all processes but the main one."""

    def __init__(self, folder: Path, step: int, total_steps: int, trackers: list[GeneralTracker], enabled: bool):
        """folder: of the run. In a resumed run, `step` is that of its checkpoint; later records are removed.

        trackers: receive every record of metrics.jsonl too.
        """
        self._enabled, self._trackers = enabled, trackers
        self._step, self._total_steps = step, total_steps
        self._stderr = Output("stderr")
        if enabled:
            records = read_metrics(folder) if step else []
            lines = [_json_line(record) for record in records if _step_of(record) <= step]
            atomic_write(folder / METRICS, b"".join(lines))
            self._file = (folder / METRICS).open("ab")

    def __enter__(self) -> "Logger":
        """Shows the bar."""
        self._bar = tqdm(total=self._total_steps, initial=self._step, unit="step", disable=not self._enabled,
                         file=self._stderr, dynamic_ncols=True, mininterval=0.5)  # fmt: skip
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close_bar()
        if self._enabled:
            self._file.close()

    def info(self, message: str) -> None:
        """Prints a message on stderr, above the bar."""
        if self._enabled:
            tqdm.write(message, file=self._stderr)

    def warning(self, message: str) -> None:
        """Prints a warning on stderr, above the bar."""
        self.info(f"warning: {message}")

    def result(self, message: str) -> None:
        """Prints a line on stdout; the bar must be closed."""
        if self._enabled:
            print(message, file=Output("stdout"), flush=True)

    def advance(self, step: int, total_steps: int) -> None:
        """Moves the bar to `step` of `total_steps`."""
        self._bar.total = total_steps
        self._bar.update(step - self._bar.n)

    def show(self, status: str) -> None:
        """Sets the text at the end of the bar."""
        self._bar.set_postfix_str(status, refresh=False)

    def close_bar(self) -> None:
        """Ends the bar; messages and records may follow."""
        self._bar.close()

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Appends a record to metrics.jsonl and passes the record to the trackers.

        kind: `train`, `eval` or `old_text`; values: with `step`; numbers that are not finite become null.
        """
        if self._enabled:
            record = {"kind": kind, **{key: _json_value(value) for key, value in values.items()}}
            self._file.write(_json_line(record))
            self._file.flush()
            log_record(record, self._trackers, self.info)


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _step_of(record: Record) -> float:
    step = record.get("step")
    return step if isinstance(step, int | float) else math.inf
