"""The training loop: the same for a CPU, one GPU and several processes, through Accelerate."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import get_total_norm

from smallm.errors import UserError
from smallm.training.budget.clock import Clock, StepBudget, TimeBudget
from smallm.training.callbacks import Callback, Evaluation, RunSnapshot, default_callbacks
from smallm.training.checkpoint import format as checkpoint
from smallm.training.checkpoint import manager
from smallm.training.checkpoint.format import TrainingState
from smallm.training.config import Config
from smallm.training.data.batch_loader import BatchLoader
from smallm.training.data.corpus import Corpus
from smallm.training.data.dataset import CharDataset, WeightedDataset
from smallm.training.devices import environment_facts, prepare
from smallm.training.distributed import broadcast_from_main, full_tensor, sum_over_processes
from smallm.training.ensemble import Ensemble
from smallm.training.evaluate import evaluate
from smallm.training.logger import Logger, Meter
from smallm.training.model.compilation import compile_model, should_compile
from smallm.training.model.operations import cross_entropy
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.guard import StepGuard
from smallm.training.optim.optimizers import build_optimizer, set_learning_rate
from smallm.training.optim.schedule import learning_rate_factor, total_steps, window_length
from smallm.training.signals import SignalGuard
from smallm.training.step_plan import StepPlan


class Trainer:
    """A run: model, optimiser, batches and state, and the loop that moves them."""

    def __init__(
        self, accelerator: Accelerator, config: Config, corpus: Corpus, folder: Path, clock: Clock,
        planned_steps: int = 0, callbacks: Sequence[Callback] | None = None,
    ):  # fmt: skip
        """Builds a run at step 0; `resume` continues from a checkpoint instead.

        folder: of the run; planned_steps: expected length under train.minutes; callbacks: default: those of train.py.
        """
        _check_length(corpus, config.model.block_size)
        self.accelerator, self.config, self.corpus, self.folder, self.clock = accelerator, config, corpus, folder, clock
        self.callbacks = default_callbacks() if callbacks is None else callbacks
        dataset = _dataset(config, corpus)
        self.plan = StepPlan.of(config, corpus, dataset, accelerator.num_processes)
        self.budget = self._build_budget(planned_steps)
        self.ensemble = Ensemble(accelerator, config, corpus.vocabulary.size)

        self.model = TransformerLanguageModel(corpus.vocabulary.size, config.model, seed=config.train.seed)
        # `model` stays the plain module, for evaluation and checkpoints; `prepared` is only for training steps.
        optimizer = build_optimizer(self.model, config.optim, bf16=accelerator.mixed_precision == "bf16")
        self.prepared, self.optimizer = prepare(accelerator, self.model, optimizer)
        self.forward: Callable[[Tensor], Tensor] = self.prepared  # or its compiled form
        self.parameters = list(self.prepared.parameters())
        self.guard = StepGuard(accelerator, self.optimizer)
        sizes = config.train.batch_size, self.plan.micro_batch_size
        self.loader = BatchLoader(dataset, *sizes, accelerator, config.train.noise)
        self.signals = SignalGuard(accelerator)
        facts = _facts(accelerator, config, corpus, self.model)
        self.state = TrainingState(fingerprint=corpus.fingerprint, start_text=corpus.start_text, facts=facts)
        self.saved = False  # whether the newest checkpoint holds the current state

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; under train.minutes an estimate that is updated as the run goes on."""
        return self.budget.total_steps

    @property
    def member_end(self) -> int:
        """The step at which the training of the current model ends; `total_steps`, unless train.ensemble is set."""
        return self.ensemble.end(self.state, self.total_steps)

    def train(self) -> int:
        """Trains to the last step, until patience runs out, or until a signal arrives.

        Returns 0, or 128 + the number of the signal.
        """
        self._start()
        c = self.config
        with self.logger:
            with self.signals:
                if self.saved and self._is_due(self.plan.eval_every):
                    self._evaluate_and_save()  # the evaluation during which the run was interrupted
                while not (self.signals.signum or self._is_finished() or self._stopped_early()):
                    if self._is_trained():
                        self._start_next_member()
                    step = self.state.step
                    done, steps = self._member_step(step)
                    factor = learning_rate_factor(done, c.optim, steps, self.plan.steps_per_epoch)
                    set_learning_rate(self.optimizer, factor)
                    loss, norm = self.train_step(step)
                    self.state.step, self.state.val_loss, self.saved = step + 1, None, False
                    self._log(loss, norm, factor)
                    self._evaluate_and_save()
                    self.signals.poll()
                self._save()
                self.logger.close_bar()
                if self.signals.signum:
                    self._call("on_interrupt", self.signals.signum)
                    return 128 + self.signals.signum
            self._call("on_end")
        return 0

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One update on the batch of `step`: forward, backward, clip, optimise.

        Returns the mean loss of this process (nats per id) and the gradient norm before clipping.
        """
        # Kernels are queued on a GPU without waiting for their results. The host waits only for log lines, evaluations,
        # checkpoints and `SignalGuard.poll`, and under fp16 in every step (loss scaling).
        total = self._compute_gradient(step)
        norm = self._clip_gradient()
        self.guard.step(norm)
        self.optimizer.zero_grad()
        return total, norm

    def _compute_gradient(self, step: int) -> Tensor:
        """The passes of `_forward_backward`; one process that runs out of memory repeats them in smaller pieces."""
        while True:
            try:
                return self._forward_backward(step)
            except torch.OutOfMemoryError:
                if self.accelerator.num_processes > 1:  # the others already wait for this one
                    raise
            self._halve_micro_batch()

    def _forward_backward(self, step: int) -> Tensor:
        """Adds the gradient of a step to the parameters; returns the mean loss of this process (nats per id).

        The loss that is returned is that of the text, also where the model learns from teachers too.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for micro_step in range(self.plan.grad_accum_steps):
            if self.config.model.dropout:
                self.loader.seed_dropout(step, micro_step)
            done, steps = self._member_step(step)
            window = window_length(done, self.config, steps)
            ids, targets = self.loader.batch(step, micro_step, window)  # (B, T)
            last = micro_step == self.plan.grad_accum_steps - 1
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                losses = self.ensemble.loss(self.forward(ids), ids, targets)
                loss, text_loss = (loss / self.plan.grad_accum_steps for loss in losses)
                # The factor is 1, or NaN if the loss is not finite: then the gradient is NaN on all processes.
                self.accelerator.backward(loss * (1 + 0 * loss.detach()))
            total += text_loss.detach()
        return total

    def resume(self, folder: Path) -> None:
        """Continues from a checkpoint of the run. Raises `UserError` if text, vocabulary or shapes differ."""
        state, before = checkpoint.read_state(folder)
        if state.fingerprint != self.corpus.fingerprint:
            raise UserError(f"{self.corpus.name} is not the text that {self.folder} was trained on; start a new run")
        if checkpoint.load_vocabulary(folder) != self.corpus.vocabulary:
            raise UserError(f"{self.folder} has another vocabulary; do not change data.min_count or data.val_fraction")
        self.budget.resume(state, before.train)
        if self.ensemble.is_last(state) and state.step >= self.total_steps and state.val_loss is not None:
            used = f"{state.step} steps, {state.seconds / 60:.1f} minutes"
            raise UserError(f"{self.folder} is finished ({used}); train longer with {self.budget.extend_flag}")
        checkpoint.load_weights(folder, self.model)
        checkpoint.load_optimizer(folder, self.model, self.optimizer)
        self.ensemble.restore(folder, state)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.guard.restore(state.skipped_steps, state.skipped_in_a_row)
        state.facts = self.state.facts  # device and number of processes may differ from those of the checkpoint
        self.state, self.saved = state, True

    # The parts of the loop.

    def _build_budget(self, planned_steps: int) -> StepBudget:
        t, plan = self.config.train, self.plan
        if not t.minutes:
            steps = total_steps(t.max_steps, t.epochs, plan.steps_per_epoch)
            if steps < t.ensemble:
                raise UserError(f"train.ensemble = {t.ensemble} trains {t.ensemble} models, but the run has {steps} "
                                "step(s); train for longer")  # fmt: skip
            return StepBudget(steps, is_default=not (t.max_steps or t.epochs))
        # A forward pass takes a third of a step.
        steps_per_evaluation = len(self.corpus.val_ids) / (3 * t.batch_size * self.config.model.block_size)
        return TimeBudget(t.minutes, planned_steps, plan.steps_per_epoch, plan.eval_every, steps_per_evaluation,
                          self.clock.end_seconds, t.ensemble)  # fmt: skip

    def _start(self) -> None:
        """Creates the run folder, prints the summary, compiles the model and starts the clock."""
        main, s = self.accelerator.is_main_process, self.state
        if main:
            manager.write_run_files(self.folder, self.config, self.corpus.val_pieces())
        self.logger = Logger(self.folder, s.step, self.total_steps, self.accelerator.trackers, enabled=main)
        # Only a new run counts the seconds from the start of the program to here.
        self.meter = Meter(self.accelerator, (time.perf_counter() if s.step else self.clock.started) - s.seconds)
        self._call("on_start")
        self._compile()
        self._fit_micro_batch()
        self._update_budget()

    def _call(self, event: str, *arguments: object) -> None:
        """Calls a method of all callbacks with a snapshot of the run."""
        snapshot = RunSnapshot(
            self.folder, self.config, self.corpus, self.accelerator, self.model, self.logger, self.plan,
            replace(self.state), self.total_steps, self._stopped_early(), self.meter.start,
        )  # fmt: skip
        for callback in self.callbacks:
            getattr(callback, event)(snapshot, *arguments)

    def _compile(self) -> None:
        """Compiles the model, if train.compile says so or the remaining steps are worth it."""
        c, passes = self.config, (self.total_steps - self.state.step) * self.plan.grad_accum_steps
        flops = self.model.flops_per_id() * self.plan.micro_batch_size * c.model.block_size
        if should_compile(c.train.compile, self.accelerator.device, passes, flops, c.model.n_layer):
            with self.meter.paused():
                windows = (*c.train.short_windows, c.model.block_size)
                batches = [self.loader.batch(self.state.step, 0, window) for window in windows]
                self.forward = compile_model(self.prepared, self.accelerator, batches, self.logger.info)

    def _fit_micro_batch(self) -> None:
        """Of several GPUs, halves the micro-batch until a forward and a backward pass fit on all of them."""
        if self.accelerator.num_processes > 1 and self.accelerator.device.type != "cpu":
            while sum_over_processes(self.accelerator, self._runs_out_of_memory()):
                self._halve_micro_batch()

    def _runs_out_of_memory(self) -> bool:
        """Whether one forward and backward pass, beside the optimiser's moments, does not fit on this process."""
        try:
            moments = [torch.empty_like(p) for p in self.parameters for _ in range(2)]
            ids, targets = self.loader.batch(self.state.step, 0, self.config.model.block_size)
            with self.accelerator.no_sync(self.prepared):
                self.accelerator.backward(cross_entropy(self.forward(ids), targets))
            del moments
        except torch.OutOfMemoryError:
            return True
        finally:
            self.optimizer.zero_grad()
        return False

    def _halve_micro_batch(self) -> None:
        """Divides the same batch into smaller micro-batches, which need less memory."""
        micro, accum = self.plan.micro_batch_size, self.plan.grad_accum_steps
        if micro == 1:
            raise UserError("one sequence does not fit into the memory of the device; use a smaller model.n_layer, "
                            "model.n_embd or model.block_size")  # fmt: skip
        smaller = next(size for size in range(micro // 2, 0, -1) if micro % size == 0)
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        self.plan = replace(self.plan, micro_batch_size=smaller, grad_accum_steps=accum * micro // smaller)
        self.loader.micro_batch_size = smaller
        self.logger.warning(f"out of memory with {micro} sequences a pass; a step of the same batch is now "
                            f"{self.plan.grad_accum_steps} passes of {smaller}")  # fmt: skip

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step >= self.member_end

    def _stopped_early(self) -> bool:
        return self._out_of_patience() and self.ensemble.is_last(self.state)

    def _out_of_patience(self) -> bool:
        return 0 < self.config.train.patience <= self.state.evaluations_since_best

    def _is_finished(self) -> bool:
        """Whether the last step is done; the time of an ensemble may be up before its last model has begun."""
        return self.ensemble.is_last(self.state) and self.state.step >= self.member_end

    def _is_trained(self) -> bool:
        """Whether it is the turn of the next model of an ensemble."""
        ended = self.state.step >= self.member_end or self._out_of_patience()
        return ended and not self.ensemble.is_last(self.state)

    def _start_next_member(self) -> None:
        with self.meter.paused():
            self.ensemble.start_next(self.model, self.optimizer, self.state)
            self._call("on_member")

    def _member_step(self, step: int) -> tuple[int, int]:
        """The step (0-based) within the training of the current model, and the number of its steps."""
        return step - self.state.member_start, self.member_end - self.state.member_start

    def _update_budget(self) -> None:
        """Under train.minutes: updates the estimate of `total_steps`, by the clock of the main process."""
        if self.config.train.minutes:
            s = self.state
            seconds, paused = broadcast_from_main(self.accelerator, self.meter.seconds, self.meter.paused_seconds)
            self.budget.update(s.step, seconds, paused, s.member, s.member_start)

    def _clip_gradient(self) -> Tensor:
        """Clips the gradient to optim.grad_clip, if that is set; returns its norm before, without fp16's loss scale."""
        if max_norm := self.config.optim.grad_clip:
            return full_tensor(self.accelerator.clip_grad_norm_(self.parameters, max_norm))
        self.accelerator.unscale_gradients()
        return full_tensor(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def _log(self, loss: Tensor, norm: Tensor, factor: float) -> None:
        """Moves the bar; every train.log_every steps, reports the mean loss since the last time."""
        self.meter.add(loss)
        self.logger.advance(self.state.step, self.total_steps)
        if not self._is_due(self.config.train.log_every):
            return
        mean, steps_per_second = self.meter.read()
        self._check_skipped_steps()
        self._update_budget()
        self._call("on_log", {
            "step": self.state.step, "epoch": self.state.step / self.plan.steps_per_epoch,
            "loss": mean * self.plan.ids_per_character, "learning_rate": factor * self.config.optim.learning_rate,
            "grad_norm": float(norm), "skipped_steps": self.state.skipped_steps, "seconds": self.meter.seconds,
            "characters_per_second": steps_per_second * self.plan.characters_per_step,
        })  # fmt: skip

    def _check_skipped_steps(self) -> None:
        """Warns of steps skipped since the last check. Raises `UserError` after too many in a row."""
        s, before = self.state, self.state.skipped_steps
        s.skipped_steps, s.skipped_in_a_row = self.guard.counts
        self.guard.check(s.step, self.folder)
        skipped = s.skipped_steps - before
        if skipped and self.accelerator.scaler is None:  # under fp16, skipping is how the loss scale is found
            self.logger.warning(f"{skipped} step(s) to step {s.step} had no finite gradient and were left out")

    def _evaluate_and_save(self) -> None:
        """Evaluates and saves a checkpoint, each if it is due."""
        if self._is_due(self.plan.eval_every) and self.state.val_loss is None:
            self._evaluate()
        if self._is_due(self.plan.save_every) or self.state.best_step == self.state.step:
            self._save()

    def _evaluate(self) -> None:
        """Measures the loss on the whole validation text; a signal interrupts that and leaves `val_loss` None."""
        s, c = self.state, self.corpus
        with self.meter.paused():
            self.signals.restart()
            loss = evaluate(self.accelerator, self.model, c.val_ids, c.val_characters, self.config.model.block_size,
                            interrupted=self.signals.poll)  # fmt: skip
            self.signals.restart()
            if loss is None:
                return
            if not math.isfinite(loss):
                raise UserError(f"the validation loss is {loss} at step {s.step}; lower optim.learning_rate")
            s.val_loss, self.saved = loss, False
            improved = s.best_val_loss is None or loss < s.best_val_loss
            if improved:
                s.best_val_loss, s.best_step, s.evaluations_since_best = loss, s.step, 0
            else:
                s.evaluations_since_best += 1
            train_loss = self.meter.since_evaluation()
            if train_loss is not None:
                train_loss *= self.plan.ids_per_character
            self._call("on_evaluation", Evaluation(loss, train_loss, improved))

    def _save(self) -> None:
        """Saves a checkpoint of this step, unless there is one; the main process writes, the others wait."""
        if self.saved:
            return
        s = self.state
        with self.meter.paused():
            tensors = checkpoint.gather_tensors(self.model, self.optimizer)
            s.skipped_steps, s.skipped_in_a_row = self.guard.counts
            if self.accelerator.is_main_process:
                s.seconds, s.planned_steps = self.meter.seconds, self.total_steps
                s.scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
                checkpoint.save_checkpoint(self.folder, s, self.config, tensors, self.corpus.vocabulary,
                                           self.ensemble.tensors())  # fmt: skip
                manager.prune(self.folder, s.best_step, self.config.train.keep_last)
            self.accelerator.wait_for_everyone()
        self.saved = True


def _dataset(config: Config, corpus: Corpus) -> CharDataset:
    block_size, seed, weights = config.model.block_size, config.train.seed, config.data.weights
    if not weights:
        return CharDataset(corpus.train_ids, block_size, seed)
    return WeightedDataset(corpus.train_ids, block_size, seed, corpus.train_ends, weights)


def _check_length(corpus: Corpus, block_size: int) -> None:
    lengths = [b - a for a, b in pairwise((0, *corpus.train_ends))] or [len(corpus.train_ids)]
    if min(lengths) <= block_size:
        raise UserError(
            f"the training part of {corpus.name} has {corpus.train_characters:,} characters, too few for "
            f"model.block_size = {block_size}; use a longer text or a smaller block_size"
        )


def _facts(
    accelerator: Accelerator, config: Config, corpus: Corpus, model: TransformerLanguageModel
) -> dict[str, str | int]:
    """Text, size, device and versions: what the reader of a checkpoint or an export may want to know."""
    characters = corpus.train_characters + corpus.val_characters
    facts: dict[str, str | int] = {"text": corpus.name, "characters": characters, "parameters": model.parameter_count()}
    facts |= environment_facts(accelerator)
    if config.train.init_from:
        facts["init_from"] = manager.model_name(Path(config.train.init_from))
    return facts
