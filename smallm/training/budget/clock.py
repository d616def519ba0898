"""The length of a run: a step budget (fixed number of steps) or a time budget (--minutes), and the loss forecast."""

import time
from dataclasses import dataclass

from smallm.training.budget.planner import MAX_EPOCHS
from smallm.training.checkpoint.format import TrainingState
from smallm.training.config import TrainConfig
from smallm.training.optim.schedule import cost_done, cost_left, steps_at_cost

CHECKPOINT_SECONDS = 0.2  # estimate for a checkpoint before the first measurement
MAX_FIRST_PAUSE = 0.1  # estimate for the first evaluation at most, as a fraction of all time
MAX_PAUSES = 0.5  # estimate for all evaluations before the last one at most, as a fraction of the remaining time
END_SECONDS = 2.5  # at least, for the chart, the summary and the exit of Python
# (x, y) of x + y * progress, fitted to single models on 12 texts: loss at the end / validation loss, and the root mean
# square of the relative error.
FORECAST, FORECAST_ERROR = (0.615, 0.385), (0.15, -0.12)
FORECAST_FROM = 0.15  # earlier evaluations tell too little


@dataclass(frozen=True)
class Clock:
    """Start of the program, and the time to reserve for its end."""

    started: float
    """time.perf_counter() at the start of the program."""
    end_seconds: float = END_SECONDS
    """Seconds reserved after the last step."""

    @property
    def seconds(self) -> float:
        """Seconds since the start of the program."""
        return time.perf_counter() - self.started


class StepBudget:
    """A run of a fixed number of steps."""

    extend_flag = "--train.max_steps N"  # the option that extends a finished run

    def __init__(self, total_steps: int, is_default: bool = False):
        """is_default: whether the settings give no length."""
        self.total_steps, self._is_default = total_steps, is_default

    def resume(self, state: TrainingState, before: TrainConfig) -> None:
        """Continues from the state of a checkpoint; before: the settings of the run so far.

        A run of the default length keeps its length, because an earlier version may have had another default.
        """
        if self._is_default and not (before.max_steps or before.epochs or before.minutes):
            self.total_steps = state.planned_steps or self.total_steps

    def update(self, step: int, seconds: float, paused: float, member: int = 0, member_start: int = 0) -> None:
        """Corrects `total_steps` after `step` steps; does nothing here."""


class TimeBudget(StepBudget):
    """A run of a fixed duration; `total_steps` is an estimate until the run ends.

    On a busy machine the time of a step may double or halve. The budget therefore tracks the progress of the run, from
    0 to 1, and derives `total_steps` = step / progress. Between two updates the progress grows by the time that has
    passed, divided by the time that was left for steps, times the remaining progress. It never falls, never jumps, and
    reaches 1 when the time is up. Schedules that depend on step / total_steps thus follow the clock. In an ensemble
    the steps of the later models take longer, so progress is a share of the time, and `total_steps` allows for that.
    """

    extend_flag = "--minutes N"

    def __init__(
        self, minutes: float, planned_steps: int, steps_per_epoch: float, eval_every: int,
        steps_per_evaluation: float = 0.0, end_seconds: float = END_SECONDS, models: int = 1,
    ):  # fmt: skip
        """
        Args:
            minutes: duration of the run, from the start of the program to its end.
            planned_steps: the estimate of `total_steps` before the first update.
            steps_per_epoch: steps in which the training part is read once; the run ends after MAX_EPOCHS epochs.
            eval_every: steps between evaluations.
            steps_per_evaluation: duration of an evaluation, in steps, before the first measurement.
            end_seconds: time to reserve after the last step.
            models: number of models that the run trains (train.ensemble).
        """
        self._max_steps = max(1, int(MAX_EPOCHS * steps_per_epoch))
        super().__init__(max(1, min(planned_steps, self._max_steps)))
        self._seconds, self._end_seconds, self._models = 60 * minutes, end_seconds, models
        self._eval_every, self._steps_per_evaluation = eval_every, steps_per_evaluation
        self._pause: float | None = None  # seconds of the last evaluation and checkpoint
        self._progress = 0.0
        self._last: tuple[int, float, float] | None = None

    def resume(self, state: TrainingState, before: TrainConfig) -> None:
        """Continues with the same progress; if the duration has changed, with the elapsed part of the new duration."""
        if 60 * before.minutes == self._seconds and state.planned_steps:
            done = cost_done(state.step, state.member, state.member_start)
            left = max(0.0, cost_left(state.step, state.planned_steps, state.member, self._models))
            self._progress = done / (done + left)
        else:
            self._progress = min(1.0, state.seconds / self._seconds)
        self._estimate(state.step, state.member, state.member_start)

    def update(self, step: int, seconds: float, paused: float, member: int = 0, member_start: int = 0) -> None:
        """Corrects `total_steps` after `step` steps; the first call only sets the reference point.

        Args:
            step: steps done.
            seconds: duration of the whole run so far, from the start of the program.
            paused: seconds spent on evaluations and checkpoints since this process began to train. One evaluation and
                one checkpoint are still to come at the end.
            member: the model that trains, from 0.
            member_start: its first step.
        """
        now = (step, seconds, paused)
        (last_step, last_seconds, last_paused), self._last = self._last or now, now
        pause = paused - last_paused
        stepping = seconds - last_seconds - pause
        self._pause = pause or self._pause
        guess = CHECKPOINT_SECONDS + self._steps_per_evaluation * stepping / max(1, step - last_step)
        each = self._pause or min(guess, MAX_FIRST_PAUSE * self._seconds)
        left = self._seconds - self._end_seconds - seconds - each
        left -= min(each * self._evaluations_left(step, member), MAX_PAUSES * max(0.0, left))
        self._progress += (1 - self._progress) * (stepping / (stepping + left) if left > 0 else 1.0)
        self._estimate(step, member, member_start)

    def _estimate(self, step: int, member: int, member_start: int) -> None:
        if self._progress and step:
            left = cost_done(step, member, member_start) * (1 - self._progress) / self._progress
            total = steps_at_cost(left, step, member, self._models)
            self.total_steps = max(step, min(self._max_steps, round(total)))

    def _evaluations_left(self, step: int, member: int) -> int:
        """Number of evaluations before the final one, including one that is due at this step, and those of teachers."""
        regular = (self.total_steps - 1) // self._eval_every - max(0, step - 1) // self._eval_every
        return max(0, regular) + self._models - 1 - member


def forecast(progress: float, val_loss: float) -> tuple[float, float]:
    """The validation loss to expect at the end of a run under train.minutes and its error, in the unit of `val_loss`.

    progress: of the run when `val_loss` was measured, FORECAST_FROM to 1.
    """
    ratio, error = (first + second * progress for first, second in (FORECAST, FORECAST_ERROR))
    return ratio * val_loss, error * ratio * val_loss
