"""The training loop: the same for a CPU, one GPU and several processes, through Accelerate."""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import get_total_norm

from smallm.errors import UserError
from smallm.inference.scoring import perplexity
from smallm.runs.layout import METRICS
from smallm.training.budget.clock import Clock, Forecast, build_budget
from smallm.training.budget.configure import bz2_nats_per_character
from smallm.training.callbacks import beginning, broken_off, closing, opening
from smallm.training.checkpoint import format as checkpoint
from smallm.training.checkpoint import manager
from smallm.training.checkpoint.format import TrainingState, TrainingTensors
from smallm.training.config import Config
from smallm.training.data.batch_loader import BatchLoader
from smallm.training.data.corpus import Corpus
from smallm.training.data.dataset import CharDataset
from smallm.training.devices import machine, prepare, warnings
from smallm.training.distributed import broadcast_from_main, full_tensor
from smallm.training.evaluate import a_sample, evaluate
from smallm.training.finetune import measure_forgetting, name_of
from smallm.training.logger import Report
from smallm.training.meter import Meter
from smallm.training.model.compilation import compile_model, should_compile
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.guard import StepGuard
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate
from smallm.training.optim.schedule import divide_batch, learning_rate_factor, window_length
from smallm.training.report.passage import read_passage
from smallm.training.signals import Interrupt


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
        self.budget = build_budget(
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
        self.parameters = list(self.prepared.parameters())
        self.guard = StepGuard(accelerator, self.optimizer)
        self.feed = BatchLoader(dataset, c.batch_size, self.micro_batch_size, accelerator)
        characters = corpus.train_characters + corpus.val_characters
        facts = {"text": corpus.name, "characters": characters, "parameters": self.model.parameter_count()}
        facts |= machine(accelerator)
        if c.init_from:
            facts["init_from"] = name_of(Path(c.init_from))
        self.state = TrainingState(fingerprint=corpus.fingerprint, start_text=corpus.start_text, facts=facts)
        self.saved = False  # whether the newest checkpoint is of this very state

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, under train.minutes as far as it is known by now."""
        return self.budget.total_steps

    @property
    def _share(self) -> float:
        return self.state.step / self.total_steps

    def train(self) -> int:
        """Runs to the end, to loss of patience or to a signal; returns 0, or 128 + the number of the signal."""
        self._open()
        self._compile()
        self._update_budget()
        with self.report, Interrupt() as self.interrupt:
            # Who was interrupted in an evaluation begins with it.
            number = self._take_stock() if self.saved and self._due(self.eval_every) else 0
            while not number and (step := self.state.step) < self.total_steps and not self._out_of_patience():
                factor = learning_rate_factor(step, self.config.optim, self.total_steps, self.steps_per_epoch)
                set_learning_rate(self.optimizer, factor)
                loss, norm = self.train_step(step)
                self.state.step, self.state.val_loss, self.saved = step + 1, None, False
                self._log(loss, norm, factor)
                number = self._take_stock()
            if not number:
                self._save()
                old_text = measure_forgetting(self)
        return self._break_off(number) if number else self._finish(old_text)

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One update on the batch of `step`: forward, backward, clip, optimise.

        Returns this process's mean loss (nats per id) and the gradient norm before clipping.
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
                # Times 1; but an infinite loss makes a gradient of NaN, on this process and with it on all others.
                self.accelerator.backward(loss * (1 + 0 * loss.detach()))
            total += loss.detach()
        norm = self._clip()
        self.guard.step(norm)
        self.optimizer.zero_grad()
        return total, norm

    def resume(self, folder: Path) -> None:
        """Goes back to a checkpoint of the run."""
        state, before = checkpoint.read_state(folder)
        if state.fingerprint != self.corpus.fingerprint:
            raise UserError(f"{self.corpus.name} is not the text that {self.run} was trained on; start a new run")
        if checkpoint.load_vocabulary(folder) != self.corpus.vocabulary:
            raise UserError(f"{self.run} has another vocabulary; keep data.min_count and data.val_fraction as before")
        self.budget.resume(state, before.train)
        if state.step >= self.total_steps and state.val_loss is not None:
            raise UserError(f"{self.run} is finished ({state.step} steps); train longer with {self.budget.extend_flag}")
        checkpoint.load_weights(folder, self.model)
        checkpoint.load_optimizer(folder, self.model, self.optimizer)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.guard.restore(state.skipped_steps, state.skipped_in_a_row)
        state.facts = self.state.facts  # device and processes may be others today
        self.state, self.saved = state, True

    # What the loop is made of.

    def _open(self) -> None:
        """Makes the run folder and says what is about to happen."""
        main = self.accelerator.is_main_process
        if main:
            manager.write_run_files(self.run, self.config, self.corpus.val_pieces())
        self.report = Report(self.run / METRICS, self.state, self.total_steps, main, self.accelerator.trackers)
        started = time.perf_counter() if self.state.step else self.clock.started  # a start is paid for once
        self.meter = Meter(self.accelerator, self.state.seconds, started)
        timed = self.config.train.minutes
        self.forecast = Forecast(self._share, bz2_nats_per_character(self.corpus)) if timed else None
        for line in warnings(self.accelerator):
            self.report.say(line)
        self.report.say(opening(self))
        self.record = beginning(self)
        if self.state.step:
            self.report.say(f"going on from step {self.state.step:,}")

    def _compile(self) -> None:
        """Compiles the model for the steps to come, if that is wanted."""
        c, passes = self.config, (self.total_steps - self.state.step) * self.grad_accum_steps
        flops = self.model.flops_per_id() * self.micro_batch_size * c.model.block_size
        if should_compile(c.train.compile, self.accelerator.device, passes, flops, c.model.n_layer):
            with self.meter.paused():
                batches = [self.feed.batch(self.state.step, 0, T) for T in (*c.train.short_windows, c.model.block_size)]
                self.forward = compile_model(self.prepared, self.accelerator, batches, self.report.say)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step >= self.total_steps

    def _update_budget(self) -> None:
        """A run by the clock goes by that of the first process."""
        if self.config.train.minutes:
            clock = broadcast_from_main(self.accelerator, self.meter.seconds, self.meter.paused_seconds)
            self.budget.update(self.state.step, *clock)

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, which is cut down to `grad_clip` if that is set."""
        if most := self.config.optim.grad_clip:
            return full_tensor(self.accelerator.clip_grad_norm_(self.parameters, most))
        return full_tensor(get_total_norm([p.grad for p in self.parameters]))

    def _log(self, loss: Tensor, norm: Tensor, factor: float) -> None:
        """Every `log_every` steps: mean loss over the steps and the processes, to the bar and to metrics.jsonl."""
        self.meter.add(loss)
        self.report.advance(self.state.step, self.total_steps)
        if not self._due(self.config.train.log_every):
            return
        mean, steps_per_second = self.meter.read()
        self._check_skipped()
        self._update_budget()
        mean *= self.ids_per_character
        if self.forecast and (line := self.forecast.update(self._share, mean)):
            self.report.say(line)
        self.report.train(
            step=self.state.step, epoch=self.state.step / self.steps_per_epoch, loss=mean,
            learning_rate=factor * self.config.optim.learning_rate, grad_norm=float(norm),
            skipped_steps=self.state.skipped_steps, seconds=self.meter.seconds,
            characters_per_second=steps_per_second * self.characters_per_step,
        )  # fmt: skip

    def _check_skipped(self) -> None:
        """Says that steps were left out; ends the run if there were too many in a row."""
        s, before = self.state, self.state.skipped_steps
        s.skipped_steps, s.skipped_in_a_row = self.guard.check(s.step, self.run)
        if s.skipped_steps > before and self.accelerator.scaler is None:  # under fp16 that is how the scale is found
            self.report.say(f"warning: {s.skipped_steps - before} step(s) to step {s.step} had no finite gradient and "
                            "were left out")  # fmt: skip

    def _take_stock(self) -> int:
        """Between two steps: the evaluation and the checkpoint that are due. Returns a signal that came, or 0."""
        number = 0
        if self._due(self.eval_every) and self.state.val_loss is None:
            number = self._evaluate()
        if self._due(self.save_every) or self.state.best_step == self.state.step:
            self._save()
        return number or self.interrupt.any_rank(self.accelerator, self.state.step)

    def _evaluate(self) -> int:
        """Loss on the whole validation text, by all processes, and a sample. Returns the signal that broke it off."""
        with self.meter.paused():
            asked = partial(self.interrupt.any_rank, self.accelerator)
            loss = evaluate(self.accelerator, self.model, self.corpus, self.config.model.block_size, asked)
            if loss is None:
                return asked()
            if not math.isfinite(loss):
                raise UserError(f"the validation loss is {loss} at step {self.state.step}; lower optim.learning_rate")
            better = self.state.best_val_loss is None or loss < self.state.best_val_loss
            if better:
                self.record.update(passage=read_passage(self.model, self.corpus, self.state.step))
            text = a_sample(self.model, self.corpus, self.config)  # by every process, for what they have to do together
        s = self.state
        s.val_loss, self.saved = loss, False
        if better:
            s.best_val_loss, s.best_step, s.evaluations_since_best = loss, s.step, 0
        else:
            s.evaluations_since_best += 1
        train_loss = self.meter.since_evaluation()
        self.report.evaluation(
            step=s.step, epoch=s.step / self.steps_per_epoch,
            train_loss=None if train_loss is None else train_loss * self.ids_per_character, val_loss=loss,
            bits_per_character=loss / math.log(2), perplexity=perplexity(loss), seconds=self.meter.seconds, sample=text,
        )  # fmt: skip
        return 0

    def _save(self) -> None:
        """A checkpoint of this step, unless it is the newest; the first process writes, the others wait."""
        if self.saved:
            return
        s = self.state
        with self.meter.paused():
            tensors = TrainingTensors.gather(self.model, self.optimizer)
            s.skipped_steps, s.skipped_in_a_row = self.guard.counts
            if self.accelerator.is_main_process:
                s.seconds, s.planned_steps = self.meter.seconds, self.total_steps
                s.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
                checkpoint.save_checkpoint(self.run, s, self.config, tensors, self.corpus.vocabulary)
                manager.prune(self.run, s.best_step, self.config.train.keep_last)
            self.accelerator.wait_for_everyone()
        self.saved = True

    def _out_of_patience(self) -> bool:
        return 0 < self.config.train.patience <= self.state.evaluations_since_best

    def _break_off(self, number: int) -> int:
        """A signal: keeps what there is."""
        self._save()
        self.report.close()
        for line in broken_off(self, number):
            self.report.say(line)
        return 128 + number

    def _finish(self, old_text: list[str]) -> int:
        """The last words: how good it is, where everything lies and what to type next."""
        self.report.close()
        if self._out_of_patience():
            self.report.say(f"stopped: no better validation loss in {self.config.train.patience} evaluations")
        if self.accelerator.is_main_process:
            for line in closing(self, "out of patience" if self._out_of_patience() else "finished", old_text):
                print(line, flush=True)
        return 0
