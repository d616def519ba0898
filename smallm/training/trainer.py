"""The training loop: the same for a CPU, one GPU and several processes, through Accelerate."""

import math
import time
from collections.abc import Set
from contextlib import nullcontext
from pathlib import Path

import tomli_w
import torch
from accelerate import Accelerator
from torch import Tensor

from smallm.errors import UserError
from smallm.runs import METRICS, VALIDATION
from smallm.scoring import perplexity
from smallm.training import checkpoint
from smallm.training.budget import compressed, open_text, plan_run
from smallm.training.checkpoint import TrainingState
from smallm.training.compilation import compiled, is_wanted
from smallm.training.config import Config
from smallm.training.corpus import Corpus
from smallm.training.dataset import CharDataset
from smallm.training.devices import build_accelerator, machine, of_first, prepare, warnings
from smallm.training.evaluate import evaluate, write_sample
from smallm.training.feed import Feed
from smallm.training.functions import cross_entropy
from smallm.training.interrupt import Interrupt
from smallm.training.meter import Meter
from smallm.training.model import TransformerLanguageModel
from smallm.training.optim import build_optimizer, set_lr
from smallm.training.pace import Clock, Forecast, pace_of
from smallm.training.report import Report
from smallm.training.schedule import divide_batch, lr_factor, window_length
from smallm.training.words import closing, opening

INTERRUPTED = 130  # exit code after Ctrl-C, as shells know it


def train(
    config: Config, out: Path, resume: bool = False, explicit: Set[str] = frozenset(), started: float | None = None
) -> int:
    """Trains by `config` into the run folder `out`, and returns the exit code. Raises `UserError`.

    explicit: settings, as `section.field`, that `train.minutes` must not choose; started: time.perf_counter() as the
    program began, by default now.
    """
    clock, planned_steps = Clock.after_imports(time.perf_counter() if started is None else started), 0
    accelerator = build_accelerator(config.train)
    corpus = open_text(accelerator, config.data)
    try:
        if config.train.minutes and not resume:
            config, corpus, planned_steps = plan_run(accelerator, config, corpus, explicit, clock)
        trainer = Trainer(accelerator, config, corpus, out, clock, planned_steps)
        if resume:
            trainer.resume()
        return 0 if trainer.train() else INTERRUPTED
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; its checkpoints are whole, go on with --resume {out}"
        ) from None
    finally:
        accelerator.end_training()


class Trainer:
    """A run: model, optimiser, text and where training stands."""

    def __init__(
        self, accelerator: Accelerator, config: Config, corpus: Corpus, run: Path, clock: Clock, planned_steps: int
    ):
        """planned_steps: under train.minutes, what to expect."""
        self.accelerator, self.config, self.corpus, self.run, self.clock = accelerator, config, corpus, run, clock
        c, ranks = config.train, accelerator.num_processes
        if len(corpus.train_ids) <= config.model.block_size:
            raise UserError(
                f"the training part of {corpus.name} has {corpus.train_characters:,} characters, too few for "
                f"model.block_size = {config.model.block_size}; use a longer text or a smaller block_size"
            )
        self.micro_batch_size, self.grad_accum_steps = divide_batch(c.batch_size, c.micro_batch_size, ranks)
        dataset = CharDataset(corpus.train_ids, config.model.block_size, c.seed)
        self.steps_per_epoch = len(dataset) / c.batch_size
        self.eval_every = c.eval_every or max(1, round(self.steps_per_epoch))
        self.pace = pace_of(
            config, planned_steps, self.steps_per_epoch, self.eval_every, len(corpus.val_ids), clock.end_seconds
        )
        self.save_every = c.save_every or self.eval_every
        # Losses and speeds are given per character of text, whatever the ids were.
        self.ids_per_character = len(corpus.train_ids) / corpus.train_characters
        self.characters_per_step = c.batch_size * config.model.block_size / self.ids_per_character

        self.model = TransformerLanguageModel(corpus.vocabulary.size, config.model, seed=c.seed)
        optimizer = build_optimizer(self.model, config.optim)
        # `model` stays the plain module: evaluation and checkpoints use it, only training runs the prepared one.
        self.prepared, self.optimizer = prepare(accelerator, self.model, optimizer)
        self.forward = self.prepared  # or its compiled form
        self.feed = Feed(dataset, c.batch_size, self.micro_batch_size, accelerator)
        characters = corpus.train_characters + corpus.val_characters
        facts = {"text": corpus.name, "characters": characters, "parameters": self.model.parameter_count()}
        facts |= machine(accelerator)
        self.state = TrainingState(fingerprint=corpus.fingerprint, start_text=corpus.start_text, facts=facts)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, under train.minutes as far as it is known by now."""
        return self.pace.total_steps

    @property
    def _share(self) -> float:
        return self.state.step / self.total_steps

    def train(self) -> bool:
        """Runs to the end, to loss of patience or to Ctrl-C; returns whether the run is finished."""
        self._open()
        self._compile()
        self._renew_pace()
        with self.report, Interrupt() as interrupt:
            while (step := self.state.step) < self.total_steps:
                factor = lr_factor(step, self.config.optim, self.total_steps, self.steps_per_epoch)
                set_lr(self.optimizer, factor)
                loss, norm = self.train_step(step)
                self.state.step, self.state.val_loss = step + 1, None
                self._log(loss, norm, factor)
                if self._due(self.eval_every):
                    self._evaluate()
                if self._due(self.save_every) or self.state.best_step == self.state.step:
                    self._save()
                if interrupt.anywhere(self.accelerator, self.state.step):
                    return self._break_off()
                if self._out_of_patience():
                    break
        return self._finish()

    def train_step(self, step: int) -> tuple[Tensor, Tensor | None]:
        """One update on the batch of `step`: forward, backward, clip, optimise.

        Returns this process's mean loss (nats per id) and the gradient norm before clipping, if it was measured.
        """
        # A GPU is given its work without waiting for it. The host waits only where it wants a number: at a line of
        # the log, at evaluations and checkpoints, in `Interrupt.anywhere`, and under fp16 at each step (loss scaling).
        total = torch.zeros((), device=self.accelerator.device)
        for micro_step in range(self.grad_accum_steps):
            if self.config.model.dropout:
                self.feed.seed_dropout(step, micro_step)
            ids, targets = self.feed.batch(step, micro_step, window_length(step, self.config, self.total_steps))
            last = micro_step == self.grad_accum_steps - 1
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                loss = cross_entropy(self.forward(ids), targets) / self.grad_accum_steps
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = None
        if self.config.optim.grad_clip:
            norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    def resume(self) -> None:
        """Goes back to the newest checkpoint of the run."""
        folder = checkpoint.checkpoints(self.run)[-1]
        state, before = checkpoint.read_state(folder)
        if state.fingerprint != self.corpus.fingerprint:
            raise UserError(f"{self.corpus.name} is not the text that {self.run} was trained on; start a new run")
        if checkpoint.load_vocabulary(folder) != self.corpus.vocabulary:
            raise UserError(f"{self.run} has another vocabulary; keep data.min_count and data.val_fraction as before")
        self.pace.resume(state, before.train)
        if state.step >= self.total_steps:
            raise UserError(f"{self.run} is finished ({state.step} steps); train longer with {self.pace.longer}")
        checkpoint.load_weights(folder, self.model)
        checkpoint.load_optimizer(folder, self.model, self.optimizer)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        state.facts = self.state.facts  # device and processes may be others today
        self.state = state

    # What the loop is made of.

    def _open(self) -> None:
        """Makes the run folder and says what is about to happen."""
        main = self.accelerator.is_main_process
        if main:
            try:
                self.run.mkdir(parents=True, exist_ok=True)
                (self.run / VALIDATION).write_bytes(self.corpus.val_text().encode())
                (self.run / "config.toml").write_text(tomli_w.dumps(self.config.to_dict()), encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write to {self.run}: {error.strerror}; choose another --out") from None
        self.report = Report(self.run / METRICS, self.state, self.total_steps, enabled=main)
        started = time.perf_counter() if self.state.step else self.clock.started  # a start is paid for once
        self.meter = Meter(self.accelerator, self.state.seconds, started)
        self.forecast = Forecast(self._share, compressed(self.corpus)) if self.config.train.minutes else None
        for line in warnings(self.accelerator):
            self.report.say(line)
        self.report.say(opening(self))
        if self.state.step:
            self.report.say(f"going on from step {self.state.step:,}")

    def _compile(self) -> None:
        """Compiles the model for the steps to come, if that is wanted."""
        c, passes = self.config, (self.total_steps - self.state.step) * self.grad_accum_steps
        flops = self.model.flops_per_id() * self.micro_batch_size * c.model.block_size
        if is_wanted(c.train.compile, self.accelerator.device, passes, flops, c.model.n_layer):
            with self.meter.paused():
                batches = [self.feed.batch(self.state.step, 0, T) for T in (*c.train.short_windows, c.model.block_size)]
                self.forward = compiled(self.prepared, self.accelerator, batches, self.report.say)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step >= self.total_steps

    def _renew_pace(self) -> None:
        """A run by the clock goes by that of the first process."""
        if self.config.train.minutes:
            clock = of_first(self.accelerator, self.meter.seconds, self.meter.paused_seconds)
            self.pace.renew(self.state.step, *clock)

    def _log(self, loss: Tensor, norm: Tensor | None, factor: float) -> None:
        """Every `log_every` steps: mean loss over the steps and the processes, to the bar and to metrics.jsonl."""
        self.meter.add(loss)
        self.report.advance(self.state.step, self.total_steps)
        if not self._due(self.config.train.log_every):
            return
        mean, steps_per_second = self.meter.read()
        self._check_finite(mean)
        self._renew_pace()
        if self.forecast and (line := self.forecast.after(self._share, mean * self.ids_per_character)):
            self.report.say(line)
        self.report.train(
            step=self.state.step, epoch=self.state.step / self.steps_per_epoch, loss=mean * self.ids_per_character,
            learning_rate=factor * self.config.optim.learning_rate, grad_norm=None if norm is None else float(norm),
            characters_per_second=steps_per_second * self.characters_per_step, seconds=self.meter.seconds,
        )  # fmt: skip

    def _evaluate(self) -> None:
        """Loss on the whole validation text, by all processes, and a sample by the first."""
        block_size = self.config.model.block_size
        with self.meter.paused():
            loss = evaluate(self.accelerator, self.model, self.corpus, block_size)
            self._check_finite(loss)
            text = self._sample() if self.accelerator.is_main_process else ""
        s = self.state
        s.val_loss = loss
        if s.best_val_loss is None or loss < s.best_val_loss:
            s.best_val_loss, s.best_step, s.evaluations_since_best = loss, s.step, 0
        else:
            s.evaluations_since_best += 1
        train_loss = self.meter.since_evaluation()
        self.report.evaluation(
            step=s.step, epoch=s.step / self.steps_per_epoch,
            train_loss=None if train_loss is None else train_loss * self.ids_per_character, val_loss=loss,
            bits_per_character=loss / math.log(2), perplexity=perplexity(loss), seconds=self.meter.seconds, sample=text,
        )  # fmt: skip

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.state.step}; lower optim.learning_rate or raise optim.warmup_steps, "
                f"then train anew (the checkpoints in {self.run} are from before)"
            )

    def _sample(self) -> str:
        c, start_text = self.config, self.corpus.start_text
        vocabulary, length, block_size = self.corpus.vocabulary, c.train.sample_length, c.model.block_size
        ids = vocabulary.encode(c.sample.seed or start_text).tolist()
        return c.sample.seed + write_sample(self.model, vocabulary, ids, length, block_size, c.sample.sampling)

    def _save(self) -> None:
        """A checkpoint of this step, unless there is one; the first process writes, the others wait."""
        folder = self.run / checkpoint.CHECKPOINTS / f"step-{self.state.step:06d}"
        with self.meter.paused():
            if self.accelerator.is_main_process and not (folder / checkpoint.STATE_FILE).exists():
                self.state.seconds, self.state.planned_steps = self.meter.seconds, self.total_steps
                scaler = self.accelerator.scaler
                self.state.scaler = scaler.state_dict() if scaler is not None else {}
                checkpoint.save_checkpoint(
                    self.run, self.state, self.config, self.model, self.optimizer, self.corpus.vocabulary
                )
                checkpoint.rotate(self.run, self.state.best_step, self.config.train.keep_last)
            self.accelerator.wait_for_everyone()

    def _out_of_patience(self) -> bool:
        return 0 < self.config.train.patience <= self.state.evaluations_since_best

    def _break_off(self) -> bool:
        """Ctrl-C: keeps what there is."""
        self._save()
        self.report.close()
        self.report.say(f"interrupted at step {self.state.step:,}; go on with: python train.py --resume {self.run}")
        return False

    def _finish(self) -> bool:
        """The last words: how good it is, where everything lies and what to type next."""
        self._save()
        self.report.close()
        if self._out_of_patience():
            self.report.say(f"stopped: no better validation loss in {self.config.train.patience} evaluations")
        if self.accelerator.is_main_process:
            print(closing(self))
        return True
