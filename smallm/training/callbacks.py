"""The first and the last words of a run."""

import json
import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from smallm.errors import UserError
from smallm.inference.scoring import perplexity
from smallm.runs.layout import METRICS
from smallm.training import finetune as learn_on
from smallm.training.analysis.advice import full_report, opening_lines
from smallm.training.analysis.baselines import (
    MAX_SHARE,
    baselines,
    in_words,
    known_baselines,
    seconds_needed,
    write_baselines,
)
from smallm.training.analysis.memorisation import copies
from smallm.training.analysis.text_statistics import examine
from smallm.training.report.record import RecordWriter, machine_facts

if TYPE_CHECKING:
    from smallm.training.trainer import Trainer

SEARCHED = 1 << 24  # ids, in which copies are looked for at the end of a training: a moment's work
LAST_SAMPLES = 3  # that are looked for


def opening(trainer: "Trainer") -> str:
    """What is about to happen: text, model, length and machine, a line each."""
    c, corpus, facts = trainer.config, trainer.corpus, trainer.state.facts
    about = "about " if c.train.minutes else ""
    return (
        f"text   {corpus.name}: {corpus.train_characters:,} characters to learn, "
        f"{corpus.val_characters:,} to validate; vocabulary of {corpus.vocabulary.size}\n"
        f"{learn_on.opening(trainer)}"
        f"model  {c.model.n_layer} layers x {c.model.n_embd}, {facts['parameters']:,} parameters, "
        f"context {c.model.block_size}, {trainer.model.flops_per_id() / 1e6:.1f} MFLOP per id\n"
        f"run    {trainer.run}: {about}{trainer.total_steps:,} steps of {trainer.characters_per_step:,.0f} characters "
        f"= {trainer.total_steps / trainer.steps_per_epoch:.1f} epochs, {c.optim.name}\n"
        f"on     {facts['processes']} process(es), each with {facts['device']}, {facts['precision']}, "
        f"{trainer.grad_accum_steps} x {trainer.micro_batch_size} sequences a step"
    )


def beginning(trainer: "Trainer") -> RecordWriter:
    """Where the run keeps what its report will say, with text and machine in it; of a new run, says the findings."""
    corpus, step, main = trainer.corpus, trainer.state.step, trainer.accelerator.is_main_process
    record = RecordWriter(trainer.run, trainer.report.say, resumed=step > 0, enabled=main)
    if not main:
        return record
    checkup = examine(corpus)
    record.update(
        state="training",
        planned_steps=trainer.total_steps,
        facts=trainer.state.facts | machine_facts(),
        train_characters=corpus.train_characters,
        val_characters=corpus.val_characters,
        findings=full_report(corpus, checkup),
    )
    if not step:
        record.update(began=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
        trainer.report.say("\n".join(opening_lines(checkup)))
    return record


def broken_off(trainer: "Trainer", number: int) -> Iterator[str]:
    """What a signal has ended, and how to go on."""
    if trainer.accelerator.is_main_process:
        yield from page_of(trainer, "interrupted")
    why = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    yield f"{why} at step {trainer.state.step:,}; go on with: python train.py --resume {trainer.run}"


def closing(trainer: "Trainer", state: str, more: Iterable[str] = ()) -> Iterator[str]:
    """How good the model is, `more`, where everything lies and what to type next; state: how the run ended."""
    best = trainer.state.best_val_loss
    yield (
        f"best validation loss {best:.4f} nats per character ({best / math.log(2):.3f} bits, perplexity "
        f"{perplexity(best):.2f}) at step {trainer.state.best_step:,}{_plot(trainer)}"
    )
    yield from more
    yield from comparison(trainer)
    yield from copied(trainer)
    yield from page_of(trainer, state)
    yield f"next: python export.py {trainer.run}"


def comparison(trainer: "Trainer") -> Iterator[str]:
    """The yardsticks beside the model, in words and in the run folder.

    The model is saved by then, so measuring them, once for a text, keeps no step waiting. Under `--minutes` there is
    time kept for it; if that would be too much of it, only those are said that are known.
    """
    corpus, promised = trainer.corpus, 60 * trainer.config.train.minutes
    too_long = 0 < MAX_SHARE * promised < seconds_needed(corpus)
    try:
        measured = known_baselines(corpus) if too_long else baselines(corpus)
    except KeyboardInterrupt:  # of someone who will not wait; the run is finished
        measured = None
    if measured is None:
        yield "for yardsticks (gzip, bz2, xz, n-grams) beside it: python train.py --check TEXT"
        return
    bits = trainer.state.best_val_loss / math.log(2)
    try:
        write_baselines(trainer.run, measured, bits, trainer.corpus.val_characters)
    except OSError as error:
        trainer.report.say(f"warning: cannot write the baselines into {trainer.run} ({error.strerror})")
    yield in_words(measured, bits)


def copied(trainer: "Trainer") -> Iterator[str]:
    """One line if the last samples are copies; a text too long to be known by heart is not searched."""
    if len(trainer.corpus.train_ids) > SEARCHED:
        return
    with suppress(OSError, ValueError, KeyError):
        lines = (trainer.run / METRICS).read_bytes().splitlines()
        samples = [values["sample"] for values in map(json.loads, lines) if values["kind"] == "eval"][-LAST_SAMPLES:]
        report = copies([sample for sample in samples if sample], trainer.corpus)
        trainer.record.update(memorisation=report.rows())
        if report.is_remarkable:
            yield f"its samples are copies: {report.lines()[0]}; more text, --model.dropout 0.2 or fewer steps help"


def page_of(trainer: "Trainer", state: str) -> Iterator[str]:
    """Writes the report, and says where it is; one that cannot be written spoils no run."""
    from smallm.training.report.run_page import write_report

    trainer.record.update(state=state, planned_steps=trainer.total_steps)
    try:
        yield f"report: {write_report(trainer.run)}"
    except UserError as error:
        trainer.report.say(f"warning: no report: {error}")


def _plot(trainer: "Trainer") -> str:
    """Draws the curves, and says how long all took; a picture that cannot be drawn spoils no finished run.

    With one evaluation there is no curve to see, and drawing would take a tenth of so short a run.
    """
    picture = ""
    if trainer.state.step > trainer.eval_every:
        from smallm.training.report.plot import plot_runs

        try:
            picture = f"; curves in {plot_runs([trainer.run], trainer.run / 'loss.png')}"
        except UserError as error:
            trainer.report.say(f"warning: {error}")
    return f", {trainer.meter.seconds:.0f} s{picture}"
