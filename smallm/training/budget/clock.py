"""How long a run is: so many steps, or as many as fit into its time."""

import time
from dataclasses import dataclass

from smallm.training.budget.planner import FORECAST_AT, FORECAST_FROM, MAX_EPOCHS, expected_loss
from smallm.training.checkpoint.format import TrainingState
from smallm.training.config import Config, TrainConfig
from smallm.training.optim.schedule import total_steps

CHECKPOINT_SECONDS = 0.2  # for a checkpoint, until one was measured
FIRST_BREAK = 0.1  # of all the time, that an evaluation is taken to need at most, until one was measured
BREAKS_SHARE = 0.5  # of the time left that evaluations before the last may be thought to take
END_SECONDS = 2.5  # at least, for the picture, the last words and leaving Python


@dataclass(frozen=True)
class Clock:
    """When the program began, and what to keep of its time for its end."""

    started: float
    """time.perf_counter() then."""
    end_seconds: float = END_SECONDS

    @classmethod
    def after_imports(cls, started: float) -> "Clock":
        """What was imported for the start tells how slow this machine is today: the end takes about as long."""
        return cls(started, max(END_SECONDS, time.perf_counter() - started))

    @property
    def seconds(self) -> float:
        """Since the program began."""
        return time.perf_counter() - self.started


def build_budget(
    config: Config, planned_steps: int, steps_per_epoch: float, eval_every: int, val_ids: int, end_seconds: float
) -> "StepBudget":
    """By the clock under `train.minutes`, else by steps and epochs; planned_steps: what to expect, by the clock."""
    t = config.train
    if not t.minutes:
        return StepBudget(total_steps(t.max_steps, t.epochs, steps_per_epoch))
    evaluation = val_ids / (3 * t.batch_size * config.model.block_size)  # forward is a third of a step's work
    return TimeBudget(t.minutes, planned_steps, steps_per_epoch, eval_every, evaluation, end_seconds)


class StepBudget:
    """A run of a fixed number of steps."""

    extend_flag = "--train.max_steps N"  # what makes a finished run go on

    def __init__(self, total_steps: int):
        self.total_steps = total_steps

    def resume(self, state: TrainingState, before: TrainConfig) -> None:
        """Goes on where a run stands that was begun with the settings `before`."""

    def update(self, step: int, seconds: float, paused: float) -> None:
        """Corrects the number of steps, after `step` of them."""


class TimeBudget(StepBudget):
    """A run that ends with its time: `total_steps` is an estimate until then.

    Step times double and halve on a busy machine. So not the number of steps is what is kept, but the share of the run
    that is done: between two calls it grows by what they are apart of the time that was left for steps. It never falls
    and never jumps, whatever else takes its time, and is 1 when the time is up; `total_steps` is the step over the
    share, and all that goes by `step / total_steps` goes by the clock.
    """

    extend_flag = "--minutes N"

    def __init__(
        self, minutes: float, planned_steps: int, steps_per_epoch: float, eval_every: int,
        steps_per_evaluation: float = 0.0, end_seconds: float = END_SECONDS,
    ):  # fmt: skip
        """planned_steps: the estimate until the first steps are done; eval_every: steps between evaluations;
        steps_per_evaluation: steps that take as long as one; end_seconds: to keep for what comes after the last.
        """
        self._most = max(1, int(MAX_EPOCHS * steps_per_epoch))
        super().__init__(max(1, min(planned_steps, self._most)))
        self._seconds, self._end_seconds = 60 * minutes, end_seconds
        self._eval_every, self._steps_per_evaluation = eval_every, steps_per_evaluation
        self._break: float | None = None  # seconds of the last evaluation and checkpoint
        self._share = 0.0
        self._mark: tuple[int, float, float] | None = None

    def resume(self, state: TrainingState, before: TrainConfig) -> None:
        """Goes on with the same share of the run done; if it had another length, with what its time is of this one."""
        same = 60 * before.minutes == self._seconds and state.planned_steps
        self._share = min(1.0, state.step / state.planned_steps if same else state.seconds / self._seconds)
        self._estimate(state.step)

    def update(self, step: int, seconds: float, paused: float) -> None:
        """Corrects the estimate after `step` steps; the first call only starts the clock.

        seconds: of the whole run, from the start of the program; paused: how many of them, since this part began, went
        into evaluations and checkpoints, of which there is one more to come at the end.
        """
        now = (step, seconds, paused)
        (first, before, paused_before), self._mark = self._mark or now, now
        pause = paused - paused_before
        done = seconds - before - pause
        self._break = pause or self._break
        guess = CHECKPOINT_SECONDS + self._steps_per_evaluation * done / max(1, step - first)
        each = self._break or min(guess, FIRST_BREAK * self._seconds)
        left = self._seconds - self._end_seconds - seconds - each
        left -= min(each * self._breaks_left(step), BREAKS_SHARE * max(0.0, left))
        self._share += (1 - self._share) * (done / (done + left) if left > 0 else 1.0)
        self._estimate(step)

    def _estimate(self, step: int) -> None:
        if self._share and step:
            self.total_steps = max(step, min(self._most, round(step / self._share)))

    def _breaks_left(self, step: int) -> int:
        """Evaluations to come before that at the end; one due at this very step is to come."""
        return max(0, (self.total_steps - 1) // self._eval_every - max(0, step - 1) // self._eval_every)


class Forecast:
    """After the first tenth of a run: what loss to expect at its end."""

    def __init__(self, share: float, compressed: float):
        """share: what is done already; a resumed run beyond its tenth says it no more. compressed: nats per character
        of the text under bz2.
        """
        self._compressed = compressed
        self._losses: list[float] | None = [] if share < FORECAST_AT else None

    def update(self, share: float, loss: float) -> str:
        """The line, once; else nothing. loss: mean training loss since the last call, in nats per character."""
        if self._losses is None:
            return ""
        if share >= FORECAST_FROM:
            self._losses.append(loss)
        if share < FORECAST_AT:
            return ""
        mean, self._losses = sum(self._losses) / len(self._losses), None
        final, spread = expected_loss(mean, self._compressed)
        return f"expect about {final:.2f} nats per character at the end, give or take {spread:.2f}"
