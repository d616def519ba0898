"""What a run says while it runs: a progress bar, lines on stderr, and `metrics.jsonl` for programs."""

import json
import math
import sys
from pathlib import Path

from accelerate.tracking import GeneralTracker
from tqdm import tqdm

from smallm.atomic_write import atomic_write
from smallm.training.checkpoint.format import TrainingState
from smallm.training.trackers import log_record


class Report:
    """Bar, messages and metrics of one run; silent where not enabled (all processes but the first)."""

    def __init__(
        self, metrics: Path, state: TrainingState, total_steps: int, enabled: bool, trackers: list[GeneralTracker]
    ):
        """Goes on with the metrics of a resumed run, without the lines written after its checkpoint.

        trackers: get the same figures.
        """
        self.enabled, self._trackers = enabled, trackers
        if enabled:
            atomic_write(metrics, b"".join(_lines_until(metrics, state.step)))
            self._file = metrics.open("ab")
        self._step, self._total_steps = state.step, total_steps

    def __enter__(self) -> "Report":
        """Starts the bar."""
        self._bar = tqdm(total=self._total_steps, initial=self._step, unit="step", disable=not self.enabled,
                         dynamic_ncols=True, mininterval=0.5)  # fmt: skip
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def say(self, message: str) -> None:
        """A message above the bar."""
        if self.enabled:
            tqdm.write(message, file=sys.stderr)

    def advance(self, step: int, total_steps: int) -> None:
        """Moves the bar to `step` of so many."""
        self._bar.total = total_steps
        self._bar.update(step - self._bar.n)

    def train(self, **values) -> None:
        """Figures of the last training steps."""
        speed = f"{values['characters_per_second']:,.0f} chars/s"
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed}", refresh=False)
        whole = {key: value if math.isfinite(value) else None for key, value in values.items()}  # JSON has no NaN
        self._write({"kind": "train", **whole})

    def evaluation(self, **values) -> None:
        """Figures of an evaluation, and the sample."""
        train_loss = "" if values["train_loss"] is None else f", train {values['train_loss']:.4f}"
        self.say(
            f"step {values['step']:,} (epoch {values['epoch']:.2f}): validation {values['val_loss']:.4f} nats per "
            f"character = {values['bits_per_character']:.3f} bits{train_loss}"
        )
        if values["sample"]:
            self.say("    " + values["sample"].strip("\n").replace("\n", "\n    "))
        self._write({"kind": "eval", **values})

    def old_text(self, **values) -> None:
        """How the loss on the text of the model that the run began with moved."""
        self._write({"kind": "old_text", **values})

    def close(self) -> None:
        """Ends the bar and the file; messages may still follow."""
        self._bar.close()
        if self.enabled:
            self._file.close()

    def _write(self, values: dict) -> None:
        if self.enabled:
            self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            log_record(values, self._trackers, self.say)


def _lines_until(metrics: Path, step: int) -> list[bytes]:
    if not step or not metrics.is_file():
        return []
    kept = []
    for line in metrics.read_bytes().splitlines(keepends=True):  # of bytes: text has more line ends than JSON Lines
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a kill
    return kept
