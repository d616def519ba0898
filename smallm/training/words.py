"""The first and the last words of a run."""

import math
from typing import TYPE_CHECKING

from smallm.errors import UserError
from smallm.scoring import perplexity

if TYPE_CHECKING:
    from smallm.training.trainer import Trainer


def opening(trainer: "Trainer") -> str:
    """What is about to happen: text, model, length and machine, a line each."""
    c, corpus, facts = trainer.config, trainer.corpus, trainer.state.facts
    about = "about " if c.train.minutes else ""
    return (
        f"text   {corpus.name}: {corpus.train_characters:,} characters to learn, "
        f"{corpus.val_characters:,} to validate; vocabulary of {corpus.vocabulary.size}\n"
        f"model  {c.model.n_layer} layers x {c.model.n_embd}, {facts['parameters']:,} parameters, "
        f"context {c.model.block_size}, {trainer.model.flops_per_id() / 1e6:.1f} MFLOP per id\n"
        f"run    {trainer.run}: {about}{trainer.total_steps:,} steps of {trainer.characters_per_step:,.0f} characters "
        f"= {trainer.total_steps / trainer.steps_per_epoch:.1f} epochs, {c.optim.name}\n"
        f"on     {facts['processes']} process(es), each with {facts['device']}, {facts['precision']}, "
        f"{trainer.grad_accum_steps} x {trainer.micro_batch_size} sequences a step"
    )


def closing(trainer: "Trainer") -> str:
    """How good the model is, where everything lies and what to type next."""
    best = trainer.state.best_val_loss
    return (
        f"best validation loss {best:.4f} nats per character ({best / math.log(2):.3f} bits, perplexity "
        f"{perplexity(best):.2f}) at step {trainer.state.best_step:,}{_plot(trainer)}\n"
        f"next: python export.py {trainer.run}"
    )


def _plot(trainer: "Trainer") -> str:
    """Draws the curves, and says how long all took; a picture that cannot be drawn spoils no finished run.

    With one evaluation there is no curve to see, and drawing would take a tenth of so short a run.
    """
    picture = ""
    if trainer.state.step > trainer.eval_every:
        from smallm.training.plot import plot_runs

        try:
            picture = f"; curves in {plot_runs([trainer.run], trainer.run / 'loss.png')}"
        except UserError as error:
            trainer.report.say(f"warning: {error}")
    return f", {trainer.meter.seconds:.0f} s{picture}"
