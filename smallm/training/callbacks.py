"""What happens around the training loop: summaries, metrics and samples, the report, forgetting, baselines.

The trainer calls the callbacks, in their order, with a snapshot of the run; callbacks never see the trainer.
"""

import math
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from smallm.errors import UserError, command
from smallm.inference.scoring import perplexity
from smallm.runs.baselines_file import write_baselines
from smallm.runs.config_file import flatten
from smallm.runs.layout import OLD_VALIDATION, VALIDATION
from smallm.runs.metrics import read_metrics
from smallm.runs.next_commands import longer_training
from smallm.training.analysis.baselines import affordable_baselines, comparison_line
from smallm.training.analysis.memorisation import measure_memorisation
from smallm.training.analysis.text_check import report_lines, summary_lines
from smallm.training.analysis.text_statistics import compute_statistics
from smallm.training.budget.clock import FORECAST_FROM, forecast
from smallm.training.budget.planner import MAX_EPOCHS, MIN_STEPS, has_few_steps
from smallm.training.checkpoint.format import TrainingState, checkpoint_folder, load_weights
from smallm.training.checkpoint.manager import model_name
from smallm.training.config import Config
from smallm.training.data.corpus import Corpus
from smallm.training.devices import warnings
from smallm.training.evaluate import sample_text
from smallm.training.finetune import old_text_loss
from smallm.training.logger import Logger
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.schedule import member_shares
from smallm.training.report.passage import read_passage
from smallm.training.report.record import RecordWriter, machine_facts
from smallm.training.step_plan import StepPlan
from smallm.training.usage import matrix_flops, peak_memory

MAX_SEARCHED_IDS = 1 << 24  # a longer training text is not searched for copies, which would take too long
SEARCHED_SAMPLES = 3  # the last ones
EARLY = 0.9  # fraction of a time budget; a run that ends before it says why


@dataclass(frozen=True)
class RunSnapshot:
    """A run at one moment, as callbacks see it."""

    folder: Path
    config: Config
    corpus: Corpus
    accelerator: Accelerator
    model: TransformerLanguageModel
    logger: Logger
    plan: StepPlan
    state: TrainingState
    """A copy."""
    total_steps: int
    """Steps of the whole run; under train.minutes an estimate."""
    stopped_early: bool
    """Whether train.patience has run out."""
    start: float
    """`time.perf_counter()` at the start of the run, minus the seconds of its earlier parts."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, the only one that prints and writes."""
        return self.accelerator.is_main_process

    @property
    def progress(self) -> float:
        """Share of the run that is done, from 0 to 1."""
        return self.state.step / self.total_steps

    @property
    def has_few_steps(self) -> bool:
        """Whether train.minutes leaves the model so few steps that it hardly learns anything."""
        t = self.config.train
        return bool(t.minutes) and has_few_steps(self.total_steps, self.plan.steps_per_epoch, t.ensemble)

    @property
    def member(self) -> str:
        """The model that trains, such as "model 1 of 2"; empty unless train.ensemble is set."""
        size = self.config.train.ensemble
        return f"model {self.state.member + 1} of {size}" if size > 1 else ""

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run, without interruptions."""
        return time.perf_counter() - self.start


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation; losses in nats per character."""

    val_loss: float
    train_loss: float | None
    """Mean since the evaluation before; None if no step was logged since."""
    improved: bool
    """Whether `val_loss` is the lowest of the run."""


class Callback:
    """Base class: every method is called on all processes, and does nothing by default."""

    def on_start(self, run: RunSnapshot) -> None:
        """Before the first step, also of a resumed run; the progress bar is not shown yet."""

    def on_log(self, run: RunSnapshot, metrics: dict[str, Any]) -> None:
        """Every train.log_every steps, with the record for metrics.jsonl."""

    def on_evaluation(self, run: RunSnapshot, evaluation: Evaluation) -> None:
        """After every evaluation that was not interrupted."""

    def on_member(self, run: RunSnapshot) -> None:
        """Before the first step of every later model of an ensemble (train.ensemble)."""

    def on_end(self, run: RunSnapshot) -> None:
        """After the last step and its checkpoint. `KeyboardInterrupt` may be raised here: handlers are restored."""

    def on_interrupt(self, run: RunSnapshot, signum: int) -> None:
        """After a signal has ended the run and its checkpoint is saved."""


def default_callbacks() -> list[Callback]:
    """The callbacks of `train.py`, in the order of their output."""
    return [StartupSummary(), MetricsLog(), FinalSummary(), Forgetting(), BaselineComparison(), Report(), NextCommand()]


class StartupSummary(Callback):
    """Prints text, model, length of the run and device, one line each."""

    def on_start(self, run: RunSnapshot) -> None:
        c, corpus, facts, plan = run.config, run.corpus, run.state.facts, run.plan
        for line in warnings(run.accelerator):
            run.logger.warning(line)
        about = "about " if c.train.minutes else ""
        run.logger.info(
            f"text   {corpus.name}: {corpus.train_characters:,} characters to learn, "
            f"{corpus.val_characters:,} to validate; vocabulary of {corpus.vocabulary.size}\n"
            f"{self._origin(run)}"
            f"model  {c.model.n_layer} layers x {c.model.n_embd}, {facts['parameters']:,} parameters, "
            f"context {c.model.block_size}, {run.model.flops_per_id() / 1e6:.1f} MFLOP per id\n"
            f"run    {run.folder}: {about}{run.total_steps:,} steps of {plan.characters_per_step:,.0f} characters "
            f"= {run.total_steps / plan.steps_per_epoch:.1f} epochs, {c.optim.name}\n"
            f"{self._models(run)}"
            f"on     {facts['processes']} process(es), each with {facts['device']}, {facts['precision']}, "
            f"{plan.grad_accum_steps} x {plan.micro_batch_size} sequences a step"
        )

    def on_member(self, run: RunSnapshot) -> None:
        teachers = "the one before" if run.state.member == 1 else f"the {run.state.member} before"
        run.logger.info(f"step {run.state.step:,}: {run.member} learns from the text and from {teachers}")

    def _models(self, run: RunSnapshot) -> str:
        """The line about train.ensemble."""
        if not run.member:
            return ""
        size = run.config.train.ensemble
        share = 200 / (size + 1)
        return f"models {size}, one after another; the last, with {share:.0f} % of the steps, is the result\n"

    def _origin(self, run: RunSnapshot) -> str:
        """The line about train.init_from."""
        if not run.config.train.init_from:
            return ""
        new, old_loss = run.corpus.vocabulary.size - run.state.base_vocab_size, run.state.old_text_loss
        loss = "" if old_loss is None else f"; {old_loss:.4f} nats per character on its own text"
        return f"init   {run.config.train.init_from}: {new:,} ids are new{loss}\n"


class MetricsLog(Callback):
    """Writes metrics.jsonl, shows loss, speed, MFU and memory beside the bar, prints evaluations with a sample.

    Under train.minutes, each evaluation also says which loss to expect at the end.
    """

    def __init__(self) -> None:
        self._peak_flops: float | None = None

    def on_start(self, run: RunSnapshot) -> None:
        if run.is_main:
            self._peak_flops = matrix_flops(run.accelerator.device, run.accelerator.mixed_precision)

    def on_log(self, run: RunSnapshot, metrics: dict[str, Any]) -> None:
        speed, memory = metrics["characters_per_second"], peak_memory(run.accelerator.device)
        flops = speed * run.plan.ids_per_character * run.model.flops_per_id() / run.accelerator.num_processes
        mfu = flops / self._peak_flops if self._peak_flops else None
        shown = [run.member] if run.member else []
        shown += [f"loss {metrics['loss']:.3f}", f"{speed:,.0f} chars/s"]
        shown += [f"MFU {100 * mfu:.0f} %"] if mfu is not None else []
        shown += [f"{memory / 1e9:.2g} GB"] if memory is not None else []
        run.logger.show(", ".join(shown))
        run.logger.write("train", metrics | {"mfu": mfu, "memory_bytes": memory} | self._member(run))

    def on_evaluation(self, run: RunSnapshot, evaluation: Evaluation) -> None:
        sample, step, epoch = self._sample(run), run.state.step, run.state.step / run.plan.steps_per_epoch
        loss, train_loss, bits = evaluation.val_loss, evaluation.train_loss, evaluation.val_loss / math.log(2)
        train = "" if train_loss is None else f", train {train_loss:.4f}"
        at = f"epoch {epoch:.2f}, {run.member}" if run.member else f"epoch {epoch:.2f}"
        run.logger.info(
            f"step {step:,} ({at}): validation {loss:.4f} nats per character = {bits:.3f} bits{train}"
            f"{expected_end(run, loss)}"
        )
        if sample:
            run.logger.info("    " + sample.strip("\n").replace("\n", "\n    "))
        run.logger.write("eval", {
            "step": step, "epoch": epoch, "train_loss": train_loss, "val_loss": loss, "bits_per_character": bits,
            "perplexity": perplexity(loss), "seconds": run.seconds, "sample": sample, **self._member(run),
        })  # fmt: skip

    def _member(self, run: RunSnapshot) -> dict[str, int]:
        """For the records of an ensemble: the number of the model, from 1."""
        return {"member": run.state.member + 1} if run.member else {}

    def _sample(self, run: RunSnapshot) -> str:
        """Seed text and continuation by the settings of the run; computed by all processes (FSDP)."""
        c, vocabulary = run.config, run.corpus.vocabulary
        ids = vocabulary.encode(c.sample.seed or run.corpus.start_text).tolist()
        length, block_size = c.train.sample_length, c.model.block_size
        return c.sample.seed + sample_text(run.model, vocabulary, ids, length, block_size, c.sample.sampling)


def expected_end(run: RunSnapshot, loss: float) -> str:
    """For a validation loss under train.minutes: the loss to expect at the end of the run; otherwise empty."""
    # The forecast is fitted to single models that start with random weights and learn something.
    t = run.config.train
    fits = t.minutes and not t.init_from and not run.member and not run.has_few_steps
    if not fits or not FORECAST_FROM <= run.progress < 1:
        return ""
    end, error = forecast(run.progress, loss)
    return f"; expect about {end:.2f} nats at the end, give or take {error:.2f}"


class FinalSummary(Callback):
    """Prints the best validation loss and the duration; draws the loss curves."""

    def on_end(self, run: RunSnapshot) -> None:
        if not run.is_main:
            return
        if run.stopped_early:
            count = run.config.train.patience
            run.logger.info(f"stopped: no better validation loss in {count} evaluation{'s' if count > 1 else ''}")
        elif self._has_read_enough(run):
            run.logger.info(f"ended before its time: the text was read {MAX_EPOCHS} times, and more would not help")
        best, curves = run.state.best_val_loss, self._plot(run)
        assert best is not None  # the last step is always evaluated
        run.logger.result(
            f"best validation loss {best:.4f} nats per character ({best / math.log(2):.3f} bits, perplexity "
            f"{perplexity(best):.2f}) at step {run.state.best_step:,}, {run.seconds:.0f} s{curves}"
        )

    def _has_read_enough(self, run: RunSnapshot) -> bool:
        early = run.seconds < EARLY * 60 * run.config.train.minutes  # never without a time budget
        return early and run.state.step >= int(MAX_EPOCHS * run.plan.steps_per_epoch)

    def _plot(self, run: RunSnapshot) -> str:
        """Draws the curves, which a single evaluation does not have. A run does not fail if its plot fails."""
        if run.state.step <= run.plan.eval_every:
            return ""
        from smallm.training.report.plot import plot_runs

        try:
            return f"; curves in {plot_runs([run.folder], run.folder / 'loss.png')}"
        except UserError as error:
            run.logger.warning(str(error))
            return ""


class Forgetting(Callback):
    """After fine-tuning (train.init_from): measures how the best checkpoint's loss on the old text has changed."""

    def on_end(self, run: RunSnapshot) -> None:
        if not run.config.train.init_from:
            return
        state, name = run.state, model_name(Path(run.config.train.init_from))
        before = state.old_text_loss
        if before is None or not (run.folder / OLD_VALIDATION).is_file():
            run.logger.result(f"forgetting was not measured: the old text of {name} ({VALIDATION}) is missing")
            return
        try:
            after, characters = self._measure(run)
        except KeyboardInterrupt:  # the run is finished; only this figure is missing
            run.logger.result("forgetting was not measured: interrupted")
            return
        record = {"step": state.best_step, "name": name, "characters": characters, "before": before, "after": after}
        run.logger.write("old_text", record)
        run.logger.result(
            f"loss on the old text of {name}: {before:.4f} nats per character before, {after:.4f} after "
            f"({after - before:+.4f}), over {characters:,} characters"
        )

    def _measure(self, run: RunSnapshot) -> tuple[float, int]:
        """Loads the best weights into the model of the run, which no longer trains; called by all processes."""
        if run.state.best_step != run.state.step:
            load_weights(checkpoint_folder(run.folder, run.state.best_step), run.model)
        return old_text_loss(run.accelerator, run.model, run.corpus.vocabulary, run.folder)


class BaselineComparison(Callback):
    """Compares the model with compressors and n-gram models, on the terminal and in the run folder."""

    def on_end(self, run: RunSnapshot) -> None:
        if not run.is_main:
            return
        try:
            measured = affordable_baselines(run.corpus, 60 * run.config.train.minutes)
        except KeyboardInterrupt:  # the run is finished; only the comparison is missing
            measured = None
        if measured is None:
            check = command("train", "--check", "TEXT")
            run.logger.result(f"to compare with baselines (gzip, bz2, xz, n-grams): {check}")
            return
        assert run.state.best_val_loss is not None  # the last step was evaluated
        bits = run.state.best_val_loss / math.log(2)
        try:
            write_baselines(run.folder, measured, bits, run.corpus.val_characters)
        except OSError as error:
            run.logger.warning(f"cannot write the baselines into {run.folder} ({error.strerror})")
        run.logger.result(comparison_line(measured, bits))
        config = run.config
        longer = longer_training(flatten(config.to_dict()), config.changed(), run.seconds)
        run.logger.result(f"a better model takes more time: {longer}")


class Report(Callback):
    """Prints the text check, stores what belongs into report.json, looks for copied text, and writes the report page.

    A run does not fail if its report fails.
    """

    def on_start(self, run: RunSnapshot) -> None:
        resumed, corpus = run.state.step > 0, run.corpus
        self._record = RecordWriter(run.folder, run.logger.info, resumed=resumed, enabled=run.is_main)
        began = {} if resumed else {"began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        self._record.update(
            state="training", planned_steps=run.total_steps, facts=run.state.facts | machine_facts(),
            train_characters=corpus.train_characters, val_characters=corpus.val_characters, **began,
        )  # fmt: skip
        if run.is_main:
            statistics = compute_statistics(corpus)
            self._record.update(findings=report_lines(corpus, statistics))
            if not resumed:
                run.logger.info("\n".join(summary_lines(statistics, corpus.split)))

    def on_evaluation(self, run: RunSnapshot, evaluation: Evaluation) -> None:
        if evaluation.improved:
            self._record.update(passage=read_passage(run.model, run.corpus, run.state.step))

    def on_end(self, run: RunSnapshot) -> None:
        if not run.is_main:
            return
        with suppress(OSError, ValueError, KeyError):
            self._look_for_copies(run)
        if path := self._write(run, "out of patience" if run.stopped_early else "finished"):
            run.logger.result(f"report: {path}")

    def on_interrupt(self, run: RunSnapshot, signum: int) -> None:
        if run.is_main and (path := self._write(run, "interrupted")):
            run.logger.info(f"report: {path}")

    def _look_for_copies(self, run: RunSnapshot) -> None:
        """Searches the training text for the last samples; prints a line if the model copies."""
        if len(run.corpus.train_ids) > MAX_SEARCHED_IDS:
            return
        samples = [record["sample"] for record in read_metrics(run.folder) if record["kind"] == "eval"]
        training = run.corpus.vocabulary.decode(run.corpus.train_ids[:])
        report = measure_memorisation([s for s in samples[-SEARCHED_SAMPLES:] if s], training, run.corpus.val_text())
        self._record.update(memorisation=report.rows())
        if report.is_remarkable:
            run.logger.result(
                "the samples repeat the training text: longest passage copied from the training text: "
                f"{report.generated.length} (validation text: {report.validation.length}); more text, "
                "--model.dropout 0.2 or fewer steps help"
            )

    def _write(self, run: RunSnapshot, state: str) -> Path | None:
        from smallm.training.report.pages import write_report

        self._record.update(state=state, planned_steps=run.total_steps)
        try:
            return write_report([run.folder])
        except UserError as error:
            run.logger.warning(f"no report: {error}")
            return None


class NextCommand(Callback):
    """Prints where a resumed run starts, and at the end the command to type next."""

    def on_start(self, run: RunSnapshot) -> None:
        if not run.state.step:
            return  # the plan of a new run has warned
        run.logger.info(f"going on from step {run.state.step:,}")
        if run.has_few_steps:
            steps = round(run.total_steps * member_shares(run.config.train.ensemble)[-1])
            minutes = f"{math.ceil(10 * run.config.train.minutes * MIN_STEPS / max(1, steps)) / 10:g}"
            again = command("train", "--resume", run.folder, "--minutes", minutes)
            run.logger.warning(f"minutes = {run.config.train.minutes:g} leaves the model about {steps} steps in all, "
                               f"in which it hardly learns anything; train longer with: {again}")  # fmt: skip

    def on_end(self, run: RunSnapshot) -> None:
        run.logger.result(f"next: {command('export', run.folder)}")

    def on_interrupt(self, run: RunSnapshot, signum: int) -> None:
        why = "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"
        run.logger.info(f"{why} at step {run.state.step:,}; go on with: {command('train', '--resume', run.folder)}")
